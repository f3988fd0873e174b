"""Inverse roots (A + εI)^−e of stacks of positive semidefinite matrices, in exchangeable ways."""

import abc
import fractions
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from curvax._linalg import applied, eigh, frobenius_norm, matmul, shifted, transposed
from curvax._stacks import Groups, finite_each, identities, pick
from curvax.eigenbasis import rayleigh, turned

# Steps of the power iteration that finds the largest eigenvalue for a relative ridge.
POWER_STEPS = 20


class RootState(NamedTuple):
    """An inverse root, and what happened to it.

    `memory` is what the next one starts from; `age` counts the refreshes since the last that
    succeeded, `failures` those whose result was not finite.
    """

    root: Float[Array, "stack n n"]
    memory: Any
    age: Int[Array, " stack"]
    failures: Int[Array, " stack"]


class AbstractInverseRoot(eqx.Module):
    """A way to (A + εI)^−e.

    A subclass has the fields `ridge` and `relative`: ε, and whether its unit is A's largest
    eigenvalue, which makes the root one of A's direction alone.
    """

    ridge: eqx.AbstractVar[ScalarLike]
    relative: eqx.AbstractVar[bool]

    def init(self, stack: int, size: int, dtype: Any) -> Any:
        """What is remembered between the roots of a stack of matrices."""
        del stack, size, dtype
        return ()

    def check(self, exponent: float) -> None:
        """**Raises** `ValueError` for an exponent that it does not have."""
        del exponent

    @abc.abstractmethod
    def compute(
        self,
        matrices: Sequence[Array],
        exponents: Sequence[float],
        memories: Sequence[Any],
        first: bool | Bool[Array, ""],
    ) -> list[tuple[Array, Any]]:
        """Root and memory of each stack. What failed is not finite; `first` says that the memories
        are those of `init`.
        """

    def lift(self, largest: Array) -> Array:
        """ε, given the largest eigenvalue of each matrix."""
        ridge = jnp.asarray(self.ridge, largest.dtype)
        return ridge * largest if self.relative else jnp.full_like(largest, ridge)


class EighRoot(AbstractInverseRoot):
    """By an eigendecomposition. Exact, for any exponent, and slow on accelerators.

    **Arguments:** `ridge`, `relative` as of [`AbstractInverseRoot`][curvax.AbstractInverseRoot].
    """

    ridge: ScalarLike = 1e-6
    relative: bool = eqx.field(static=True, default=True)

    def compute(
        self,
        matrices: Sequence[Array],
        exponents: Sequence[float],
        memories: Sequence[Any],
        first: bool | Bool[Array, ""],
    ) -> list[tuple[Array, Any]]:
        return [
            (_spectral(vectors, values, self.lift, exponent), memory)
            for (values, vectors), exponent, memory in zip(
                eigh(matrices), exponents, memories, strict=True
            )
        ]


class EigenbasisRoot(AbstractInverseRoot):
    """Q (diag(QᵀAQ) + ε)^−e Qᵀ in an eigenbasis Q that is turned by one step of orthogonal
    iteration at each refresh (see [`turned`][curvax.eigenbasis.turned]), for any exponent.

    The first basis is that of an eigendecomposition. Products and two or three Cholesky
    factorisations, about 19 n³ operations for an n × n matrix: the cheapest way, where matrices
    change slowly from one refresh to the next. Between them Q lags behind.

    **Arguments:**

    - `ridge`, `relative`: as of [`AbstractInverseRoot`][curvax.AbstractInverseRoot].
    - `tolerance`: where the off-diagonal part of QᵀAQ has less than this share of its Frobenius
      norm, Q stays, and only the eigenvalues are new (Eschenhagen et al. 2025).
    """

    ridge: ScalarLike = 1e-6
    relative: bool = eqx.field(static=True, default=True)
    tolerance: float | None = eqx.field(static=True, default=None)

    def init(self, stack: int, size: int, dtype: Any) -> Array:
        return identities(stack, size, dtype)

    def compute(
        self,
        matrices: Sequence[Array],
        exponents: Sequence[float],
        memories: Sequence[Any],
        first: bool | Bool[Array, ""],
    ) -> list[tuple[Array, Any]]:
        turns = turned(matrices, memories, first, tolerance=self.tolerance)
        results = []
        for a, turn, exponent in zip(matrices, turns, exponents, strict=True):
            root = _spectral(turn.basis, rayleigh(a, turn.basis), self.lift, exponent)
            results.append((root, turn.basis))
        return results


class _AbstractIterativeRoot(AbstractInverseRoot):
    """By an iteration of products alone, for an exponent 1/p."""

    ridge: ScalarLike = 1e-6
    relative: bool = eqx.field(static=True, default=True)
    rtol: ScalarLike | None = None
    max_steps: int = eqx.field(static=True, default=60)
    # Which p there are; None for all.
    _orders: ClassVar[tuple[int, ...] | None] = None

    def check(self, exponent: float) -> None:
        self._order(exponent)

    def _order(self, exponent: float) -> int:
        """p of an exponent 1/p."""
        p, known = 1 / fractions.Fraction(exponent).limit_denominator(10**6), self._orders
        if p.denominator != 1 or (known is not None and p not in known):
            wanted = "1/p for a whole p" if known is None else " or ".join(f"1/{p}" for p in known)
            name = type(self).__name__
            raise ValueError(f"exponent: got {exponent}, wanted {wanted}, which {name} is for.")
        return int(p)

    def compute(
        self,
        matrices: Sequence[Array],
        exponents: Sequence[float],
        memories: Sequence[Any],
        first: bool | Bool[Array, ""],
    ) -> list[tuple[Array, Any]]:
        results = []
        for a, exponent, memory in zip(matrices, exponents, memories, strict=True):
            lifted = shifted((a + transposed(a)) / 2, self.lift(largest_eigenvalue(a)))
            results.append((self._root(lifted, self._order(exponent)), memory))
        return results

    @abc.abstractmethod
    def _root(self, a: Array, p: int) -> Array:
        """A^(−1/p)."""

    def _converged(
        self,
        step: Callable[[Any], Any],
        begin: Any,
        near_identity: Callable[[Any], Array],
    ) -> Any:
        """Steps until what tends to the identity is there, each matrix for itself; NaN where it
        stays far from it.
        """

        def error(values: Any) -> Array:
            found = near_identity(values)
            return jnp.max(jnp.abs(shifted(found, -jnp.ones_like(found[:, 0, 0]))), axis=(1, 2))

        first = error(begin)
        rtol = 100 * jnp.finfo(first.dtype).eps if self.rtol is None else self.rtol
        rtol = jnp.asarray(rtol, first.dtype)

        def more(carry: Any) -> Array:
            _, _, going, count = carry
            return jnp.any(going) & (count < self.max_steps)

        def again(carry: Any) -> Any:
            values, errors, going, count = carry
            new = step(values)
            now = error(new)
            # Rounding stops it before the tolerance: where it nears the end and gets worse.
            worse = (errors < 0.01) & ~(now < errors)
            taken = going & ~worse
            values = pick(taken, new, values)
            errors = jnp.where(taken, now, errors)
            return values, errors, taken & (errors > rtol), count + 1

        carry = begin, first, jnp.ones(first.shape, bool), jnp.zeros((), jnp.int32)
        values, errors, _, _ = jax.lax.while_loop(more, again, carry)
        nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), values)
        return pick(errors < 0.1, values, nothing)


class CoupledNewtonRoot(_AbstractIterativeRoot):
    """By the coupled Newton iteration for A^(−1/p), p = 1, 2, 3, … (Guo & Higham 2006, equation
    3.4; Anil et al. 2020).

    From X = cI, M = cᵖA, c = ((p + 1)/(2‖A‖))^(1/p): X ← X N, M ← Nᵖ M with N = ((p + 1)I − M)/p,
    until M = I. Products alone: for p = 4 8 n³ operations a step, and about 20 steps for a ridge of
    1e-6.

    **Arguments:**

    - `ridge`, `relative`: as of [`AbstractInverseRoot`][curvax.AbstractInverseRoot]. The largest
      eigenvalue is found by power iteration.
    - `rtol`: how near to I the largest entry of M − I must be; where it is not below 0.1 after
      `max_steps`, the root has failed. None is for 100 rounding errors.
    """

    def _root(self, a: Array, p: int) -> Array:
        start = (p + 1) / (2 * frobenius_norm(a))

        def step(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            x, m = pair
            n = shifted(-m / p, jnp.full_like(m[:, 0, 0], (p + 1) / p))
            return matmul(x, n), matmul(_power(n, p), m)

        eye = identities(a.shape[0], a.shape[1], a.dtype)
        begin = (start ** (1 / p))[:, None, None] * eye, start[:, None, None] * a
        return self._converged(step, begin, lambda pair: pair[1])[0]


class NewtonSchulzRoot(_AbstractIterativeRoot):
    """By the coupled Newton-Schulz iteration for A^(−1/2) (Higham 2008, equation 6.35), and for
    A^(−1/4) by that of the square root which it gives beside.

    From Y = A/‖A‖, Z = I: Y ← Y T, Z ← T Z with T = (3I − Z Y)/2; Y tends to (A/‖A‖)^(1/2), Z to
    its inverse. Products alone: 6 n³ operations a step, and about 25 steps for a ridge of 1e-6, or
    40 for both roots.

    **Arguments:** `ridge`, `relative`, `rtol`, `max_steps` as of
    [`CoupledNewtonRoot`][curvax.CoupledNewtonRoot].
    """

    _orders: ClassVar[tuple[int, ...] | None] = (2, 4)

    def _root(self, a: Array, p: int) -> Array:
        root, inverse = self._roots(a)
        return inverse if p == 2 else self._roots(root)[1]

    def _roots(self, a: Array) -> tuple[Array, Array]:
        """A^(1/2) and A^(−1/2)."""
        norm = frobenius_norm(a)
        three = jnp.full_like(norm, 1.5)

        def step(triple: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            y, z, product = triple
            t = shifted(-product / 2, three)
            y, z = matmul(y, t), matmul(t, z)
            return y, z, matmul(z, y)

        y = a / norm[:, None, None]
        begin = y, identities(a.shape[0], a.shape[1], a.dtype), y
        y, z, _ = self._converged(step, begin, lambda each: each[2])
        scale = jnp.sqrt(norm)[:, None, None]
        return y * scale, z / scale


def first_root(config: AbstractInverseRoot, stack: int, size: int, dtype: Any) -> RootState:
    """The identity, before the first refresh."""
    count = lambda: jnp.zeros((stack,), jnp.int32)
    eye = identities(stack, size, dtype)
    return RootState(eye, config.init(stack, size, dtype), count(), count())


def refreshed(
    config: AbstractInverseRoot,
    matrices: Sequence[Array],
    states: Sequence[RootState],
    exponents: Sequence[float],
    first: bool | Bool[Array, ""],
) -> list[RootState]:
    """The roots anew, those of matrices of equal size and exponent together. Of a matrix whose root
    is not finite the old one stays, and the failure is counted; of one that is zero, too, which is
    none.
    """
    keys = [(a.shape[-1], a.dtype, e) for a, e in zip(matrices, exponents, strict=True)]

    def anew(keys: list[Any], matrices: list[Array], old: list[RootState]) -> list[RootState]:
        memories = [state.memory for state in old]
        done = config.compute(matrices, [exponent for *_, exponent in keys], memories, first)
        results = []
        for a, state, new in zip(matrices, old, done, strict=True):
            ok = finite_each(new)
            empty = jnp.trace(a, axis1=1, axis2=2) == 0
            root, memory = pick(ok & ~empty, new, (state.root, state.memory))
            age = jnp.where(ok & ~empty, 0, state.age + 1)
            failures = state.failures + (~ok & ~empty).astype(jnp.int32)
            results.append(RootState(root, memory, age, failures))
        return results

    return Groups(keys, matrices).map(anew, matrices, states)


def _spectral(
    vectors: Array, values: Array, lift: Callable[[Array], Array], exponent: float
) -> Array:
    """V (values + lift)^−exponent Vᵀ."""
    values = jnp.maximum(values, 0)
    values = values + lift(jnp.max(values, axis=1))[:, None]
    # By themselves, or XLA (jaxlib 0.11.2) makes one kernel of the maximum and the product for a
    # GPU, with so much in each thread that it compiles for many minutes.
    scales = jax.lax.optimization_barrier(values**-exponent)
    return applied("snk,smk->snm", vectors * scales[:, None], vectors)


def largest_eigenvalue(a: Array) -> Float[Array, " stack"]:
    """By power iteration from the column with the largest diagonal entry, which is not orthogonal
    to the eigenvector.
    """
    column = jnp.argmax(jnp.diagonal(a, axis1=1, axis2=2), axis=1)
    start = jnp.take_along_axis(a, column[:, None, None], axis=2)
    unit = lambda v: v / jnp.where((norm := frobenius_norm(v)) > 0, norm, 1)[:, None, None]
    vector = jax.lax.fori_loop(0, POWER_STEPS, lambda _, v: unit(matmul(a, v)), unit(start))
    return frobenius_norm(matmul(a, vector))


def _power(n: Array, p: int) -> Array:
    """nᵖ by squaring."""
    if p == 1:
        return n
    half = _power(n, p // 2)
    square = matmul(half, half)
    return matmul(square, n) if p % 2 else square
