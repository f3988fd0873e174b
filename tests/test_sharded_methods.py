"""Methods that differentiate a model, on meshes of eight devices: the numbers of one device."""

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import curvax as cx
from tests.devices import printed
from tests.meshes import (
    COMPILED,
    MESHES,
    assert_same,
    assert_where,
    attention_problem,
    convolution_problem,
    mlp_problem,
    places_of,
    sharded,
    split,
    start,
)
from tests.problems import EXACT_CG, avals

STEPS, EVERY = 20, 5
# In a step that refreshes factors, too.
POISONED = 2 * EVERY

METHODS = {
    "kfac": lambda m, f: m.kfac(f, rank=None, refresh_every=EVERY),
    "kfac at low rank": lambda m, f: m.kfac(f, rank=4, refresh_every=EVERY),
    "kfac in turns": lambda m, f: m.kfac(f, rank=None, refresh_every=EVERY, stagger=2),
    "ekfac": lambda m, f: m.ekfac(f, refresh_every=EVERY),
    "ggn_cg": lambda m, f: m.ggn_cg(f, damping=0.1, solver=EXACT_CG),
    "egn": lambda m, f: m.egn(f, damping=0.1),
    "sophia_g": lambda m, f: m.sophia_g(f, every=EVERY),
    "sophia_h": lambda m, f: m.sophia_h(f, every=EVERY),
    "spring": lambda m, f: m.spring(f, damping=0.1),
}
# Sides of 16 and 40 are shared by 8 devices, of 12 by 4, of 6 by 2. Low rank is for more
# than 32, where a full factor of this batch would be singular, and its eigenbasis, which EK-FAC
# measures in, a matter of rounding.
SMALL = lambda: mlp_problem(12, 16, 6)
LARGE = lambda: mlp_problem(12, 40, 6)
BOTH = ("fsdp and tensor",)
LOW_RANK = ("kfac at low rank",)
# What differs little from others: in turns or not, and where the diagonal is from.
FEWER = ("kfac in turns", "sophia_g", "spring")
CASES = [
    (name, LARGE if name in LOW_RANK else SMALL, ("data", *BOTH) if name in FEWER else MESHES)
    for name in METHODS
]
CASES += [(name, attention_problem, BOTH) for name in ("kfac", "ggn_cg")]
CASES += [("kfac", convolution_problem, BOTH)]


def objective_of(problem):
    predict, params, batches = problem
    return cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=batches[0]), params, batches


def poisoned(batch):
    """With NaN in the last example, which is on the last device that has a part of the batch; or
    with a label that names no class, which makes the loss NaN."""
    x, y = batch
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.at[-1].set(jnp.nan), y
    return x, y.at[-1].set(1000)


def trained(method, params, batches, bad):
    """The parameters after each step, of which one is skipped."""
    optimizer = optax.chain(method, optax.scale_by_learning_rate(0.05))
    step = cx.make_step(optimizer, method)
    state = step.init(params)
    places, types, phases, found = places_of((params, state)), avals(state), set(), []
    for count in range(STEPS):
        batch = bad if count == POISONED else batches[count % len(batches)]
        COMPILED.clear()
        params, state, _ = step(params, state, batch, jax.random.key(count))
        phase = method.plan.phase(min(count, EVERY + count % EVERY))
        assert phase not in phases or not COMPILED, (count, COMPILED)
        phases.add(phase)
        assert avals(state) == types
        assert_where((params, state), places)
        found.append(params)
    assert int(state.skipped) == 1
    assert_same(found[POISONED], found[POISONED - 1])
    return found


def check(kind, name, problem, meshes):
    objective, params, batches = objective_of(problem)
    build = lambda: METHODS[name](cx.methods, objective)
    bad = poisoned(batches[0])
    wanted = trained(build(), params, batches, bad)
    for label in meshes:
        mesh = MESHES[label].made(kind)
        with jax.set_mesh(mesh):
            there = [split(batch, mesh) for batch in (*batches, bad)]
            own = sharded(params, mesh, MESHES[label].specs)
            got = trained(build(), own, there[:-1], there[-1])
        for count, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_same(a, b, f"{name}, {label}, step {count}")


@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(
    name=st.sampled_from(["kfac at low rank", "ggn_cg"]),
    sides=st.tuples(st.integers(3, 9), st.integers(33, 43), st.integers(2, 7)),
    label=st.sampled_from(list(MESHES)),
)
def check_drawn(kind, name, sides, label):
    """Sides that the devices of an axis share, or do not."""
    check(kind, name, mlp_problem(*sides), (label,))


def main(kind):
    start()
    for name, problem, meshes in CASES:
        check(kind, name, problem(), meshes)
        print(name, flush=True)
    check_drawn(kind)
    print("drawn")


PROGRAM = """
    from tests.test_sharded_methods import main
    main({kind!r})
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_steps_are_those_of_one_device(kind):
    """Nothing is compiled twice, model and state stay where they are, and what is not finite on one
    device is one skipped step on all."""
    done = printed(PROGRAM.format(kind=kind), devices=8)
    assert " ".join(done) == " ".join([*(name for name, *_ in CASES), "drawn"])
