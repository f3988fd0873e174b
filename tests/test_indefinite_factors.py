"""A factor that something made indefinite: its block stays as it was, and comes back by itself."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.operators.factors import DenseFactor, DiagonalFactor, LowRankFactor
from curvax.refresh import first_factor, invert
from curvax.taps.blocks import Form

BAD, EVERY, DECAY = 1, 2, 0.5


def memories(state):
    return optax.tree_utils.tree_get(state, "preconditioner")


def setup(rank):
    """Three layers of one shape, which are one stack."""
    model = eqx.nn.MLP(40, 40, 40, 2, key=jax.random.key(0), dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(1), (32, 40))
    batch = (x, jnp.argmax(x, axis=1))
    objective = cx.Objective(lambda m, x: m(x), cx.SoftmaxCrossEntropy(), example=batch)
    method = cx.methods.kfac(
        objective, rank=rank, refresh_every=EVERY, decay=DECAY, fisher="empirical"
    )
    optimizer = optax.chain(method, optax.scale_by_learning_rate(1e-3))
    step = cx.make_step(optimizer, method)
    state = step.init(model)
    for _ in range(3 * EVERY):
        model, state, _ = step(model, state, batch)
    return model, state, batch, step


def spoiled(state, times):
    """With the input factor of one matrix turned into −times its mean eigenvalue."""

    def visit(node):
        if not isinstance(node, cx.SecondOrderState):
            return node
        ((name, memory),) = node.preconditioner.items()
        factor = memory.input.factor
        level = -times * factor.trace()[BAD] / factor.size
        if isinstance(factor, DenseFactor):
            bad = DenseFactor(factor.values.at[BAD].set(level * jnp.eye(factor.size)))
        else:
            core = factor.core.at[BAD].set(level * jnp.eye(factor.core.shape[1]))
            bad = LowRankFactor(factor.basis, core, factor.tail.at[BAD].set(level))
        spoiled = memory.with_(input=memory.input._replace(factor=bad))
        return node._replace(preconditioner={name: spoiled})

    return jax.tree.map(visit, state, is_leaf=lambda node: isinstance(node, cx.SecondOrderState))


@pytest.mark.parametrize("rank", [None, 4])
def test_indefinite_factor(rank):
    model, state, batch, step = setup(rank)
    times = 20.0
    state = spoiled(state, times)
    ((_, before),) = memories(state).items()
    # −times·mean fades by DECAY a refresh, and the mean comes back; then a raised shift suffices.
    bound = math.ceil(math.log(1 + 2 * times) / math.log(1 / DECAY)) + 1
    failed = 0
    for _ in range(bound):
        for _ in range(EVERY):
            model, state, info = step(model, state, batch)
            assert bool(info.finite)
        ((_, now),) = memories(state).items()
        assert all(
            np.all(np.isfinite(leaf))
            for leaf in jax.tree.leaves((eqx.filter(model, eqx.is_array), now))
        )
        if now.input.failures[BAD] == failed:
            break
        failed += 1
        assert now.input.failures.tolist() == [0, failed, 0]
        jax.tree.map(
            lambda new, old: np.testing.assert_array_equal(new[BAD], old[BAD]),
            now.input.inverse,
            before.input.inverse,
        )
        assert f"{failed}" in str(cx.factor_report(state))
    assert 1 <= failed < bound
    # From here on it is as good as the others.
    for _ in range(4 * EVERY):
        model, state, _ = step(model, state, batch)
    ((_, after),) = memories(state).items()
    assert after.input.failures.tolist() == [0, failed, 0]
    assert np.all(np.linalg.eigvalsh(after.input.damped_inverse.matrix()) > 0)
    assert not np.array_equal(
        jax.tree.leaves(after.input.inverse)[0][BAD], jax.tree.leaves(before.input.inverse)[0][BAD]
    )


def test_negative_entries_of_a_diagonal():
    """As the factorisation of a matrix: a shift is raised so far, then the old inverse stays."""
    memory = first_factor(Form("diagonal", 2), 3, jnp.float64, 0)
    entries = jnp.asarray([[1.0, 2.0], [1.0, -0.5], [1.0, -1e6]])
    after = invert([memory._replace(factor=DiagonalFactor(entries))], [jnp.full(3, 0.1)])[0]
    wanted = [[1 / 1.1, 1 / 2.1], [1 / 2, 1 / 0.5], [1, 1]]
    np.testing.assert_allclose(after.inverse.entries, wanted)
    assert after.failures.tolist() == [0, 0, 1]
