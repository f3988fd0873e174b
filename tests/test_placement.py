"""Who works on which matrix of curvature, and where it is kept, on meshes of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax._ownership import dealt
from curvax._stacks import Groups
from tests.devices import printed
from tests.meshes import MESHES, assert_same, assert_where, places_of, sharded, split, start

EVERY, STEPS = 3, 8
# Stacks of three layers, and what is by itself; low rank is for more than 32. (EK-FAC's eigenbases
# of factors of so few examples are a matter of rounding: tests/test_sharded_methods.py.)
SHAPES = {"layers": (3, 40, 40), "w1": (40, 12), "w2": (6, 40)}
METHODS = {
    "kfac": lambda m, f: m.kfac(f, rank=None, refresh_every=EVERY),
    "kfac at low rank": lambda m, f: m.kfac(f, rank=8, refresh_every=EVERY),
}


@given(
    stacks=st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 100)), max_size=8),
    devices=st.integers(1, 9),
)
def test_work_is_dealt_out_once_and_evenly(stacks, devices):
    deals = dealt(stacks, devices)
    loads = np.zeros(devices)
    for (count, cost), deal in zip(stacks, deals, strict=True):
        assert deal.each * devices + len(deal.owners) == count
        assert len(set(deal.owners)) == len(deal.owners)
        loads += deal.each * cost
        for owner in deal.owners:
            loads[owner] += cost
    largest = max((cost for _, cost in stacks), default=0)
    assert loads.max() - loads.min() <= largest * (1 + 1e-9)


def check_dealt():
    """Groups of any sizes: the results of one device, and no device has more than its share."""
    rng = np.random.default_rng(0)
    counts = {"a": 19, "b": 5, "c": 8, "d": 1, "e": 3}
    stacks = [jnp.asarray(rng.standard_normal((n, 4, 4))) for n in counts.values()]
    shifts = [jnp.asarray(rng.standard_normal(n)) for n in counts.values()]
    seen = []

    def function(keys, stacks, shifts):
        seen.append([(key, x.shape[0]) for key, x in zip(keys, stacks, strict=True)])
        return [
            (jnp.linalg.inv(x), y + len(key))
            for key, x, y in zip(keys, stacks, shifts, strict=True)
        ]

    groups = Groups(counts, stacks)
    wanted = groups.map(function, stacks, shifts)
    assert seen.pop() == list(counts.items())
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *lists: groups.map(function, *lists))(stacks, shifts)
    assert_same(got, wanted)
    assert [("a", 2), ("c", 1)] in seen
    assert {key for each in seen for key, n in each if n == 1} == set("abcde")


def problem():
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(0.2 * rng.standard_normal(v)) for k, v in SHAPES.items()}

    def predict(p, x):
        h = jnp.tanh(p["w1"] @ x)
        h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(w @ h), None), h, p["layers"])
        return p["w2"] @ h

    batch = jnp.asarray(rng.standard_normal((48, 12))), jnp.asarray(rng.integers(0, 6, 48))
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batch)
    return objective, params, batch


def observed(build):
    objective, params, batch = problem()
    method = build(cx.methods, objective)
    optimizer = optax.chain(method, optax.trace(0.9), optax.scale_by_learning_rate(0.05))
    return cx.make_step(optimizer, method), params, batch


def trained(step, params, state, batch):
    places = places_of((params, state))
    for count in range(STEPS):
        params, state, _ = step(params, state, batch, jax.random.key(count))
        assert_where((params, state), places)
    return params


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bytes_on_first(tree):
    return sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def check_kept():
    """The steps of one device, wherever the state is; less of it on each the more there are."""
    for name, build in METHODS.items():
        step, params, batch = observed(build)
        wanted = trained(step, params, step.init(params), batch)
        for label, mesh_of in (("data", MESHES["data"]), ("both", MESHES["fsdp and tensor"])):
            mesh = mesh_of.made("Auto")
            specs = {"w1": ("fsdp",), "layers": (None, "fsdp", "tensor")} if label == "both" else {}
            with jax.set_mesh(mesh):
                own, there = sharded(params, mesh, specs), split(batch, mesh)
                held = {}
                for keep in ("all", "own"):
                    step, *_ = observed(build)
                    places = cx.state_sharding(step, own, mesh, keep=keep)
                    state = jax.device_put(step.init(own), places)
                    assert_where(state, places)
                    held[keep] = bytes_on_first(state)
                    got = trained(step, own, state, there)
                    assert_same(got, wanted, f"{name}, {label}, {keep}")
                whole = bytes_of(state)
            assert held["own"] < held["all"] <= whole, (name, label, held, whole)
            assert name != "kfac" or held["all"] < 0.75 * whole, (label, held, whole)
            # The momentum is where the parameters are; of the rest most is divided.
            rest = whole - bytes_of(params)
            assert held["own"] - bytes_on_first(own) < 0.4 * rest, (name, label, held, whole)
        print(name, flush=True)


def main(what):
    start()
    globals()[what]()


PROGRAM = """
    from tests.test_placement import main
    main({what!r})
"""


def test_results_are_those_of_one_device():
    printed(PROGRAM.format(what="check_dealt"), devices=8)


def test_states_are_kept_where_they_are_told():
    wanted = " ".join(METHODS)
    assert " ".join(printed(PROGRAM.format(what="check_kept"), devices=8)) == wanted


def test_a_copy_of_a_parameter_is_where_it_is():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, P(None, "fsdp"))
    params = {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=at), "b": jnp.zeros(4)}
    found = cx.state_sharding(optax.adam(0.1), params, mesh)
    adam = found[0]
    assert adam.mu["a"].spec == adam.nu["a"].spec == P(None, "fsdp")
    assert adam.mu["b"].spec == adam.count.spec == P()


def test_bad_arguments():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    other = NamedSharding(jax.make_mesh((1,), ("y",), axis_types=(AxisType.Auto,)), P())
    params = {"a": jax.ShapeDtypeStruct((3, 4), jnp.float32, sharding=other)}
    with pytest.raises(ValueError, match=r"params\['a'\]: it is on a mesh of .*'y'"):
        cx.state_sharding(optax.adam(0.1), params, mesh)
    with pytest.raises(ValueError, match="keep: got 'some'"):
        cx.state_sharding(optax.adam(0.1), {}, mesh, keep="some")
