"""What Optax asks of its own optimizers, asked of every method that `cx.methods.list()` has.

One small problem, whose leaves have three dtypes. The update of a method is compiled once, and
makes one history that all tests of its numbers look at; what a trace alone shows is only traced.
"""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from tests.problems import avals, norm, poisoned, predict, problem

DTYPES = {"w1": "bfloat16", "b1": "float32", "w2": "float64"}
MASK = {"w1": True, "b1": False, "w2": True}
STEPS = 20

_JUDGED = {"damping": cx.LevenbergMarquardt(4.0, every=2)}
_CG = _JUDGED | {
    "warm_start": 0.9,
    "preconditioner": cx.DiagonalPreconditioner(every=3),
    "solver": cx.CG(max_steps=5),
}
# As much state as a method can have, and every branch of it. A method that is not named here has
# its defaults, but for cadences of 2.
SETTINGS = {
    "egn": _JUDGED,
    "ggn_cg": _CG,
    "ggn_direct": _JUDGED,
    "hessian_free": {"damping": cx.LevenbergMarquardt(4.0, every=2)},
    "ignd": {"curvature": cx.FisherCurvature("empirical"), "damping": 4.0},
    "kfac": {"rank": 2, "damping": cx.LevenbergMarquardt(1.0, every=2)},
    "minsr": {"damping": 0.3},
    "natural_gradient": _CG | {"fisher": "mc"},
    "newton_cg": _CG,
    "newton_direct": _JUDGED,
    "newton_muon": {"rank": 2},
    "sketchy_sgd": {"damping": 0.1},
}
# The learning rates of the test of descent.
RATES = {"egn": 0.5, "ggn_cg": 0.5, "ggn_direct": 0.5, "newton_cg": 0.5, "newton_direct": 0.5}
RATES |= {"ignd": 3.0, "sketchy_sgd": 0.5}
RATE = 0.03


@pytest.fixture(autouse=True, scope="module")
def _low_rank():
    """Sides of the small problem have low-rank factors where a rank is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curvax.taps.blocks.WHOLE", 1)
        yield


def config_of(name):
    parameters = inspect.signature(getattr(cx.methods, name)).parameters
    cadences = {key: 2 for key in parameters if key == "every" or key.endswith("_every")}
    return cadences | SETTINGS.get(name, {})


def in_float32(params, x):
    return predict(jax.tree.map(lambda a: a.astype(jnp.float32), params), x)


@functools.cache
def small():
    """Objective, parameters, a batch, and the compiled value and gradient."""
    p = problem(dtype=jnp.float32)
    objective = cx.Objective(in_float32, cx.SoftmaxCrossEntropy(), example=p.batch)
    params = {key: leaf.astype(DTYPES[key]) for key, leaf in p.params.items()}
    gradient = jax.jit(jax.value_and_grad(objective.value))
    return SimpleNamespace(objective=objective, params=params, batch=p.batch, gradient=gradient)


class Case:
    """A method on the small problem, and what became of it."""

    def __init__(self, name):
        self.name = name
        self.method = cx.methods.make({"name": name, **config_of(name)}, small().objective)
        self.state = self.method.init(small().params)
        self.traces = 0
        self.compiled = jax.jit(self._update)

    @property
    def observes(self):
        return isinstance(self.method, cx.Method)

    def _update(self, value, grads, state, params, batch, key, skip):
        self.traces += 1
        extra = extra_arguments(value, grads, batch, key)
        take = lambda: self.method.update(grads, state, params, **extra)
        return jax.lax.cond(skip, lambda: (params, state), take)

    def run(self, state, params, batch=None, grads=None, step=0):
        """(loss, updates, state) of one compiled step."""
        batch = small().batch if batch is None else batch
        value, own = small().gradient(params, batch)
        grads = own if grads is None else grads
        key = jax.random.key(step)
        return value, *self.compiled(value, grads, state, params, batch, key, False)

    @functools.cached_property
    def history(self):
        """Those of each step of a descent."""
        rate, params, state, steps = RATES.get(self.name, RATE), small().params, self.state, []
        for step in range(STEPS):
            steps.append(self.run(state, params, step=step))
            _, updates, state = steps[-1]
            params = jax.tree.map(lambda w, u: (w - rate * u).astype(w.dtype), params, updates)
        return steps

    def loop(self, optimizer, batch=None):
        """The functions params ↦ state and (params, state) ↦ (params, state) of an optimizer that
        has the method inside: those of a fused step where there is one.
        """
        batch, key = small().batch if batch is None else batch, jax.random.key(0)
        if self.observes:
            step = cx.make_step(optimizer, self.method)
            return step.init, lambda params, state: step.pure(params, state, batch, key)[:2]

        def step(params, state):
            value, grads = jax.value_and_grad(small().objective.value)(params, batch)
            extra = extra_arguments(value, grads, batch, key)
            updates, state = optimizer.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        return optimizer.init, step


def extra_arguments(value, grads, batch, key):
    """All that a loop may pass, and more."""
    value_fn = lambda params: small().objective.value(params, batch)
    known = {"batch": batch, "key": key, "value": value, "grad": grads, "value_fn": value_fn}
    return known | {"loss_scale": value, "something_else": {"a": None}}


@functools.cache
def make_case(name):
    return Case(name)


@pytest.fixture(params=cx.methods.list())
def case(request):
    return make_case(request.param)


def types(tree):
    """Structure, shapes, dtypes, weak types and sharded axes, of arrays or of their shapes."""
    found = []

    def look(tree):
        for leaf in map(jax.typeof, jax.tree.leaves(tree)):
            found.append((leaf.shape, leaf.dtype, leaf.weak_type, tuple(leaf.sharding.spec)))

    jax.eval_shape(look, tree)
    return jax.tree.structure(tree), found


def changed(state, after):
    """Paths of the leaves of a state that are not what they were."""
    pairs = zip(jax.tree.leaves_with_path(after), jax.tree.leaves(state), strict=True)
    same = lambda a, b: jnp.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.inexact))
    return {jax.tree_util.keystr(path) for (path, new), old in pairs if not same(new, old)}


# -- one history -------------------------------------------------------------------------------


def test_one_executable_serves_all_steps(case):
    """Also those with a refresh, and in a `lax.cond`. Unknown arguments are swallowed."""
    assert isinstance(case.method, optax.GradientTransformationExtraArgs)
    wanted = jax.tree.structure(case.state), avals(case.state)
    for _, _, state in case.history:
        assert (jax.tree.structure(state), avals(state)) == wanted
    assert case.traces == 1 and case.compiled._cache_size() == 1


def test_updates_have_the_dtypes_of_the_parameters(case):
    for _, updates, _ in case.history:
        assert avals(updates) == avals(small().params)
    lengths = [float(norm(updates)) for _, updates, _ in case.history]
    assert np.all(np.isfinite(lengths)) and np.any(np.asarray(lengths[:3]) > 0)


def test_descent(case):
    values = [float(value) for value, _, _ in case.history]
    assert values[-1] < 0.8 * values[0], values
    _, _, state = case.history[-1]
    assert int(state.count) == STEPS and int(state.skipped) == 0


@pytest.mark.parametrize("bad", ["batch", "gradient"])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_what_is_not_finite_costs_one_step_and_poisons_nothing(case, bad, step):
    p = small()
    state = case.history[step - 1][2] if step else case.state
    batch = poisoned(p.batch) if bad == "batch" else p.batch
    _, grads = p.gradient(p.params, batch)
    if bad == "gradient":
        grads = {**grads, "w1": grads["w1"].at[0, 0].set(jnp.inf)}
    _, updates, after = case.run(state, p.params, batch, grads)
    assert float(norm(updates)) == 0
    assert (int(after.skipped - state.skipped), int(after.count - state.count)) == (1, 1)
    told = {path for path in changed(state, after) if path.startswith(".metrics")}
    assert changed(state, after) - told == {".skipped", ".count"}
    # And the next step is what it would have been.
    _, updates, later = case.run(after, p.params)
    # Rules for tensors count the steps taken, a plan counts all.
    taken = state if isinstance(state, cx.TensorwiseState) else state._replace(count=after.count)
    _, wanted, other = case.run(taken, p.params)
    assert not changed(wanted, updates)
    assert changed(other, later) - {".count"} == {".skipped"}
    for path, leaf in jax.tree.leaves_with_path((updates, later)):
        assert ".metrics" in jax.tree_util.keystr(path) or not np.any(np.isnan(leaf)), path


# -- what a trace shows ------------------------------------------------------------------------


def test_gradients_of_another_dtype(case):
    """As mixed-precision training makes them: updates and state are as ever."""
    p = small()
    wide = jax.tree.map(lambda w: jnp.ones(w.shape, jnp.float64), p.params)
    value, key = jnp.ones((), jnp.float32), jax.random.key(0)
    run = lambda grads, state: case._update(value, grads, state, p.params, p.batch, key, False)
    updates, after = jax.eval_shape(run, wide, case.state)
    assert (types(updates), types(after)) == (types(p.params), types(case.state))


def test_init_on_shapes(case):
    shapes = jax.eval_shape(lambda: small().params)
    made = case.method.init(shapes)
    assert jax.tree.structure(made) == jax.tree.structure(case.state)
    jax.tree.map(np.testing.assert_array_equal, made, case.state)
    assert types(jax.eval_shape(case.method.init, shapes)) == types(case.state)


def test_state_can_be_donated(case):
    """No buffer stands in it twice."""
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(case.state) if x.size]
    assert len(set(pointers)) == len(pointers)


def test_fields_are_found_by_name(case):
    state = optax.chain(case.method, optax.trace(0.9)).init(small().params)
    names = ["skipped", "rejected", "gain_ratio", "gradient_norm", "damping"]
    for name in names if case.observes else names[:1]:
        assert jnp.shape(optax.tree_utils.tree_get(state, name)) == (), name
    state = optax.tree_utils.tree_set(state, skipped=jnp.asarray(7, jnp.int32))
    assert int(state[0].skipped) == 7 and types(state[0]) == types(case.state)


def test_missing_arguments_are_named(case):
    if not case.observes:
        return
    p = small()
    grads = p.gradient(p.params, p.batch)[1]
    with pytest.raises(ValueError, match=r"`observation` nor `batch`.*batch=batch"):
        case.method.update(grads, case.state, p.params)
    with pytest.raises(ValueError, match=r"params=None"):
        case.method.update(grads, case.state, batch=p.batch)


def test_tree_map_params(case):
    optimizer = optax.chain(case.method, optax.trace(0.9))
    state = optimizer.init(small().params)
    mapped = optax.tree_map_params(optimizer, lambda leaf: leaf + 1, state)
    assert types(mapped) == types(state)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(mapped[1].trace))
    assert changed(state[0]._replace(count=0), mapped[0]).isdisjoint({".count", ".skipped"})

    # With the parameters' own tree beside, such as their shardings.
    def add(leaf, w):
        same = not isinstance(leaf, optax.MaskedNode) and leaf.shape == w.shape
        return leaf + w if same else leaf

    mapped = optax.tree_map_params(
        optimizer,
        add,
        state,
        small().params,
        transform_non_params=lambda leaf: leaf,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # as Optax asks of what masks
    )
    assert not changed(mapped[1].trace, small().params)


def test_masked(case):
    """What is hidden passes through; what is not moves."""
    p = small()
    masked = optax.masked(case.method, MASK)
    init, step = case.loop(optax.chain(masked, optax.scale_by_learning_rate(0.01)))
    run, state = jax.jit(step), init(p.params)
    moved, after = run(p.params, state)
    assert (types(moved), types(after)) == (types(p.params), types(state))
    _, grads = p.gradient(p.params, p.batch)
    np.testing.assert_allclose(moved["b1"], p.params["b1"] - 0.01 * grads["b1"], rtol=1e-6)
    moved, _ = run(moved, after)  # SOAP begins in its second step
    assert changed(p.params, moved) == {"['b1']", "['w1']", "['w2']"}


def test_partition(case):
    labels = {key: "mine" if kept else "others" for key, kept in MASK.items()}
    parts = {"mine": case.method, "others": optax.adam(1e-3)}
    init, step = case.loop(optax.partition(parts, labels))
    state = jax.eval_shape(init, small().params)
    moved, after = jax.eval_shape(step, small().params, state)
    assert (types(moved), types(after)) == (types(small().params), types(state))


def test_multi_steps(case):
    init, step = case.loop(optax.MultiSteps(case.method, every_k_schedule=2))
    state = jax.eval_shape(init, small().params)
    moved, after = jax.eval_shape(step, small().params, state)
    assert (types(moved), types(after)) == (types(small().params), types(state))


def test_inject_hyperparams(case):
    """Numbers that may be arrays can be schedules; no object is mistaken for one."""
    build = getattr(cx.methods, case.name)
    parameters = inspect.signature(build).parameters
    config = {key: each.default for key, each in parameters.items()} | config_of(case.name)
    config.pop("objective", None)
    assert [key for key, value in config.items() if callable(value)] == []
    numbers = {key for key, value in config.items() if type(value) in (int, float, bool)}
    traced = {key for key in numbers if "Array" in str(parameters[key].annotation)}
    injected = optax.inject_hyperparams(build, static_args=numbers - traced)
    arguments = (small().objective,) if case.observes else ()
    init, step = case.loop(injected(*arguments, **config))
    state = jax.eval_shape(init, small().params)
    _, after = jax.eval_shape(step, small().params, state)
    inner = state.optimizer if case.observes else state
    assert set(inner.hyperparams) == traced and types(after) == types(state)


def test_state_keeps_its_sharding_on_an_explicit_mesh(case):
    """Sharding is in the types of such a mesh, which a trace shows, here that of a batch."""
    p, mesh = small(), jax.make_mesh((1,), ("data",))
    assert mesh.axis_types == (AxisType.Explicit,)
    with jax.set_mesh(mesh):
        params = jax.device_put(p.params, NamedSharding(mesh, P()))
        init, step = case.loop(case.method, jax.device_put(p.batch, NamedSharding(mesh, P("data"))))
        state = jax.eval_shape(init, params)
        moved, after = jax.eval_shape(step, params, state)
        assert types(init(params)) == types(state)
        assert (types(moved), types(after)) == (types(params), types(state))


def test_no_parameters(case):
    """Nothing to train is an error where there is an objective, else nothing is done: there may be
    a label of `optax.partition` that no leaf has.
    """
    if case.observes:
        init, _ = case.loop(case.method)
        with pytest.raises(ValueError, match=r"model: got no trainable leaf, wanted at least one"):
            init({})
        return
    for nothing in ({}, {"w": optax.MaskedNode()}):
        state = case.method.init(nothing)
        updates, after = case.method.update(nothing, state, nothing)
        assert updates == nothing and types(after) == types(state)
