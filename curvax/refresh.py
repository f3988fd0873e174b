"""Factors as optimizer state: moving averages that are refreshed, inverted, and survive failure.

A refresh computes a new factor and its damped inverse; where either is not finite, the matrix of
the stack that failed stays as it was, and is counted. Factors of equal form are refreshed by one
batched call.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvax._linalg import cholesky, matmul, shifted, transposed
from curvax._stacks import Groups, escalated, finite_each, identities, pick
from curvax.operators.factors import (
    AbstractFactor,
    DenseFactor,
    DiagonalFactor,
    LowRankFactor,
    inverses,
)
from curvax.taps.blocks import Form
from curvax.taps.statistics import Moment


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

    @property
    def resting(self) -> Any:
        """What only refreshes read: a low-rank factor has the basis of its inverse, too."""
        return self.factor if isinstance(self.factor, DenseFactor) else ()


def first_factor(form: Form, stack: int, dtype: Any, seed: int) -> FactorMemory:
    """A zero factor whose inverse is the identity, before the first refresh."""
    count = lambda: jnp.zeros((stack,), jnp.int32)
    if form.kind in ("none", "diagonal"):
        filled = lambda value: DiagonalFactor(jnp.full((stack, form.size), value, dtype))
        # An array of its own for each: a buffer that stands twice in a state cannot be donated.
        factor = filled(1 if form.kind == "none" else 0)
        return FactorMemory(factor, filled(1), count(), count())
    width = form.size if form.kind == "full" else form.rank
    zero, eye = jnp.zeros((stack, width, width), dtype), identities(stack, width, dtype)
    if form.kind == "full":
        return FactorMemory(DenseFactor(zero), DenseFactor(eye), count(), count())
    basis = _first_bases(seed, stack, form.size, form.rank, dtype)
    factor = LowRankFactor(basis, zero, jnp.zeros((stack,), dtype))
    inverse = LowRankFactor(None, eye, jnp.ones((stack,), dtype))
    return FactorMemory(factor, inverse, count(), count())


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _first_bases(
    seed: Int[Array, ""] | int, stack: int, size: int, rank: int, dtype: Any
) -> Float[Array, "stack n k"]:
    """Cosines, with random signs of coordinates (Halko et al. 2011, section 4.6): orthonormal
    without a factorisation. The first sketch turns them towards the range.
    """
    key = jax.random.fold_in(jax.random.key(0), seed)
    signs = jax.random.rademacher(key, (stack, size, 1), dtype)
    columns = jnp.arange(rank)
    # In units of a turn's 4·size-th part, whole turns taken off while they are whole numbers.
    angles = ((2 * jnp.arange(size)[:, None] + 1) * columns[None]) % (4 * size)
    cosines = jnp.cos(angles.astype(dtype) * (math.pi / (2 * size)))
    scale = jnp.where(columns == 0, (1 / size) ** 0.5, (2 / size) ** 0.5).astype(dtype)
    return signs * (scale[None, None] * cosines[None])


def weight_of_past(decay: Any, updates: Int[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """In a moving average that is corrected for its start: min(decay, 1 − 1/t) at the t-th update,
    after t − 1 `updates` (Martens & Grosse 2015, section 5).
    """
    return jnp.minimum(jnp.asarray(decay, dtype), 1 - 1 / (updates + 1).astype(dtype))


def refresh(
    memories: Sequence[FactorMemory], moments: Sequence[Moment], decay: float
) -> list[FactorMemory]:
    """The factors after their moments came in; inverses stay as they are."""

    def all_of(memories: list[FactorMemory], moments: list[Moment]) -> list[Any]:
        pasts = [
            weight_of_past(decay, m.updates, x.trace.dtype) for m, x in _pairs(memories, moments)
        ]
        factors = [memory.factor for memory in memories]
        results = []
        for memory, factor in _pairs(memories, _averaged(factors, moments, pasts)):
            ok = finite_each(factor)
            results.append((pick(ok, factor, memory.factor), ok))
        return results

    return [
        counted(memory._replace(factor=factor), memory.updates + ok.astype(jnp.int32), ok)
        for memory, (factor, ok) in _pairs(memories, _batched(all_of, memories, moments))
    ]


def invert(memories: Sequence[FactorMemory], shifts: Sequence[Array]) -> list[FactorMemory]:
    """The factors with damped inverses anew; a shift that is not enough is raised."""

    def all_of(memories: list[FactorMemory], shifts: list[Array]) -> list[Any]:
        def attempt(more: list[Array]) -> list[AbstractFactor]:
            factors = [memory.factor for memory in memories]
            raised = [shift * times for shift, times in _pairs(shifts, more)]
            return [inverse.slim() for inverse in inverses(factors, raised)]

        done = escalated(attempt, [jnp.ones_like(shift) for shift in shifts])
        return [
            (pick(ok, inverse, memory.inverse), ok)
            for memory, (inverse, ok) in _pairs(memories, done)
        ]

    return [
        counted(memory._replace(inverse=inverse), memory.updates, ok)
        for memory, (inverse, ok) in _pairs(memories, _batched(all_of, memories, shifts))
    ]


def counted(memory: FactorMemory, updates: Array, ok: Array) -> FactorMemory:
    """With that many updates, and one failure more for each matrix that is not ok."""
    return memory._replace(updates=updates, failures=memory.failures + (~ok).astype(jnp.int32))


def _averaged(
    factors: list[AbstractFactor], moments: list[Moment], pasts: list[Array]
) -> list[AbstractFactor]:
    results = list(factors)
    for i, (factor, moment, past) in enumerate(zip(factors, moments, pasts, strict=True)):
        if isinstance(factor, DiagonalFactor):
            past = past[:, None].astype(factor.entries.dtype)
            results[i] = DiagonalFactor(past * factor.entries + (1 - past) * moment.product)
        elif isinstance(factor, DenseFactor):
            past = past[:, None, None].astype(factor.values.dtype)
            mixed = past * factor.values + (1 - past) * moment.product
            results[i] = DenseFactor((mixed + transposed(mixed)) / 2)
    thin = {i: factor for i, factor in enumerate(factors) if isinstance(factor, LowRankFactor)}
    if thin:
        new = _low_rank(list(thin.values()), [moments[i] for i in thin], [pasts[i] for i in thin])
        for i, factor in _pairs(thin, new):
            results[i] = factor
    return results


def _low_rank(
    factors: list[LowRankFactor], moments: list[Moment], pasts: list[Array]
) -> list[LowRankFactor]:
    """One pass of a Nyström approximation of each moving average, in the basis that it has.

    Y = (past·F + (1 − past)·XᵀX) Q needs only the core of F and the sketch of XᵀX; B Bᵀ with
    B = Y (QᵀY)^(−T/2) is the Nyström approximation, and the trace is kept by the tail.
    """
    bases = [cast(Array, factor.basis) for factor in factors]
    sketches, cores, traces, units = [], [], [], []
    for factor, q, moment, past in zip(factors, bases, moments, pasts, strict=True):
        dtype = q.dtype
        past = past.astype(dtype)
        traces.append(past * factor.trace() + (1 - past) * moment.trace)
        wide = past[:, None, None]
        y = wide * matmul(q, factor.core) + (1 - wide) * moment.product.astype(dtype)
        core = matmul(transposed(q), y)
        sketches.append(y)
        cores.append((core + transposed(core)) / 2)
        # A multiple of the identity, of the size of rounding errors, so that inputs that are
        # always zero leave nothing singular.
        unit = jnp.finfo(dtype).eps * q.shape[1] ** 0.5 * jnp.sqrt(jnp.sum(y * y, axis=(1, 2)))
        units.append(jnp.maximum(unit, jnp.finfo(dtype).tiny))

    def attempt(ridges: list[Array]) -> list[LowRankFactor]:
        lifts = [unit * ridge for unit, ridge in _pairs(units, ridges)]
        halves = cholesky([shifted(core, lift) for core, lift in _pairs(cores, lifts)])
        tall = [
            matmul(y + lift[:, None, None] * q, transposed(half))
            for y, lift, q, (_, half) in zip(sketches, lifts, bases, halves, strict=True)
        ]
        results = []
        for (basis, root), trace in _pairs(_orthonormal(tall), traces):
            core = matmul(root, transposed(root))
            rest = max(basis.shape[1] - basis.shape[2], 1)
            tail = (trace - jnp.trace(core, axis1=1, axis2=2)) / rest
            results.append(LowRankFactor(basis, core, jnp.maximum(tail, 0)))
        return results

    ridges = [jnp.full_like(unit, 10.0) for unit in units]
    results = []
    for q, core, trace, (new, _) in zip(
        bases, cores, traces, escalated(attempt, ridges), strict=True
    ):
        # Before anything has come in that has a range, and where something made a factor
        # indefinite: the average in the basis that there is, so that what is wrong fades.
        rest = max(q.shape[1] - q.shape[2], 1)
        tail = (trace - jnp.trace(core, axis1=1, axis2=2)) / rest
        same = LowRankFactor(q, core, jnp.maximum(tail, 0))
        results.append(pick((trace > 0) & finite_each(new), new, same))
    return results


def _orthonormal(stacks: list[Array]) -> list[tuple[Array, Array]]:
    """Orthonormal Q and square R with B = Q R, by Cholesky QR done twice (Yamamoto et al. 2015)."""
    results: list[Any] = [(b, None) for b in stacks]
    for _ in range(2):
        lifted = []
        for q, _ in results:
            gram = matmul(transposed(q), q)
            scale = jnp.trace(gram, axis1=1, axis2=2) * jnp.finfo(gram.dtype).eps
            lifted.append(shifted(gram, scale))
        before, results = results, []
        for (q, r), (lower, half) in _pairs(before, cholesky(lifted)):
            upper = transposed(lower)
            results.append((matmul(q, transposed(half)), upper if r is None else matmul(upper, r)))
    return results


def _batched(
    function: Callable[[list[FactorMemory], list[Any]], list[Any]],
    memories: Sequence[FactorMemory],
    others: Sequence[Any],
) -> list[Any]:
    """`function` on all memories, those of equal form together in one stack. On a mesh its results
    are sent: only what is new.
    """
    if not memories:
        return []
    groups = Groups(map(_form, memories), memories)
    return groups.map(lambda _, *lists: function(*lists), memories, others)


def _form(memory: FactorMemory) -> Hashable:
    leaves, treedef = jax.tree.flatten(memory)
    return treedef, tuple((*leaf.shape[1:], leaf.dtype) for leaf in leaves)


def _pairs(first: Iterable[Any], second: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(first, second, strict=True)
