"""Moving averages of factors, their low-rank form and their inverses, and what may go wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from curvax._linalg import cholesky
from curvax._stacks import ATTEMPTS
from curvax.operators.factors import DenseFactor, LowRankFactor, spectra
from curvax.refresh import FactorMemory, first_factor, invert, refresh
from curvax.taps.blocks import Form
from curvax.taps.statistics import Moment

FORMS = {
    "full": Form("full", 5),
    "diagonal": Form("diagonal", 5),
    "sketch": Form("sketch", 5, 2),
    "complete": Form("sketch", 5, 5),
}
STACK = 3
seeds = st.integers(0, 2**31 - 1)
compiled_refresh, compiled_invert = jax.jit(refresh, static_argnums=2), jax.jit(invert)


def psd(seed, size=5, rank=None, scale=1.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((STACK, size, rank or 2 * size)) * scale
    return jnp.asarray(x @ x.swapaxes(1, 2), dtype)


def moment_of(memory: FactorMemory, matrices) -> Moment:
    """What a tap measures of these matrices."""
    factor = memory.factor
    trace = jnp.trace(matrices, axis1=1, axis2=2)
    if isinstance(factor, LowRankFactor):
        return Moment(jnp.matmul(matrices, factor.basis), trace)
    if isinstance(factor, DenseFactor):
        return Moment(matrices, trace)
    return Moment(jnp.diagonal(matrices, axis1=1, axis2=2), trace)


def start(kind, dtype=jnp.float64, seed=0, stack=STACK):
    return first_factor(FORMS[kind], stack, dtype, seed)


def one(memory, matrices, decay=0.9):
    return compiled_refresh([memory], [moment_of(memory, matrices)], decay)[0]


def same(got, wanted):
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


# -- the moving average ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "diagonal", "complete"])
@given(seeds, st.integers(1, 5))
def test_moving_average_is_corrected_for_its_start(kind, seed, steps):
    """A plain mean until 1/t falls below 1 − decay; a basis of all columns loses nothing."""
    memory, expected = start(kind), 0.0
    for t in range(1, steps + 1):
        matrices = psd(seed + t)
        memory = one(memory, matrices, 0.7)
        past = min(0.7, 1 - 1 / t)
        expected = past * expected + (1 - past) * np.asarray(matrices)
    wanted = expected
    if kind == "diagonal":
        wanted = np.stack([np.diag(np.diag(m)) for m in expected])
    np.testing.assert_allclose(memory.factor.matrix(), wanted, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(memory.factor.trace(), np.trace(expected, axis1=1, axis2=2))
    assert memory.updates.tolist() == [steps] * STACK and not memory.failures.any()


@given(seeds, st.integers(1, 4), st.floats(-3, 3))
def test_low_rank_stays_orthonormal_and_keeps_the_trace(seed, steps, exponent):
    memory, trace = start("sketch"), 0.0
    for t in range(1, steps + 1):
        matrices = psd(seed + t, scale=10.0**exponent)
        memory = one(memory, matrices)
        past = min(0.9, 1 - 1 / t)
        trace = past * trace + (1 - past) * np.trace(matrices, axis1=1, axis2=2)
    factor = memory.factor
    gram = jnp.matmul(jnp.swapaxes(factor.basis, 1, 2), factor.basis)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-12)
    np.testing.assert_allclose(factor.trace(), trace, rtol=1e-10)
    values = np.linalg.eigvalsh(factor.matrix())
    assert values.min() >= -1e-12 * values.max()


@given(seeds)
def test_low_rank_finds_a_matrix_of_low_rank_at_once(seed):
    matrices = psd(seed, rank=2)
    memory = one(start("sketch"), matrices)
    np.testing.assert_allclose(memory.factor.matrix(), matrices, rtol=1e-5, atol=1e-7)


@given(seeds)
def test_refreshes_turn_the_basis_to_the_leading_eigenvectors(seed):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((STACK, 5, 5)))[0]
    matrices = jnp.asarray((q * np.asarray([9.0, 4.0, 0.3, 0.2, 0.1])) @ q.swapaxes(1, 2))
    memory = start("sketch")
    for _ in range(8):
        memory = one(memory, matrices, 0.0)
    values = np.linalg.eigvalsh(memory.factor.core)
    np.testing.assert_allclose(values, np.broadcast_to([4.0, 9.0], values.shape), rtol=1e-6)
    np.testing.assert_allclose(memory.factor.tail, np.full(STACK, 0.2), rtol=1e-5)


# -- degenerate moments ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("kind", FORMS)
@given(seeds, st.integers(0, 4), st.sampled_from([1e-30, 1e-12, 1e-4, 1.0, 1e6]))
def test_rank_deficient_moments(kind, dtype, seed, rank, scale):
    """Inputs that are always zero, matrices of any rank, and nothing at all."""
    scale = scale if dtype == jnp.float64 or scale > 1e-20 else 1e-8
    matrices = np.array(psd(seed, rank=rank) * scale if rank else np.zeros((STACK, 5, 5)))
    matrices[:, :2] = matrices[:, :, :2] = 0  # two inputs are always zero
    matrices[1] = 0
    matrices = jnp.asarray(matrices, dtype)
    memory = start(kind, dtype)
    for _ in range(3):
        memory = one(memory, matrices)
    shift = jnp.maximum(0.1 * memory.factor.trace() / 5, jnp.asarray(1e-10, dtype))
    memory = compiled_invert([memory], [shift])[0]
    assert finite(memory)
    assert memory.updates.tolist() == [3] * STACK and not memory.failures.any()
    trace = np.trace(np.asarray(matrices, np.float64), axis1=1, axis2=2)
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-8
    np.testing.assert_allclose(memory.factor.trace(), trace, rtol=tolerance)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", FORMS)
def test_what_is_not_finite_leaves_its_matrix_as_it_was(kind, bad):
    memory = one(start(kind), psd(0))
    memory = compiled_invert([memory], [jnp.full(STACK, 0.1)])[0]
    given = moment_of(memory, psd(1))
    spoiled = Moment(given.product.at[1, 2].set(bad), given.trace.at[1].set(bad))
    good, new = (compiled_refresh([memory], [m], 0.9)[0] for m in (given, spoiled))
    for part in (0, 2):
        cut = lambda tree, part=part: jax.tree.map(lambda leaf: leaf[part], tree)
        same(cut(new), cut(good))
    second = lambda tree: jax.tree.map(lambda leaf: leaf[1], tree)
    same(second(new[:2]), second(memory[:2]))
    assert new.updates.tolist() == [2, 1, 2] and new.failures.tolist() == [0, 1, 0]
    # An inverse that fails keeps the one from before.
    shift = jnp.asarray([0.1, np.nan, 0.1])
    after = compiled_invert([new], [shift])[0]
    same(after.factor, new.factor)
    same(
        jax.tree.map(lambda leaf: leaf[1], after.inverse),
        jax.tree.map(lambda leaf: leaf[1], memory.inverse),
    )
    assert after.failures.tolist() == [0, 2, 0] and finite(after)


# -- inverses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
@given(seeds)
def test_inverses(kind, seed):
    memory = one(start(kind), psd(seed))
    shift = jnp.asarray([0.1, 1.0, 10.0])
    memory = compiled_invert([memory], [shift])[0]
    dense = memory.factor.matrix() + shift[:, None, None] * jnp.eye(5)[None]
    np.testing.assert_allclose(
        memory.damped_inverse.matrix(), np.linalg.inv(dense), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_shift_that_is_not_enough_is_raised(dtype):
    """An indefinite matrix, by less than a thousand times the shift; one by more is refused."""
    low = jnp.asarray([1.0, -0.5, -5e4], dtype)
    values = jnp.stack([jnp.diag(jnp.asarray([1, 2, 3, 4, 0], dtype).at[4].set(v)) for v in low])
    memory = start("full", dtype)._replace(factor=DenseFactor(values))
    shift = jnp.full(STACK, 0.1, dtype)
    after = compiled_invert([memory], [shift])[0]
    for i, raised in [(0, 0.1), (1, 1.0)]:
        expected = np.linalg.inv(np.asarray(values[i]) + raised * np.eye(5))
        np.testing.assert_allclose(after.inverse.values[i], expected, rtol=1e-5, atol=1e-6)
    same(after.inverse.values[2], memory.inverse.values[2])
    assert after.failures.tolist() == [0, 0, 1]
    assert 0.1 * 10**ATTEMPTS < 5e4


# -- many at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf, factorisations", [(1, 2), (64, 1)])
def test_batched_is_one_by_one(leaf, factorisations, monkeypatch):
    monkeypatch.setattr("curvax._linalg._LEAF", leaf)
    kinds = ["full", "sketch", "full", "diagonal", "sketch", "diagonal", "full"]
    stacks = [1, 2, 3, 1, 1, 2, 1]
    numbered = list(enumerate(zip(kinds, stacks, strict=True)))
    memories = [start(k, seed=i, stack=s) for i, (k, s) in numbered]
    moments = [moment_of(memories[i], psd(i)[:s]) for i, (_, s) in numbered]
    shifts = [jnp.full(s, 0.1 + i) for i, s in enumerate(stacks)]
    together = compiled_invert(compiled_refresh(memories, moments, 0.9), shifts)
    for i, memory in enumerate(together):
        alone = compiled_refresh([memories[i]], [moments[i]], 0.9)
        alone = compiled_invert(alone, [shifts[i]])[0]
        assert jax.tree.structure(alone) == jax.tree.structure(memory)
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(memory), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    # Equal forms share one factorisation: on a CPU, elsewhere small ones of all forms.
    closed = jax.make_jaxpr(lambda *args: invert(*args))(together, shifts)
    names = [eqn.primitive.name for eqn in equations(closed.jaxpr)]
    assert names.count("cholesky") == 2 + factorisations


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="LAPACK is of the CPU")
def test_lapack_gets_one_matrix_at_a_time():
    """Batches of LAPACK calls at the same time wait for each other for ever (jaxlib 0.10.2)."""
    factors = [start_at(size).factor for size in (5, 7, 12)]
    work = lambda f: (spectra(f), cholesky([each.values for each in f]))
    text = jax.jit(work).lower(factors).compile().as_text()
    results = re.findall(r"= \(?f64\[(\d+),[^=]*custom_call_target=\"lapack_(\w+)_ffi", text)
    assert {name for _, name in results} == {"dsyevd", "dpotrf", "dtrsm"}
    assert {batch for batch, _ in results} == {"1"}


def start_at(size):
    return first_factor(Form("full", size), STACK, jnp.float64, 0)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_low_rank_forms_nothing_of_n_by_n():
    n, k = 101, 7
    memory = first_factor(Form("sketch", n, k), 2, jnp.float32, 0)
    moment = Moment(jnp.ones((2, n, k), jnp.float32), jnp.ones(2, jnp.float32))

    def run(memory, moment, shift):
        new = invert(refresh([memory], [moment], 0.9), [shift])[0]
        return new, new.damped_inverse.along(jnp.ones((2, n, 3), jnp.float32), 1)

    closed = jax.make_jaxpr(run)(memory, moment, jnp.ones(2, jnp.float32))
    outputs = [v.aval for eqn in equations(closed.jaxpr) for v in eqn.outvars]
    shapes = [getattr(aval, "shape", ()) for aval in outputs]
    assert len(shapes) > 50
    assert not [shape for shape in shapes if shape.count(n) > 1]
