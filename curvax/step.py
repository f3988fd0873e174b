"""The fused training step: one linearised pass gives value, gradient, curvature and update."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from curvax import _tree
from curvax._binding import binding
from curvax._checks import check_count
from curvax._ownership import working_on
from curvax._sharding import explicit, on_mesh_of, plain
from curvax.batch import Batch
from curvax.objective import Params
from curvax.plan import GainRatio, Observation
from curvax.plan.describe import describe_on_mesh
from curvax.plan.parts import value_in_parts
from curvax.plan.phases import Rates
from curvax.plan.plan import Due
from curvax.transform import (
    Method,
    Metrics,
    SecondOrderState,
    gain_ratio,
    is_method_state,
    measure_when,
    method_states,
)

_Static = tuple[Any, tuple[Any, ...]]
# Of the arrays of a model and of a state.
_Places = tuple[tuple[Any, ...], tuple[Any, ...]] | None


class StepState(NamedTuple):
    """State of a fused step. `skipped` counts steps not taken because something was not finite."""

    count: Int[Array, ""]
    optimizer: optax.OptState
    skipped: Int[Array, ""]


class Step:
    """A training step: `model, state, info = step(model, state, batch, key)`.

    Made by [`make_step`][curvax.make_step]. Called, it compiles one executable for each pattern of
    due quantities (see `Plan.phase`) and picks the right one on the host; `step.pure` is the same
    step as a pure function for a `jit` or `scan` of your own, where `lax.cond` decides.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation | optax.MultiSteps,
        method: Method,
        donate: bool = False,
        micro_batches: int = 1,
    ):
        # `optax.MultiSteps` is no GradientTransformation, and takes extra arguments as it is.
        plain = isinstance(optimizer, optax.GradientTransformation)
        self.optimizer: Any = optax.with_extra_args_support(optimizer) if plain else optimizer
        self.method = method
        self._donates = donate
        self._micro_batches = micro_batches
        # Plain `jit`, with what is no array in the model as a static argument: on a small model
        # the host's share of a step counts.
        self._compiled = jax.jit(
            self._run, static_argnums=(5, 6, 7), donate_argnums=(0, 1) if donate else ()
        )
        self._outputs: dict[Any, jax.ShapeDtypeStruct] = {}
        # The counts last handed out and last taken, with their values: the phase of the next step,
        # or of the same one again, is known without waiting for the device.
        self._known: tuple[tuple[Array, int], ...] = ()
        self._phases: dict[int, tuple[Due, ...]] = {}
        self._period = method.plan.period

    def init(self, model: PyTree[Any]) -> StepState:
        """The state before the first step. **Raises** `ValueError` if nothing can be trained."""
        params, objective = self.method.objective.bind(model)
        count, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        with binding(objective, params):
            state = StepState(count, self.optimizer.init(params), skipped)
        return on_mesh_of(params, state)

    def __call__(
        self,
        model: PyTree[Any],
        state: StepState,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        curvature_batch: Batch | None = None,
    ) -> tuple[PyTree[Any], StepState, Metrics]:
        """One step. **Raises** `ValueError` for a batch that does not fit model and loss."""
        if isinstance(state.count, Tracer):  # inside a jit of the user's
            return self.pure(model, state, batch, key, curvature_batch=curvature_batch)
        self._check(model, batch, key)
        count = self._host_count(state.count)
        arrays, static = _split(model)
        arrays, changed, info = self._compiled(
            arrays,
            state,
            batch,
            key,
            curvature_batch,
            static,
            self._phase(count),
            _places(arrays, state),
        )
        taken, state = state.count, _updated(state, changed)
        self._known = ((state.count, count + 1), (taken, count))
        return _merge(arrays, static), state, info

    def lower(
        self,
        model: PyTree[Any],
        state: StepState,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        count: int,
        curvature_batch: Batch | None = None,
    ) -> jax.stages.Lowered:
        """The step number `count`, lowered as `jax.jit(...).lower` does; nothing is run.

        `.compile()` compiles it ahead of time, for calls too, and its `memory_analysis()` tells
        what the step takes. Arrays may be `jax.ShapeDtypeStruct`s.
        """
        arrays, static = _split(model)
        phase = self._phase(count)
        places = _places(arrays, state)
        return self._compiled.lower(
            arrays, state, batch, key, curvature_batch, static, phase, places
        )

    def _run(
        self,
        arrays: list[Any],
        state: StepState,
        batch: Batch,
        key: PRNGKeyArray | None,
        curvature_batch: Batch | None,
        static: _Static,
        phase: tuple[Due, ...],
        places: _Places,
    ) -> tuple[list[Any], list[Array | None], Metrics]:
        model = _merge(arrays, static)
        mesh = None if places is None else places[1][0].mesh
        with working_on(mesh):
            model, new, info = self.pure(
                model, state, batch, key, curvature_batch=curvature_batch, phase=phase
            )
        arrays, changed = _split(model)[0], self._changed(new, state)
        if places is not None:
            arrays, changed = map(_stay, (arrays, changed), places)
        return arrays, changed, info

    def _changed(self, new: StepState, old: StepState) -> list[Array | None]:
        """The leaves of the new state; None for those that are the old ones: XLA would copy what
        it hands on, such as curvature in a step that does not refresh it. Donated memory is handed
        on as it is.
        """
        pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        return [None if a is b and not self._donates else a for a, b in pairs]

    def pure(
        self,
        model: PyTree[Any],
        state: StepState,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        curvature_batch: Batch | None = None,
        phase: tuple[Due, ...] | None = None,
    ) -> tuple[PyTree[Any], StepState, Metrics]:
        """One step as a pure function; `phase` as from `Plan.phase`, by default that of the
        state's count, decided by `lax.cond`.
        """
        method = self.method
        phase = method.plan.phase(state.count) if phase is None else phase
        observation = method.observe(
            model,
            batch,
            key,
            state=_methods(state.optimizer)[0],
            phase=phase,
            curvature_batch=curvature_batch,
            judged_later=True,
            micro_batches=self._micro_batches,
        )
        params, objective = observation.params, observation.objective

        # Line searches of Optax refuse extra arguments that the function does not name.
        def value_fn(at: Params, observation: Any = None, key: PRNGKeyArray | None = key) -> Array:
            del observation
            return value_in_parts(objective, at, batch, key, self._micro_batches)

        updates, inner = self.optimizer.update(
            observation.gradient,
            state.optimizer,
            params,
            observation=observation,
            value=observation.value,
            grad=observation.gradient,
            value_fn=value_fn,
            key=key,
        )
        finite = jnp.isfinite(observation.value) & _tree.all_finite(updates)
        # A method that could not solve gives zeros, and counts them: no step either.
        for before, after in zip(_methods(state.optimizer), _methods(inner), strict=True):
            finite = finite & (after.skipped == before.skipped)
        accepted = jnp.asarray(True)
        if method.damping.every is not None:
            inner, accepted = self._judge(observation, updates, inner)
        take = finite & accepted
        moved = optax.apply_updates(params, updates)
        params = _tree.where(take, moved, params)
        inner = _keep_buffers(finite, take, inner, state.optimizer)
        new = StepState(state.count + 1, inner, state.skipped + (~finite).astype(jnp.int32))
        return eqx.combine(params, model), new, _methods(inner)[0].metrics

    def _judge(
        self, observation: Observation, updates: Params, inner: optax.OptState
    ) -> tuple[optax.OptState, Bool[Array, ""]]:
        method = self.method
        due = observation.due(GainRatio())
        operator = observation[method.curvature]
        measure = lambda: gain_ratio(observation, operator, observation.gradient, updates)
        ratio = measure_when(due, measure)
        judged = jax.tree.map(
            lambda node: method.judge(node, ratio, due)[0] if is_method_state(node) else node,
            inner,
            is_leaf=is_method_state,
        )
        accepted = jnp.stack([node.metrics.accepted for node in _methods(judged)])
        return judged, jnp.all(accepted)

    def _check(self, model: PyTree[Any], batch: Batch, key: PRNGKeyArray | None) -> None:
        """Shapes once for each kind of batch; values of targets whenever the host has them."""
        leaves, treedef = jax.tree.flatten(batch)
        shapes = (
            (leaf.shape, leaf.dtype) if _tree.is_array(leaf) else type(leaf) for leaf in leaves
        )
        kind = (treedef, *shapes)
        if kind not in self._outputs:
            params, objective = self.method.objective.bind(model)
            self._outputs[kind] = objective.check(params, batch, key)
            return
        if not any(isinstance(leaf, np.ndarray) for leaf in leaves):
            return  # reading what is on a device would wait for it
        target = self.method.objective.example(batch).target
        if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(target)):
            self.method.objective.loss.check(self._outputs[kind], target)

    def _host_count(self, count: Array) -> int:
        if self._period == 1:
            return 0
        for known, value in self._known:
            if known is count:
                return value
        return int(count)

    def _phase(self, count: int) -> tuple[Due, ...]:
        """As of the plan, which repeats itself after its first cycle."""
        period = self._period
        within = count if count < period else period + count % period
        if within not in self._phases:
            self._phases[within] = self.method.plan.phase(within)
        return self._phases[within]

    def describe(
        self,
        model: PyTree[Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        mesh: Mesh | None = None,
        rates: Rates | None = None,
        state_sharding: PyTree[Any] = None,
    ) -> str:
        """See [`Method.describe`][curvax.Method]. What is counted on a mesh is this step, with the
        whole optimizer, of whose state `state_sharding` is.
        """
        return describe_on_mesh(self, model, batch, key, mesh, rates, state_sharding)


def make_step(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    method: Method,
    *,
    donate: bool = False,
    micro_batches: int = 1,
) -> Step:
    """A fused training step for an Optax optimizer that contains a method of curvax.

    **Arguments:**

    - `optimizer`: the whole optimizer, such as
      `optax.chain(method, optax.scale_by_learning_rate(1.0))`.
    - `method`: the method inside it, which says what a step must observe.
    - `donate`: let a call reuse the memory of the model and the state that it is given; they
      cannot be used afterwards.
    - `micro_batches`: take each batch in so many equal parts, one after the other, and the memory
      of one part: value, gradient and statistics are summed, and a product with a curvature
      operator visits all parts. The step is that of the whole batch, but for random draws and for
      what is estimated from a sample of the examples (see
      Accumulation in the page on concepts). Methods that look at the examples of a batch
      side by side (EGN, MinSR, SPRING, IGND) take only 1.

    A step whose loss, gradient or update is not finite is skipped: model and every buffer of the
    optimizer stay as they were, and `state.skipped` counts it.
    """
    if not isinstance(method, Method):
        raise ValueError(
            f"method: got a {type(method).__name__}, wanted a method of curvax (such as "
            "curvax.methods.ggn_cg(...)); give the whole chain as `optimizer`."
        )
    check_count("micro_batches", micro_batches)
    return Step(optimizer, method, donate, micro_batches)


def _updated(state: StepState, changed: list[Array | None]) -> StepState:
    leaves, treedef = jax.tree.flatten(state)
    # What came from a file may not be on a device yet.
    held = lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    pairs = zip(leaves, changed, strict=True)
    return jax.tree.unflatten(treedef, [held(a) if b is None else b for a, b in pairs])


def _places(arrays: list[Any], state: StepState) -> _Places:
    """Where model and state are on a mesh; None on one device, and where it is in their types."""
    on_mesh = getattr(state.count, "sharding", None)
    if not isinstance(on_mesh, NamedSharding) or explicit(state.count):
        return None
    of = lambda leaves: tuple(plain(getattr(leaf, "sharding", None)) for leaf in leaves)
    return of(arrays), of(jax.tree.leaves(state))


def _stay(found: list[Any], places: tuple[Any, ...]) -> list[Any]:
    """What XLA would place otherwise, if it chose: another program then for the next step."""
    return [
        x if x is None or place is None else jax.lax.with_sharding_constraint(x, place)
        for x, place in zip(found, places, strict=True)
    ]


def _split(model: PyTree[Any]) -> tuple[list[Any], _Static]:
    """The arrays of a model, and the rest of it as a hashable argument."""
    leaves, treedef = jax.tree.flatten(model)
    traced = lambda leaf: _tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    arrays = [leaf if traced(leaf) else None for leaf in leaves]
    return arrays, (treedef, tuple(None if traced(leaf) else leaf for leaf in leaves))


def _merge(arrays: list[Any], static: _Static) -> PyTree[Any]:
    treedef, others = static
    leaves = [
        other if array is None else array for array, other in zip(arrays, others, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def _methods(state: optax.OptState) -> list[SecondOrderState]:
    found = method_states(state)
    if not found:
        raise ValueError(
            "optimizer: its state holds no state of a curvax method; build it around `method`."
        )
    return found


def _keep_buffers(
    finite: Bool[Array, ""],
    take: Bool[Array, ""],
    new: optax.OptState,
    old: optax.OptState,
) -> optax.OptState:
    """The new state where the step is taken; else the old, but for what a method learned."""

    def pick(new: Any, old: Any) -> Any:
        if is_method_state(new):
            kept = _tree.where(finite, new, old)
            skipped = old.skipped + (~finite).astype(jnp.int32)
            metrics = new.metrics._replace(finite=finite)
            return kept._replace(count=new.count, skipped=skipped, metrics=metrics)
        return jnp.where(take, new, old) if eqx.is_array(new) and new is not old else new

    return jax.tree.map(pick, new, old, is_leaf=is_method_state)
