"""What the factors in a state hold: against eigenvalues that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.taps.blocks import Form
from tests import problems


@pytest.fixture(autouse=True)
def all_sides_low_rank(monkeypatch):
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)


def trained(steps, name="kfac", bad=(), **options):
    """A method, its objective, and a state after so many steps."""
    p = problems.problem()
    objective = cx.Objective(p.objective.predict, p.objective.loss, example=p.batch)
    if name != "newton_muon":
        options = {"fisher": "exact"} | options
    method = getattr(cx.methods, name)(objective, refresh_every=3, damping=0.1, **options)
    step = cx.make_step(optax.chain(method, optax.scale(-0.05)), method)
    params, state = p.params, step.init(p.params)
    for i in range(steps):
        batch = problems.poisoned(p.batch) if i in bad else p.batch
        params, state, _ = step(params, state, batch)
    return objective, p.params, state


def row(report, path, side="input"):
    return next(each for each in report if (each.path, each.side) == (path, side))


def with_input(state, path, **factor):
    """The state with other arrays in the input factor of a block."""
    method = state.optimizer[0]
    block = method.preconditioner[path]
    held = block.input.factor
    held = type(held)(**({k: getattr(held, k) for k in ("basis", "core", "tail")} | factor))
    block = block.with_(input=block.input._replace(factor=held))
    memory = method.preconditioner | {path: block}
    return state._replace(optimizer=(method._replace(preconditioner=memory), *state.optimizer[1:]))


def test_ranks_of_a_known_spectrum():
    _, _, state = trained(1, rank=3)
    core = jnp.diag(jnp.asarray([0.08, 6.0, 1.92]))[None]
    # 5 rows: 3 in the basis with a trace of 8, 2 in the tail with one of 2.
    known = with_input(state, "['w1']", core=core, tail=jnp.asarray([1.0]))
    each = row(cx.factor_report(known), "['w1']")
    assert each.form == Form("sketch", 5, 3) and each.stack == 1
    assert each.captured == pytest.approx(0.8) and each.effective_rank == 2
    for share, rank in [(0.7, 1), (0.75, 1), (0.76, 2), (0.99, 2), (0.991, 3), (1.0, 3)]:
        assert row(cx.factor_report(known, share), "['w1']").effective_rank == rank
    assert cx.factor_report(known).ranks["['w1']"][0] == 2


def test_a_stack_counts_by_the_matrix_that_needs_the_most():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    params = {"w": draw(2, 6, 5)}
    batch = draw(4, 2, 5), draw(4, 2, 6)
    predict = lambda p, x: jnp.einsum("soi,si->so", p["w"], x)
    objective = cx.Objective(predict, cx.SquaredError(), example=batch)
    method = cx.methods.kfac(objective, rank=3, fisher="exact")
    step = cx.make_step(optax.chain(method), method)
    _, state, _ = step(params, step.init(params), batch)
    factor = state.optimizer[0].preconditioner["['w']"].input.factor
    spectra = np.linalg.eigvalsh(factor.core)
    captured = spectra.sum(1) / (spectra.sum(1) + (factor.size - 3) * np.asarray(factor.tail))
    core = jnp.stack([jnp.diag(jnp.asarray(d)) for d in ([1.0, 0, 0], [1.0, 1.0, 0])])
    report = cx.factor_report(state)
    assert row(report, "['w']").captured == pytest.approx(captured.min())
    each = row(cx.factor_report(with_input(state, "['w']", core=core)), "['w']")
    assert (each.stack, each.effective_rank) == (2, 2)


def test_full_factors_hold_all_and_need_less():
    _, _, state = trained(1, rank=None)
    each = row(cx.factor_report(state, 0.9), "['w1']")
    values = np.linalg.eigvalsh(state.optimizer[0].preconditioner["['w1']"].input.factor.values[0])
    sums = np.cumsum(values[::-1]) / values.sum()
    assert each.form == Form("full", 5) and each.captured == 1.0
    assert each.effective_rank == 1 + np.sum(sums < 0.9)


def test_updates_failures_and_ages():
    _, _, state = trained(0, rank=2, diagonal=("w2",))
    before = row(cx.factor_report(state), "['w1']")
    assert (before.captured, before.effective_rank, before.updates, before.age) == (
        None,
        None,
        0,
        None,
    )
    assert cx.factor_report(state).ranks == {"['w1']": (2, 2)}
    _, _, state = trained(5, rank=2, diagonal=("w2",))
    report = cx.factor_report(state)
    assert {(each.path, each.side) for each in report} == {
        ("['w1']", "input"),
        ("['w1']", "output"),
        ("['w2']", "entries"),
    }
    assert {(each.updates, each.failures, each.age) for each in report} == {(2, 0, 1)}
    assert row(report, "['w2']", "entries").form is None
    method = state.optimizer[0]
    block = method.preconditioner["['w1']"]
    failed = block.with_(output=block.output._replace(failures=jnp.asarray([3], jnp.int32)))
    method = method._replace(preconditioner=method.preconditioner | {"['w1']": failed})
    assert row(cx.factor_report(method), "['w1']", "output").failures == 3


def test_the_ranks_are_for_the_next_run():
    objective, params, state = trained(4, rank={"": 4, "w2": None})
    core = jnp.diag(jnp.asarray([1.0, 1e-6, 1e-7, 2.0]))[None]
    report = cx.factor_report(with_input(state, "['w1']", core=core))
    ranks = report.ranks
    assert ranks["['w1']"][0] == 2
    method = cx.methods.kfac(objective, rank=ranks, fisher="exact")
    size = lambda memory: sum(leaf.size for leaf in jax.tree.leaves(memory))
    smaller = method.init(params).preconditioner
    assert smaller["['w1']"].input.factor.core.shape == (1, 2, 2)
    assert size(smaller) < size(state.optimizer[0].preconditioner)
    # What it asks for is what it then has, and no more.
    again = cx.factor_report(method.init(params))
    assert again.ranks == ranks


@pytest.mark.parametrize("name", ["ekfac", "newton_muon"])
def test_other_methods(name):
    _, _, state = trained(2, name)
    report = cx.factor_report(state)
    inputs = row(report, "['w1']")
    assert inputs.updates == 1 and inputs.captured is not None
    outputs = row(report, "['w1']", "output")
    if name == "newton_muon":
        assert outputs.form == Form("none", 5) and outputs.captured is None
        assert report.ranks["['w1']"][1] is None
    else:
        assert outputs.form == Form("full", 5)


def test_table():
    _, _, state = trained(2, rank=2, diagonal=("w2",))
    lines = str(cx.factor_report(state)).splitlines()
    assert lines[0].split() == [
        *("block", "side", "stack", "factor", "captured"),
        *("rank", "for", "0.99", "updates", "failures", "age"),
    ]
    assert lines[2].split()[:6] == ["['w1']", "input", "1", "5", "at", "rank"]
    assert lines[-1].split() == ["['w2']", "entries", "1", "diagonal", "1", "0", "1"]


def test_other_states_and_shares():
    p = problems.problem()
    with pytest.raises(ValueError, match="state: got none of a method with Kronecker factors"):
        cx.factor_report(optax.adam(1e-3).init(p.params))
    with pytest.raises(ValueError, match="state: got none"):
        cx.factor_report(cx.methods.ggn_cg(p.objective).init(p.params))
    with pytest.raises(ValueError, match=r"share: got 0.0, wanted a number in \(0, 1\]"):
        cx.factor_report(None, 0.0)
