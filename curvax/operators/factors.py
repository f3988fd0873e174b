"""Factors of a Kronecker product: stacks of positive semidefinite matrices, held in some form.

Every array has one leading axis, the stack. A factor is open to three questions: what it does to a
matrix, what it is when damped and inverted (a factor of the same form), and what its spectrum is.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._linalg import matmul


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
    def mv(self, columns: Float[Array, "stack n p"]) -> Float[Array, "stack n p"]:
        """The product with each column."""

    @abc.abstractmethod
    def trace(self) -> Float[Array, " stack"]: ...

    @abc.abstractmethod
    def inverse(self, shift: Float[Array, " stack"]) -> "AbstractFactor":
        """(F + shift·I)⁻¹, by Cholesky."""

    @abc.abstractmethod
    def spectrum(self) -> Spectrum:
        """By an eigendecomposition of the smallest matrix that has it."""

    def matrix(self) -> Float[Array, "stack n n"]:
        """The dense matrices."""
        eye = jnp.eye(self.size, dtype=self.trace().dtype)
        return self.mv(jnp.broadcast_to(eye, (self.trace().shape[0], *eye.shape)))

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

    def mv(self, columns: Array) -> Array:
        return matmul(self.values, columns)

    def trace(self) -> Array:
        return jnp.trace(self.values, axis1=1, axis2=2)

    def matrix(self) -> Array:
        return self.values

    def inverse(self, shift: Array) -> "DenseFactor":
        return DenseFactor(_inverse(_shifted(self.values, shift)))

    def spectrum(self) -> Spectrum:
        values, vectors = jnp.linalg.eigh(self.values)
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

    def mv(self, columns: Array) -> Array:
        assert self.basis is not None
        columns = columns.astype(self.basis.dtype)
        inside = matmul(jnp.swapaxes(self.basis, 1, 2), columns)
        tail = self.tail[:, None, None]
        return tail * columns + matmul(self.basis, matmul(self.core, inside) - tail * inside)

    def trace(self) -> Array:
        rest = self.size - self.core.shape[-1]
        return jnp.trace(self.core, axis1=1, axis2=2) + rest * self.tail

    def inverse(self, shift: Array) -> "LowRankFactor":
        return LowRankFactor(
            self.basis, _inverse(_shifted(self.core, shift)), 1 / (self.tail + shift)
        )

    def spectrum(self) -> Spectrum:
        assert self.basis is not None
        values, vectors = jnp.linalg.eigh(self.core)
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

    def mv(self, columns: Array) -> Array:
        return self.entries[..., None] * columns.astype(self.entries.dtype)

    def trace(self) -> Array:
        return jnp.sum(self.entries, axis=-1)

    def diagonal(self) -> Array:
        return self.entries

    def inverse(self, shift: Array) -> "DiagonalFactor":
        return DiagonalFactor(1 / (self.entries + shift[:, None]))

    def spectrum(self) -> Spectrum:
        return Spectrum(None, self.entries, jnp.zeros_like(self.entries[:, 0]))


def _passes(a: Array, b: Array) -> Array:
    """A product for applying a factor: on a GPU in three passes of bfloat16.

    A basis that is rounded once (TF32) would leave 1/2000 of what should have been projected out,
    which is more than what a large eigenvalue leaves of it when it is inverted.
    """
    if a.dtype != jnp.float32:
        return matmul(a, b)
    passes = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
    return jax.lax.platform_dependent(
        a, b, cuda=lambda a, b: jnp.matmul(a, b, precision=passes), default=matmul
    )


def sandwich(
    output: "AbstractFactor",
    v: Float[Array, "stack out in"],
    input: "AbstractFactor",
    bias: Float[Array, "stack out 1"] | None = None,
) -> tuple[Array, Array | None]:
    """G [V b] A for a stack of matrices V and, if the input side counts a bias, of columns b.

    With low-rank factors γI + QDQᵀ and αI + PEPᵀ it is αγV plus one product of thin matrices: V is
    read three times and written once. The bias stays apart, as one column more would leave every
    product without aligned rows.
    """
    if not isinstance(output, LowRankFactor) or not isinstance(input, LowRankFactor):
        whole = v if bias is None else jnp.concatenate([v, bias.astype(v.dtype)], axis=2)
        whole = jnp.swapaxes(input.mv(jnp.swapaxes(output.mv(whole), 1, 2)), 1, 2)
        return (whole, None) if bias is None else (whole[..., :-1], whole[..., -1:])
    q, p = output.basis, input.basis
    assert q is not None and p is not None
    v = v.astype(q.dtype)
    last = None
    if bias is not None:
        bias = bias.astype(q.dtype)
        p, last = p[:, :-1], p[:, -1:]
    g, a = (tail[:, None, None] for tail in (output.tail, input.tail))
    eye = lambda core: jnp.eye(core.shape[-1], dtype=core.dtype)[None]
    inner_g = output.core - g * eye(output.core)
    inner_a = input.core - a * eye(input.core)
    across = jnp.swapaxes(q, 1, 2)
    left, right = _passes(across, v), _passes(v, p)
    both = matmul(left, p)
    left_bias = None
    if bias is not None and last is not None:
        left_bias = matmul(across, bias)
        right, both = right + bias * last, both + left_bias * last
    tall = jnp.concatenate([a * q, g * right + matmul(q, matmul(inner_g, both))], axis=2)

    def wide(left: Array, p: Array) -> Array:
        return jnp.concatenate([matmul(inner_g, left), matmul(inner_a, p)], axis=1)

    whole = (a * g) * v + _passes(tall, wide(left, jnp.swapaxes(p, 1, 2)))
    if bias is None or left_bias is None or last is None:
        return whole, None
    column = wide(left_bias, jnp.swapaxes(last, 1, 2))
    return whole, (a * g) * bias + matmul(tall, column)


def _shifted(matrices: Array, shift: Array) -> Array:
    eye = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return matrices + shift[:, None, None].astype(matrices.dtype) * eye[None]


def _inverse(matrices: Array) -> Array:
    """Of positive definite matrices, through a triangular inverse: L⁻ᵀ L⁻¹."""
    lower = jnp.linalg.cholesky(matrices)
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    half = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return matmul(jnp.swapaxes(half, 1, 2), half)
