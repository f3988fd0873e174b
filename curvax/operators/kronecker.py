"""Block-diagonal curvature whose blocks are Kronecker products.

The block of a weight W (out × in, with its bias as one more input) is G ⊗ A in the order of W's
rows: its product with V is G V A (Martens & Grosse 2015, section 4.2).
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from curvax import _tree
from curvax._linalg import applied, transposed
from curvax._sharding import compiler_sharded
from curvax._stacks import joined, spans
from curvax.objective import Params
from curvax.operators.factors import (
    AbstractFactor,
    Spectrum,
    sandwich,
)
from curvax.taps.blocks import Block, KroneckerBlock

Matrices = Float[Array, "stack out in"]
DampedInverse = Literal["exact", "pi", "per_factor"]


class AbstractBlockMatrix(eqx.Module):
    """A block: a symmetric map of stacks of matrices (or, if diagonal, of a leaf)."""

    @abc.abstractmethod
    def mv(self, v: Array) -> Array: ...

    def apply(
        self, v: Array, bias: Array | None, flipped: bool = False
    ) -> tuple[Array, Array | None]:
        """The product with a weight and its bias, apart; `flipped` as of `sandwich`."""
        turn = transposed if flipped else lambda a: a
        if bias is None:
            return turn(self.mv(turn(v))), None
        whole = self.mv(jnp.concatenate([turn(v), bias.astype(v.dtype)], axis=-1))
        return turn(whole[..., :-1]), whole[..., -1:]

    @abc.abstractmethod
    def inverse(self, damping: Scalar, how: DampedInverse) -> "AbstractBlockMatrix":
        """(B + damping·I)⁻¹, or the approximation of it that `how` names."""

    @abc.abstractmethod
    def power(self, exponent: float, damping: Scalar) -> "AbstractBlockMatrix":
        """(B + damping·I)^exponent, by eigendecomposition."""

    @abc.abstractmethod
    def trace(self) -> Scalar: ...

    @abc.abstractmethod
    def logdet(self, damping: Scalar) -> Scalar:
        """log det(B + damping·I)."""

    @abc.abstractmethod
    def square_norm(self) -> Scalar:
        """‖B‖² (Frobenius)."""


class Product(AbstractBlockMatrix):
    """V ↦ G V A."""

    output: AbstractFactor
    input: AbstractFactor

    def mv(self, v: Matrices) -> Matrices:
        return self.apply(v, None)[0]

    def apply(
        self, v: Array, bias: Array | None, flipped: bool = False
    ) -> tuple[Array, Array | None]:
        dtype = self.output.trace().dtype
        return sandwich(self.output, v.astype(dtype), self.input, bias, flipped=flipped)

    def inverse(self, damping: Scalar, how: DampedInverse) -> AbstractBlockMatrix:
        if how == "exact":
            return self.power(-1.0, damping)
        shifts = tikhonov(damping, self.input, self.output, pi=how == "pi")
        return Product(self.output.inverse(shifts[1]), self.input.inverse(shifts[0]))

    def power(self, exponent: float, damping: Scalar) -> "Rotated":
        return self.spectral().power(exponent, damping)

    def spectral(self) -> "Rotated":
        """The same block in the eigenbasis of its factors."""
        g, a = self.output.spectrum(), self.input.spectrum()
        return Rotated(g.vectors, a.vectors, jnp.einsum("sm,sn->smn", _with_tail(g), _with_tail(a)))

    def trace(self) -> Scalar:
        return jnp.sum(self.input.trace() * self.output.trace())

    def logdet(self, damping: Scalar) -> Scalar:
        return self.spectral().logdet(damping)

    def square_norm(self) -> Scalar:
        norms = [
            jnp.sum(jnp.square(s.values), -1) + s.multiplicity * jnp.square(s.tail)
            for s in (self.input.spectrum(), self.output.spectrum())
        ]
        return jnp.sum(norms[0] * norms[1])


class Rotated(AbstractBlockMatrix):
    """A diagonal in a Kronecker basis: V ↦ U_out (S ∘ (U_outᵀ V U_in)) U_inᵀ.

    Where a basis is not complete, the last row or column of S belongs to all that is orthogonal
    to it. A basis None is the identity.
    """

    output_basis: Float[Array, "stack out k"] | None
    input_basis: Float[Array, "stack size l"] | None
    scales: Float[Array, "stack rows columns"]

    @property
    def _open(self) -> tuple[bool, bool]:
        """Whether each basis leaves something out."""
        first, second = (
            basis is not None and basis.shape[1] > basis.shape[2]
            for basis in (self.output_basis, self.input_basis)
        )
        return first, second

    def mv(self, v: Matrices) -> Matrices:
        dtype = v.dtype
        v = v.astype(self.scales.dtype)
        u, w = self.output_basis, self.input_basis
        rows, columns = (
            side if basis is None else basis.shape[2]
            for side, basis in zip(v.shape[1:], (u, w), strict=True)
        )
        left = _rows(u, v, back=False)
        core = _columns(w, left, back=False)
        open_left, open_right = self._open
        result = self.scales[:, :rows, :columns] * core
        if not open_left and not open_right:
            return _rows(u, _columns(w, result, back=True), back=True).astype(dtype)
        total = jnp.zeros_like(v)
        if open_right:
            # In the output's basis, orthogonal to the input's.
            scale = self.scales[:, :rows, -1:]
            result = result - scale * core
            total = total + _rows(u, scale * left, back=True)
        if open_left:
            right = _columns(w, v, back=False)
            scale = self.scales[:, -1:, :columns]
            result = result - scale * core
            total = total + _columns(w, right * scale, back=True)
        if open_left and open_right:
            scale = self.scales[:, -1:, -1:]
            rest = v - _rows(u, left, back=True)
            rest = rest - _columns(w, _columns(w, rest, back=False), back=True)
            total = total + scale * rest
        return (total + _rows(u, _columns(w, result, back=True), back=True)).astype(dtype)

    def _map(self, function: Any) -> "Rotated":
        return Rotated(self.output_basis, self.input_basis, function(self.scales))

    def inverse(self, damping: Scalar, how: DampedInverse) -> "Rotated":
        del how
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: Scalar) -> "Rotated":
        return self._map(lambda s: jnp.power(s + jnp.asarray(damping, s.dtype), exponent))

    def _counts(self) -> Array:
        """How often each scale counts."""
        sides = []
        bases = self.output_basis, self.input_basis
        for basis, size, is_open in zip(bases, self.scales.shape[1:], self._open, strict=True):
            n, k = (size, size) if basis is None else basis.shape[1:]
            sides.append(jnp.asarray([1.0] * k + [float(n - k)] * is_open, self.scales.dtype))
        return jnp.outer(*sides)

    def trace(self) -> Scalar:
        return jnp.sum(self.scales * self._counts()[None])

    def logdet(self, damping: Scalar) -> Scalar:
        return jnp.sum(
            jnp.log(self.scales + jnp.asarray(damping, self.scales.dtype)) * self._counts()[None]
        )

    def square_norm(self) -> Scalar:
        return jnp.sum(jnp.square(self.scales) * self._counts()[None])


class Entries(AbstractBlockMatrix):
    """A diagonal block, in the shape of its leaf (in a stack of them: with one axis in front)."""

    entries: Array

    def mv(self, v: Array) -> Array:
        return (self.entries * v.astype(self.entries.dtype)).astype(v.dtype)

    def inverse(self, damping: Scalar, how: DampedInverse) -> "Entries":
        del how
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: Scalar) -> "Entries":
        shifted = self.entries + jnp.asarray(damping, self.entries.dtype)
        return Entries(jnp.power(shifted, exponent))

    def trace(self) -> Scalar:
        return jnp.sum(self.entries)

    def logdet(self, damping: Scalar) -> Scalar:
        return jnp.sum(jnp.log(self.entries + jnp.asarray(damping, self.entries.dtype)))

    def square_norm(self) -> Scalar:
        return jnp.sum(jnp.square(self.entries))


def tikhonov(
    damping: Scalar, input: AbstractFactor, output: AbstractFactor, *, pi: bool
) -> tuple[Array, Array]:
    """What to add to the factors A and G so that the product is damped by about λ.

    √λ to each, or with π, the ratio of their mean eigenvalues, π√λ and √λ/π (Martens & Grosse
    2015, section 6.3).
    """
    a, g = input.trace() / input.size, output.trace() / output.size
    root = jnp.sqrt(jnp.asarray(damping, a.dtype))
    ratio = jnp.sqrt(jnp.where((a > 0) & (g > 0), a / jnp.where(g > 0, g, 1), 1))
    ratio = ratio if pi else jnp.ones_like(ratio)
    return root * ratio, root / ratio


def arrange(block: KroneckerBlock, leaves: list[Array]) -> Matrices:
    """The gradient (or any vector) of a block as a stack of matrices, its bias the last column."""
    weight, bias = take_apart(block, leaves)
    return weight if bias is None else jnp.concatenate([weight, bias.astype(weight.dtype)], axis=-1)


def take_apart(block: KroneckerBlock, leaves: list[Array]) -> tuple[Matrices, Array | None]:
    """The weight of a block as (stack, out, in), and its bias as (stack, out, 1)."""
    matrix = block.view.apply(leaves[block.leaf])
    matrix = matrix.reshape(-1, *matrix.shape[-2:])
    if block.bias is None or block.bias_view is None:
        return matrix, None
    bias = block.bias_view.apply(leaves[block.bias])
    return matrix, bias.reshape(*matrix.shape[:2], 1)


def disarrange(block: KroneckerBlock, matrix: Matrices, leaves: list[Array]) -> dict[int, Array]:
    """The leaves of a block from its matrices; what the block does not see is zero."""
    if block.bias is None:
        return put_back(block, matrix, None, leaves)
    return put_back(block, matrix[..., :-1], matrix[..., -1:], leaves)


def put_back(
    block: KroneckerBlock, weight: Matrices, bias: Array | None, leaves: list[Array]
) -> dict[int, Array]:
    """The leaves of a block from its weight and its bias."""
    parts: dict[int, Array] = {}
    if block.bias is not None and block.bias_view is not None and bias is not None:
        struct = _tree.structure(leaves[block.bias])
        shape = jax.eval_shape(block.bias_view.apply, struct).shape
        parts[block.bias] = block.bias_view.transposed(bias.reshape(shape), struct)
    struct = _tree.structure(leaves[block.leaf])
    shape = jax.eval_shape(block.view.apply, struct).shape
    parts[block.leaf] = block.view.transposed(weight.reshape(shape), struct)
    return parts


def apply_blocks(
    groups: Iterable[tuple[Sequence[Block], AbstractBlockMatrix]], vector: Params
) -> Params:
    """The product of a block-diagonal operator with a vector: the matrices of several blocks of
    equal form are one stack.
    """
    blocks, matrices = zip(*groups, strict=True)

    def product(matrices: Sequence[AbstractBlockMatrix], leaves: list[Array]) -> list[Array | None]:
        results: list[Array | None] = [None] * len(leaves)
        for own, matrix in zip(blocks, matrices, strict=True):
            for leaf, part in _products(own, matrix, leaves):
                before = results[leaf]
                part = part.astype(leaves[leaf].dtype)
                results[leaf] = part if before is None else before + part
        return results

    leaves, treedef = jax.tree.flatten(vector)
    return jax.tree.unflatten(treedef, compiler_sharded(product, leaves, matrices, leaves))


def _products(
    blocks: Sequence[Block], matrix: AbstractBlockMatrix, leaves: list[Array]
) -> Iterator[tuple[int, Array]]:
    """The parts of the product that belong to some leaves."""
    if isinstance(matrix, Entries):
        for block, entries in zip(blocks, matrix.entries, strict=True):
            yield block.leaf, Entries(entries).mv(leaves[block.leaf])
        return
    kronecker = cast(Sequence[KroneckerBlock], blocks)
    weights, biases = zip(*(take_apart(block, leaves) for block in kronecker), strict=True)
    # As weights lie in memory: XLA undoes the transpose that their view made.
    flipped = kronecker[0].flipped
    turn = transposed if flipped else lambda a: a
    whole = None if biases[0] is None else joined(biases)
    weight, bias = matrix.apply(turn(joined(weights)), whole, flipped)
    weight = turn(weight)
    for block, span in zip(kronecker, spans(weights), strict=True):
        own = None if bias is None else bias[span]
        yield from put_back(block, weight[span], own, leaves).items()


def _with_tail(spectrum: Spectrum) -> Array:
    if not spectrum.multiplicity:
        return spectrum.values
    return jnp.concatenate([spectrum.values, spectrum.tail[:, None]], axis=1)


def _rows(u: Array | None, v: Array, *, back: bool) -> Array:
    """Uᵀ V, or `back` U V."""
    return v if u is None else applied("smk,skn->smn" if back else "smk,smn->skn", u, v)


def _columns(w: Array | None, v: Array, *, back: bool) -> Array:
    """V W, or `back` V Wᵀ."""
    return v if w is None else applied("skl,snl->skn" if back else "skn,snl->skl", v, w)
