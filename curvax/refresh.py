"""Factors as optimizer state: moving averages that are refreshed, inverted, and survive failure.

A refresh computes a new factor and its damped inverse; where either is not finite, the matrix of
the stack that failed stays as it was, and is counted. Factors of equal form are refreshed by one
batched call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax import _tree
from curvax._linalg import matmul
from curvax.operators.factors import AbstractFactor, DenseFactor, DiagonalFactor, LowRankFactor
from curvax.taps.blocks import Form
from curvax.taps.statistics import Moment

# Times that a factorisation is tried, each with ten times the ridge of the one before.
ATTEMPTS = 4


class FactorMemory(NamedTuple):
    """A factor's moving average and its damped inverse (slim), with what happened to it.

    `updates` counts successful refreshes, `failures` those whose result was not finite.
    """

    factor: AbstractFactor
    inverse: AbstractFactor
    updates: Int[Array, " stack"]
    failures: Int[Array, " stack"]

    @property
    def damped_inverse(self) -> AbstractFactor:
        return self.inverse.beside(self.factor)


def first_factor(form: Form, stack: int, dtype: Any, seed: int) -> FactorMemory:
    """A zero factor whose inverse is the identity, before the first refresh."""
    count = lambda: jnp.zeros((stack,), jnp.int32)
    if form.kind == "none":
        ones = DiagonalFactor(jnp.ones((stack, form.size), dtype))
        return FactorMemory(ones, ones, count(), count())
    if form.kind == "diagonal":
        return FactorMemory(
            DiagonalFactor(jnp.zeros((stack, form.size), dtype)),
            DiagonalFactor(jnp.ones((stack, form.size), dtype)),
            count(),
            count(),
        )
    width = form.size if form.kind == "full" else form.rank
    zero = jnp.zeros((stack, width, width), dtype)
    eye = zero + jnp.eye(width, dtype=dtype)[None]
    if form.kind == "full":
        return FactorMemory(DenseFactor(zero), DenseFactor(eye), count(), count())
    # A basis to start from: any will do, as the first sketch turns it towards the range.
    key = jax.random.fold_in(jax.random.key(0), seed)
    draw = jax.random.normal(key, (stack, form.size, form.rank), jnp.float32).astype(dtype)
    basis = _orthonormal(draw)
    factor = LowRankFactor(basis, zero, jnp.zeros((stack,), dtype))
    inverse = LowRankFactor(None, eye, jnp.ones((stack,), dtype))
    return FactorMemory(factor, inverse, count(), count())


def weight_of_past(decay: Any, updates: Int[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """In a moving average that is corrected for its start: min(decay, 1 − 1/t) at the t-th update,
    after t − 1 `updates` (Martens & Grosse 2015, section 5).
    """
    return jnp.minimum(jnp.asarray(decay, dtype), 1 - 1 / (updates + 1).astype(dtype))


def refresh(
    memories: Sequence[FactorMemory], moments: Sequence[Moment], decay: float
) -> list[FactorMemory]:
    """The factors after their moments came in; inverses stay as they are."""

    def one(memory: FactorMemory, moment: Moment) -> FactorMemory:
        past = weight_of_past(decay, memory.updates, moment.trace.dtype)
        factor = _averaged(memory.factor, moment, past)
        ok = _finite_each(factor)
        new = memory._replace(factor=_pick(ok, factor, memory.factor))
        return new._replace(
            updates=memory.updates + ok.astype(jnp.int32),
            failures=memory.failures + (~ok).astype(jnp.int32),
        )

    return _batched(one, memories, moments)


def invert(memories: Sequence[FactorMemory], shifts: Sequence[Array]) -> list[FactorMemory]:
    """The factors with damped inverses anew; a shift that is not enough is raised."""

    def one(memory: FactorMemory, shift: Array) -> FactorMemory:
        def attempt(more: Array) -> AbstractFactor:
            return memory.factor.inverse(shift * more).slim()

        inverse, ok = _escalate(attempt, shift.shape[0], shift.dtype, 1.0)
        new = memory._replace(inverse=_pick(ok, inverse, memory.inverse))
        return new._replace(failures=memory.failures + (~ok).astype(jnp.int32))

    return _batched(one, memories, shifts)


def _averaged(factor: AbstractFactor, moment: Moment, past: Array) -> AbstractFactor:
    if isinstance(factor, LowRankFactor):
        return _low_rank(factor, moment, past)
    if isinstance(factor, DiagonalFactor):
        past = past[:, None].astype(factor.entries.dtype)
        return DiagonalFactor(past * factor.entries + (1 - past) * moment.product)
    assert isinstance(factor, DenseFactor)
    past = past[:, None, None].astype(factor.values.dtype)
    mixed = past * factor.values + (1 - past) * moment.product
    return DenseFactor((mixed + jnp.swapaxes(mixed, 1, 2)) / 2)


def _low_rank(factor: LowRankFactor, moment: Moment, past: Array) -> LowRankFactor:
    """One pass of a Nyström approximation of the moving average, in the basis that it has.

    Y = (past·F + (1 − past)·XᵀX) Q needs only the core of F and the sketch of XᵀX; B Bᵀ with
    B = Y (QᵀY)^(−T/2) is the Nyström approximation, and the trace is kept by the tail.
    """
    q = factor.basis
    assert q is not None
    dtype = q.dtype
    past = past.astype(dtype)
    trace = past * factor.trace() + (1 - past) * moment.trace
    wide = past[:, None, None]
    y = wide * matmul(q, factor.core) + (1 - wide) * moment.product.astype(dtype)
    # A multiple of the identity, of the size of rounding errors, so that inputs that are always
    # zero leave nothing singular.
    unit = jnp.finfo(dtype).eps * q.shape[1] ** 0.5 * jnp.sqrt(jnp.sum(y * y, axis=(1, 2)))
    unit = jnp.maximum(unit, jnp.finfo(dtype).tiny)

    def attempt(ridge: Array) -> LowRankFactor:
        lifted = y + (unit * ridge)[:, None, None] * q
        core = matmul(_t(q), lifted)
        b = _right_solve(lifted, jnp.linalg.cholesky((core + _t(core)) / 2))
        basis = _orthonormal(b)
        root = matmul(_t(basis), b)
        core = matmul(root, _t(root))
        rest = max(q.shape[1] - q.shape[2], 1)
        tail = (trace - jnp.trace(core, axis1=1, axis2=2)) / rest
        return LowRankFactor(basis, core, jnp.maximum(tail, 0))

    new, _ = _escalate(attempt, q.shape[0], dtype, 10.0)
    # Nothing has come in yet that has a range: keep the basis.
    return _pick(trace > 0, new, LowRankFactor(q, jnp.zeros_like(factor.core), trace))


def _orthonormal(b: Array) -> Array:
    """An orthonormal basis of the columns, by Cholesky QR done twice (Yamamoto et al. 2015)."""
    for _ in range(2):
        gram = matmul(_t(b), b)
        scale = jnp.trace(gram, axis1=1, axis2=2) * jnp.finfo(b.dtype).eps
        eye = jnp.eye(gram.shape[-1], dtype=b.dtype)
        b = _right_solve(b, jnp.linalg.cholesky(gram + scale[:, None, None] * eye[None]))
    return b


def _right_solve(b: Array, lower: Array) -> Array:
    """B L⁻ᵀ."""
    return jax.lax.linalg.triangular_solve(lower, b, left_side=False, lower=True, transpose_a=True)


def _escalate(
    attempt: Callable[[Array], Any], stack: int, dtype: Any, start: float
) -> tuple[Any, Bool[Array, " stack"]]:
    """`attempt(ridge)`, with a ridge ten times as large for each matrix that came to nothing."""

    def again(carry: Any) -> Any:
        ridge, result, ok, tries = carry
        new = attempt(ridge)
        fine = _finite_each(new)
        result = _pick(fine & ~ok, new, result)
        return jnp.where(fine, ridge, 10 * ridge), result, ok | fine, tries + 1

    ridge = jnp.full((stack,), start, dtype)
    empty = _tree.zeros_like(jax.eval_shape(attempt, ridge))
    begin = (ridge, empty, jnp.zeros((stack,), bool), jnp.zeros((), jnp.int32))
    more = lambda carry: (~jnp.all(carry[2])) & (carry[3] < ATTEMPTS)
    _, result, ok, _ = jax.lax.while_loop(more, again, begin)
    return _pick(ok, result, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), result)), ok


def _finite_each(tree: Any) -> Bool[Array, " stack"]:
    """For each matrix of a stack, whether all of it is finite."""
    checks = [
        jnp.all(jnp.isfinite(leaf.reshape(leaf.shape[0], -1)), axis=1)
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.all(jnp.stack(checks), axis=0)


def _pick(ok: Bool[Array, " stack"], new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda a, b: jnp.where(ok.reshape(ok.shape + (1,) * (a.ndim - 1)), a, b), new, old
    )


def _batched(function: Any, memories: Sequence[FactorMemory], others: Sequence[Any]) -> list[Any]:
    """`function` on all memories, those of equal form together in one stack."""
    groups: dict[Any, list[int]] = {}
    for i, memory in enumerate(memories):
        shapes = tuple((*leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(memory))
        groups.setdefault((jax.tree.structure(memory), shapes), []).append(i)
    results: list[Any] = [None] * len(memories)
    for members in groups.values():
        join = lambda *parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        stacked = jax.tree.map(join, *(memories[i] for i in members))
        other = jax.tree.map(join, *(others[i] for i in members))
        done = function(stacked, other)
        start = 0
        for i in members:
            stack = memories[i].updates.shape[0]
            cut = lambda leaf, a=start, b=start + stack: leaf[a:b]
            results[i] = jax.tree.map(cut, done) if len(members) > 1 else done
            start += stack
    return results


def _t(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)
