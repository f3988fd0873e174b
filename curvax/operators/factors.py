"""Factors of a Kronecker product: stacks of positive semidefinite matrices, held in some form.

Every array has one leading axis, the stack. A factor is open to three questions: what it does to a
matrix, what it is when damped and inverted (a factor of the same form), and what its spectrum is.
"""

import abc
from collections.abc import Sequence
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._linalg import applied, applied_to, eigh, inverse, matmul, shifted, transposed

# A symmetric matrix times the columns (axis 1) or the rows (axis 2) of another.
_ALONG = {1: "snm,smp->snp", 2: "snm,spm->spn"}


class Spectrum(eqx.Module):
    """V diag(values) Vᵀ + tail·(I − V Vᵀ), with orthonormal columns in V (stack, n, k ≤ n); None
    is the identity.
    """

    vectors: Float[Array, "stack n k"] | None
    values: Float[Array, "stack k"]
    tail: Float[Array, " stack"]

    @property
    def multiplicity(self) -> int:
        """How often the tail counts."""
        if self.vectors is None:
            return 0
        return self.vectors.shape[1] - self.vectors.shape[2]


class AbstractFactor(eqx.Module):
    """A stack of positive semidefinite n × n matrices."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """n."""

    @abc.abstractmethod
    def along(self, matrices: Float[Array, "stack a b"], axis: int) -> Float[Array, "stack a b"]:
        """The product with each column (axis 1) or each row (axis 2)."""

    @abc.abstractmethod
    def trace(self) -> Float[Array, " stack"]: ...

    def held(self) -> Float[Array, "stack k k"] | None:
        """The matrices that are factorised to invert this; None if there are none."""
        return None

    @abc.abstractmethod
    def inverted(
        self, shift: Float[Array, " stack"], inverse: Float[Array, "stack k k"] | None
    ) -> "AbstractFactor":
        """(F + shift·I)⁻¹, given the inverse of what is `held` plus the shift."""

    def inverse(self, shift: Float[Array, " stack"]) -> "AbstractFactor":
        """(F + shift·I)⁻¹, by Cholesky."""
        return inverses([self], [shift])[0]

    def spectrum(self) -> Spectrum:
        """By an eigendecomposition of the smallest matrix that has it."""
        return spectra([self])[0]

    @abc.abstractmethod
    def spectrum_from(self, eigen: tuple[Array, Array] | None) -> Spectrum:
        """From the eigenvalues and eigenvectors of `held`."""

    def matrix(self) -> Float[Array, "stack n n"]:
        """The dense matrices."""
        eye = jnp.eye(self.size, dtype=self.trace().dtype)
        return self.along(jnp.broadcast_to(eye, (self.trace().shape[0], *eye.shape)), 1)

    def diagonal(self) -> Float[Array, "stack n"]:
        return jnp.diagonal(self.matrix(), axis1=1, axis2=2)

    # What a state keeps of an inverse that shares arrays with the factor it is the inverse of.

    def slim(self) -> "AbstractFactor":
        """Without what it shares with the factor that it is the inverse of."""
        return self

    def beside(self, factor: "AbstractFactor") -> "AbstractFactor":
        """The inverse of `factor` again, from its slim form."""
        del factor
        return self


class DenseFactor(AbstractFactor):
    """Full matrices."""

    values: Float[Array, "stack n n"]

    @property
    def size(self) -> int:
        return self.values.shape[-1]

    def along(self, matrices: Array, axis: int) -> Array:
        columns = matrices.astype(self.values.dtype)
        return applied(_ALONG[axis], self.values, columns)

    def trace(self) -> Array:
        return jnp.trace(self.values, axis1=1, axis2=2)

    def matrix(self) -> Array:
        return self.values

    def held(self) -> Array:
        return self.values

    def inverted(self, shift: Array, inverse: Array | None) -> "DenseFactor":
        assert inverse is not None
        return DenseFactor(inverse)

    def spectrum_from(self, eigen: tuple[Array, Array] | None) -> Spectrum:
        assert eigen is not None
        values, vectors = eigen
        return Spectrum(vectors, jnp.maximum(values, 0), jnp.zeros_like(values[:, 0]))


class LowRankFactor(AbstractFactor):
    """Q M Qᵀ + τ(I − Q Qᵀ): a basis Q with orthonormal columns, a k × k core, one tail."""

    basis: Float[Array, "stack n k"] | None
    core: Float[Array, "stack k k"]
    tail: Float[Array, " stack"]

    @property
    def size(self) -> int:
        assert self.basis is not None
        return self.basis.shape[-2]

    def along(self, matrices: Array, axis: int) -> Array:
        assert self.basis is not None
        matrices = matrices.astype(self.basis.dtype)
        tail = self.tail[:, None, None]
        core = shifted(self.core, -self.tail)
        inside = applied("snk,snp->skp" if axis == 1 else "snk,spn->skp", self.basis, matrices)
        outside = "snk,skp->snp" if axis == 1 else "snk,skp->spn"
        return tail * matrices + applied(outside, self.basis, _product(core, inside))

    def trace(self) -> Array:
        rest = self.size - self.core.shape[-1]
        return jnp.trace(self.core, axis1=1, axis2=2) + rest * self.tail

    def held(self) -> Array:
        return self.core

    def inverted(self, shift: Array, inverse: Array | None) -> "LowRankFactor":
        assert inverse is not None
        return LowRankFactor(self.basis, inverse, 1 / (self.tail + shift))

    def spectrum_from(self, eigen: tuple[Array, Array] | None) -> Spectrum:
        assert self.basis is not None and eigen is not None
        values, vectors = eigen
        return Spectrum(matmul(self.basis, vectors), jnp.maximum(values, 0), self.tail)

    def slim(self) -> "LowRankFactor":
        return LowRankFactor(None, self.core, self.tail)

    def beside(self, factor: AbstractFactor) -> "LowRankFactor":
        assert isinstance(factor, LowRankFactor)
        return LowRankFactor(factor.basis, self.core, self.tail)


class DiagonalFactor(AbstractFactor):
    """Diagonal matrices."""

    entries: Float[Array, "stack n"]

    @property
    def size(self) -> int:
        return self.entries.shape[-1]

    def along(self, matrices: Array, axis: int) -> Array:
        return jnp.expand_dims(self.entries, 3 - axis) * matrices.astype(self.entries.dtype)

    def trace(self) -> Array:
        return jnp.sum(self.entries, axis=-1)

    def diagonal(self) -> Array:
        return self.entries

    def inverted(self, shift: Array, inverse: Array | None) -> "DiagonalFactor":
        del inverse
        damped = self.entries + shift[:, None]
        # As of a Cholesky factorisation: not finite where it is not positive.
        return DiagonalFactor(jnp.where(damped > 0, 1 / damped, jnp.nan))

    def spectrum_from(self, eigen: tuple[Array, Array] | None) -> Spectrum:
        del eigen
        return Spectrum(None, self.entries, jnp.zeros_like(self.entries[:, 0]))


def sandwich(
    output: "AbstractFactor",
    v: Float[Array, "stack a b"],
    input: "AbstractFactor",
    bias: Array | None = None,
    *,
    flipped: bool = False,
) -> tuple[Array, Array | None]:
    """G [V b] A for a stack of matrices V (stack, out, in) and, if the input side counts a bias, of
    columns b (stack, out, 1).

    `flipped` says that V and its result have their last two axes exchanged: whatever way a weight
    lies in memory, nothing is transposed.

    With low-rank factors γI + QDQᵀ and αI + PEPᵀ it is αγV plus one product of thin matrices: V is
    read three times and written once. The bias stays apart, as one column more would leave every
    product without aligned rows.
    """
    out, across = (2, 1) if flipped else (1, 2)
    if not isinstance(output, LowRankFactor) or not isinstance(input, LowRankFactor):
        turn = transposed if flipped else lambda a: a
        whole = v
        if bias is not None:
            whole = jnp.concatenate([v, turn(bias).astype(v.dtype)], axis=across)
        whole = input.along(output.along(whole, out), across)
        if bias is None:
            return whole, None
        weight, column = jnp.split(whole, [v.shape[across]], axis=across)
        return weight, turn(column)
    q, p = output.basis, input.basis
    assert q is not None and p is not None
    seen = "sio" if flipped else "soi"
    v = v.astype(q.dtype)
    last = None
    if bias is not None:
        bias = bias.astype(q.dtype)
        p, last = p[:, :-1], p[:, -1:]
    g, a = (tail[:, None, None] for tail in (output.tail, input.tail))
    inner_g, inner_a = (shifted(side.core, -side.tail) for side in (output, input))
    left, right = applied_to(v, (f"{seen},sok->ski", q), (f"{seen},sil->sol", p))
    # Else XLA makes one product of this and the next, which share p, and copies V for it.
    left, right = jax.lax.optimization_barrier((left, right))
    both = _product(left, p)
    left_bias = None
    if bias is not None and last is not None:
        left_bias = _product(transposed(q), bias)
        right, both = right + bias * last, both + left_bias * last
    tall = jnp.concatenate([a * q, g * right + _product(q, _product(inner_g, both))], axis=2)

    def wide(left: Array, p: Array) -> Array:
        return jnp.concatenate([_product(inner_g, left), _product(inner_a, p)], axis=1)

    whole = (a * g) * v + applied(f"sot,sti->{seen}", tall, wide(left, transposed(p)))
    if bias is None or left_bias is None or last is None:
        return whole, None
    return whole, (a * g) * bias + _product(tall, wide(left_bias, transposed(last)))


def _product(a: Array, b: Array) -> Array:
    return applied("smk,skn->smn", a, b)


def spectra(factors: Sequence[AbstractFactor]) -> list[Spectrum]:
    """The spectrum of each; equal sizes together."""
    held = {i: each for i, factor in enumerate(factors) if (each := factor.held()) is not None}
    eigen = dict(zip(held, eigh(list(held.values())), strict=True))
    return [factor.spectrum_from(eigen.get(i)) for i, factor in enumerate(factors)]


def inverses(factors: Sequence[AbstractFactor], shifts: Sequence[Array]) -> list[AbstractFactor]:
    """(F + shift·I)⁻¹ of each, of the same form; equal sizes together."""
    held = [factor.held() for factor in factors]
    dense = [i for i, each in enumerate(held) if each is not None]
    matrices = [shifted(cast(Array, held[i]), shifts[i]) for i in dense]
    inverted = dict(zip(dense, inverse(matrices), strict=True))
    return [
        factor.inverted(shift, inverted.get(i))
        for i, (factor, shift) in enumerate(zip(factors, shifts, strict=True))
    ]
