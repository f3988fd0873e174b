"""What a compiled step moves between eight devices: known programs, K-FAC against Adam, tables."""

import collections
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax import traffic
from curvax.plan import Collective
from curvax.plan.phases import kinds, phases
from tests.devices import printed

FLOAT = 4
WIDTHS = {"w1": (40, 48), "b1": (48,), "w2": (48, 56), "b2": (56,), "w3": (56, 10)}
SHARDED = {
    "w1": P("fsdp"),
    "b1": P("fsdp"),
    "w2": P(None, "fsdp"),
    "b2": P("fsdp"),
    "w3": P("fsdp"),
}
# As written for a GPU: asynchronous pairs, and computations that they run.
TEXT = (pathlib.Path(__file__).parent / "data" / "traffic.hlo").read_text()


def test_text_of_a_program():
    found = traffic(TEXT)
    large = ("f32", (8, 4))
    wanted = [
        Collective("all-reduce", (large, ("bf16", (3,)), ("pred", ())), 2, 1, True, "jit(f)/psum"),
        Collective("all-gather", (("f32", (128, 4)),), 16, 1, True, ""),
        Collective("reduce-scatter", (("f32", (2, 4)),), 4, 1, True, ""),
        Collective("collective-permute", (large,), 3, 7, True, ""),
        Collective("collective-permute", (large,), 3, 1, False, ""),
        Collective("all-to-all", (large,), 8, 1, True, ""),
    ]
    assert list(found.collectives) == wanted
    assert [each.nbytes for each in wanted] == [135, 2048, 32, 128, 128, 128]
    assert [each.wire for each in wanted] == [135, 1920, 96, 128, 128, 112]
    assert found.counts()["collective-permute"] == 8
    assert found.nbytes()["collective-permute"] == 8 * 128
    assert found.wire() == 135 + 1920 + 96 + 8 * 128 + 112
    assert not found.counted
    with pytest.raises(ValueError, match=r"^program: an open parenthesis in '\(f32"):
        traffic("  %x = (f32[2] add(")
    with pytest.raises(ValueError, match=r"^program: got no entry computation"):
        traffic("%f (x: f32[]) -> f32[] {")


def compiled(function, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return traffic(jax.jit(function).lower(*shapes).compile())


def test_flops_and_accesses():
    for precision in ("default", "highest"):
        product = compiled(functools.partial(jnp.dot, precision=precision), (8, 16), (16, 4))
        assert product.flops == 2 * 8 * 16 * 4
        assert product.precise == (product.flops if precision == "highest" else 0)
    layers = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    scanned = compiled(layers, (16, 32), (6, 32, 32))
    assert scanned.flops == 6 * 2 * 16 * 32 * 32
    # Each round has at least to read a slice of the weights, not all of them, and what it is given.
    assert 1 <= scanned.accessed / (6 * FLOAT * (32 * 32 + 2 * 16 * 32)) < 6
    form = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=form
    )
    assert compiled(convolve, (2, 8, 8, 3), (3, 3, 3, 5)).flops == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    solve = lambda a, b: jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(a), b, lower=True)
    solved = compiled(solve, (32, 32), (32, 8))
    assert solved.flops == solved.precise == pytest.approx(32**3 / 3 + 32 * 32 * 8)


def test_kinds_of_steps():
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batch_of(8))
    plan = cx.methods.kfac(objective, refresh_every=6, stagger=2).plan
    (lazy, count, steps), *others = kinds(plan)
    assert (lazy, steps) == ("nothing due", 4) and not any(plan.phase(count))
    assert [steps for _, _, steps in others] == [1, 1, 0] and others[-1][0].startswith("first: ")
    (only,) = kinds(cx.methods.egn(objective).plan)
    assert only == ("every step", 1, 1)


@pytest.mark.parametrize("field", ["flops", "bandwidth", "link"])
def test_rates(field):
    rates = {"flops": 1e12, "bandwidth": 1e11, "link": 1e10}
    with pytest.raises(ValueError, match=rf"^{field}: got 0.0, wanted a number above 0"):
        cx.Rates(**(rates | {field: 0.0}))


# -- On eight devices --------------------------------------------------------------------------


def mesh_of(kind=AxisType.Auto, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def predict(params, x):
    x = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.tanh(x @ params["w2"] + params["b2"]) @ params["w3"]


def batch_of(size):
    shape = jax.ShapeDtypeStruct
    return shape((size, 40), jnp.float32), shape((size,), jnp.int32)


def params_on(mesh):
    """Sharded over an axis "fsdp", if there is one."""
    where = lambda name: NamedSharding(mesh, SHARDED[name] if "fsdp" in mesh.shape else P())
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where(name))
        for name, shape in WIDTHS.items()
    }


def adam_step(objective, params, batch, mesh):
    optimizer = optax.adam(1e-3)

    def step(params, state, batch):
        value, gradient = jax.value_and_grad(objective.value)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    whole, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names[0]))
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    (inner, last) = jax.eval_shape(optimizer.init, params)
    state = (inner._replace(count=place(inner.count, whole), mu=params, nu=params), last)
    batch = jax.tree.map(lambda leaf: place(leaf, divided), batch)
    where = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*where, whole))
    return traffic(step.lower(params, state, batch).compile())


def kfac_steps(objective, rank, params, batch, mesh):
    method = cx.methods.kfac(objective, rank=rank, refresh_every=5)
    optimizer = optax.chain(method, optax.trace(0.9), optax.scale_by_learning_rate(1e-3))
    step = cx.make_step(optimizer, method)
    lazy, refresh = phases(step, params, batch, jax.random.key(0), mesh)
    assert (lazy.label, lazy.steps, refresh.steps) == ("nothing due", 4, 1)
    assert lazy.count % 5 and refresh.count % 5 == 0
    return lazy.traffic, refresh.traffic


def shapes_in(found, kind=None):
    return collections.Counter(
        dims for each in found.collectives for _, dims in each.results if kind in (None, each.kind)
    )


def check_known():
    mesh = mesh_of(data=4, tensor=2)

    def of(function):
        whole = NamedSharding(mesh, P())
        x = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=whole)
        each = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return traffic(jax.jit(each).lower(x).compile())

    size = 16 * 24 * FLOAT
    for devices, axes in {4: "data", 2: "tensor", 8: ("data", "tensor")}.items():
        total = of(lambda x, axes=axes: jax.lax.psum(x, axes))
        assert total.nbytes() == {"all-reduce": size} and total.counts() == {"all-reduce": 1}
        assert total.wire() == pytest.approx(2 * (devices - 1) / devices * size)
        assert total.collectives[0].group == devices
    whole = of(lambda x: jax.lax.all_gather(x, "data", tiled=True))
    assert whole.nbytes() == {"all-gather": 4 * size} and whole.wire() == 3 * size
    share = of(lambda x: jax.lax.psum_scatter(x, "data", tiled=True))
    assert share.nbytes() == {"reduce-scatter": size / 4} and share.wire() == 0.75 * size
    swapped = of(lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True))
    assert swapped.nbytes() == {"all-to-all": size} and swapped.wire() == 0.75 * size
    moved = of(lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]))
    assert moved.nbytes() == {"collective-permute": size} and moved.wire() == size
    assert moved.collectives[0].group == 4

    scan = lambda body: lambda x: jax.lax.scan(body, x, length=5)[0]
    once = lambda x, _: (jax.lax.psum(2 * x, "data"), None)
    looped = of(scan(once))
    assert looped.counts() == {"all-reduce": 5} and looped.nbytes() == {"all-reduce": 5 * size}
    assert looped.wire() == 5 * 1.5 * size and looped.counted
    nested = of(scan(lambda x, _: (scan(once)(x), None)))
    assert nested.nbytes() == {"all-reduce": 25 * size}
    more = lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: jax.lax.psum(x, "data"), x)
    unknown = of(more)
    assert unknown.nbytes() == {"all-reduce": size} and not unknown.counted
    print("known")


def check_data_parallel(rank):
    """A lazy step sends what Adam's sends; a refresh of low rank nothing that is n × n."""
    mesh, batch = mesh_of(data=8), batch_of(64)
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batch)
    params = params_on(mesh)
    adam = adam_step(objective, params, batch, mesh)
    gradient = FLOAT * sum(leaf.size for leaf in params.values())
    assert gradient <= adam.nbytes()["all-reduce"] <= gradient + 64  # the value, too
    lazy, refresh = kfac_steps(objective, rank, params, batch, mesh)
    assert lazy.counted and lazy.wire() <= 1.02 * adam.wire(), (lazy, adam)
    assert refresh.wire() > 1.1 * adam.wire()
    square = [dims for dims in shapes_in(refresh) if len(dims) > 1 and min(dims[-2:]) >= 40]
    large = [dims for dims in square if dims[-2:] not in {(48, 40), (40, 48), (56, 48), (48, 56)}]
    # Full factors, with the bias as one more input, are seen: the check is not of an empty list.
    assert bool(large) == (rank is None), large
    print("data")


def check_sharded():
    """A weight is gathered no more often than by Adam, in any step."""
    mesh, batch = mesh_of(fsdp=8), batch_of(64)
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batch)
    params = params_on(mesh)
    gathered = shapes_in(adam_step(objective, params, batch, mesh), "all-gather")
    assert all(gathered[params[name].shape] for name in ("w1", "w2", "w3"))
    for found in kfac_steps(objective, 8, params, batch, mesh):
        more = shapes_in(found, "all-gather") - gathered
        for leaf in params.values():
            turned = {leaf.shape, leaf.shape[::-1]}
            assert not any(dims[-leaf.ndim :] in turned for dims in more), (leaf.shape, more)
    print("sharded")


def check_describe():
    batch = batch_of(16)
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batch)
    method = cx.methods.sophia_g(objective, every=3)
    mesh = mesh_of(data=8)
    rates = cx.Rates(flops=1e12, bandwidth=1e11, link=1e10)
    params = params_on(mesh)
    text = method.describe(params, batch, mesh=mesh, rates=rates)
    alone = method.describe(params, batch)
    assert text.startswith(alone) and "each of 8 devices (data=8)" in text
    rows = {cells[0]: cells for cells in (re.split(r"\s{2,}", x) for x in text.splitlines())}
    at = rows["step"].index("all-reduce")
    size = FLOAT * sum(leaf.size for leaf in params.values()) / 1000
    assert rows["nothing due"][1] == "2"
    operations, moved = rows["nothing due"][at].split(" × ")
    assert int(operations) >= 1 and moved == f"{size:.3g} kB"
    assert float(rows["nothing due"][-1]) > 0 and "ms" in rows["step"]
    assert "ms" not in method.describe(params, batch, mesh=mesh).splitlines()[-4].split()

    # Arrays are as good as their shapes, and a step is described with its whole optimizer.
    arrays = {name: jnp.ones(leaf.shape) for name, leaf in params.items()}
    given = (jnp.ones((16, 40)), jnp.zeros((16,), jnp.int32))
    again = method.describe(arrays, given, mesh=mesh, rates=rates)
    assert again.partition("each of 8")[2] == text.partition("each of 8")[2]
    step = cx.make_step(optax.chain(method, optax.trace(0.9)), method)
    (lazy, *_) = phases(step, params, batch, jax.random.key(0), mesh)
    (bare, *_) = phases(cx.make_step(method, method), params, batch, jax.random.key(0), mesh)
    assert lazy.arguments - bare.arguments == FLOAT * sum(x.size for x in params.values())
    assert lazy.live == lazy.arguments + lazy.temporary

    # What is kept for a parameter is sharded like it, unless told.
    sharded = mesh_of(fsdp=8)
    on = params_on(sharded)
    less, more = (
        phases(cx.make_step(method, method), on, batch, jax.random.key(0), sharded, where)[0]
        for where in (None, NamedSharding(sharded, P()))
    )
    assert more.arguments - less.arguments >= 0.8 * FLOAT * sum(x.size for x in on.values())

    explicit = mesh_of(AxisType.Explicit, data=8)
    assert "data=8" in method.describe(params_on(explicit), batch, mesh=explicit)
    with pytest.raises(ValueError, match=r"^batch\[0\]: got 12 examples, wanted a multiple of 8"):
        method.describe(params, batch_of(12), mesh=mesh)
    with pytest.raises(ValueError, match=r"^mesh: got \{'data': 8\}, but \['b1'\] is on"):
        method.describe(on, batch, mesh=mesh)
    with pytest.raises(ValueError, match=r"^mesh: got None with rates="):
        method.describe(params, batch, rates=rates)
    print("described")


@pytest.mark.parametrize(
    ("check", "wanted"),
    [
        ("check_known()", "known"),
        ("check_data_parallel(8)", "data"),
        ("check_data_parallel(None)", "data"),
        ("check_sharded()", "sharded"),
        ("check_describe()", "described"),
    ],
)
def test_on_eight_devices(check, wanted):
    program = f"import tests.test_traffic as module\nmodule.{check}"
    assert printed(program, devices=8) == [wanted]
