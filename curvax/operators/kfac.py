"""K-FAC approximations of an objective's curvature as operators on their own."""

import functools
from collections.abc import Mapping
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar, ScalarLike

from curvax import _tree
from curvax._checks import check_count
from curvax.batch import Batch
from curvax.objective import Objective, Params
from curvax.operators.base import AbstractSymmetricOperator, check_structure
from curvax.operators.factors import AbstractFactor, DenseFactor, DiagonalFactor
from curvax.operators.kronecker import (
    AbstractBlockMatrix,
    DampedInverse,
    Entries,
    Product,
    Rotated,
    apply_blocks,
)
from curvax.plan.moments import BlockMoments, Recipe, moments_of
from curvax.refresh import FactorMemory, first_factor, refresh
from curvax.taps.blocks import Block, DiagonalBlock, Form, KroneckerBlock
from curvax.taps.moments import FisherKind
from curvax.taps.statistics import Moment, Sharing
from curvax.taps.wishes import Ranks


class AbstractBlockOperator(AbstractSymmetricOperator):
    """A positive semidefinite operator over the parameters, one block for each weight.

    Everything below acts block by block, and is exact for the operator itself (unless it says
    otherwise); what the operator leaves out of the true curvature is another matter. No matrix of
    the size of a block is formed.
    """

    blocks: eqx.AbstractVar[tuple[Block, ...]]
    matrices: eqx.AbstractVar[tuple[AbstractBlockMatrix, ...]]
    structure: eqx.AbstractVar[Any]

    @property
    def positive_semidefinite(self) -> bool:
        return True

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return _tree.thaw(self.structure)

    def mv(self, vector: Params) -> Params:
        check_structure("vector", vector, self.in_structure())
        stacks = (Entries(m.entries[None]) if isinstance(m, Entries) else m for m in self.matrices)
        alone = ((block,) for block in self.blocks)
        return apply_blocks(zip(alone, stacks, strict=True), vector)

    def inverse(self, damping: ScalarLike = 0.0, how: DampedInverse = "exact") -> "BlockOperator":
        """(B + damping·I)⁻¹, for instance as a preconditioner of [`CG`][curvax.CG].

        `how`: `"exact"`, by an eigendecomposition of each factor; `"pi"`, with a share of the
        damping in each factor before it is inverted (Martens & Grosse 2015, section 6.3), by
        Cholesky; `"per_factor"`, the same with √damping in each.
        """
        if how not in get_args(DampedInverse):
            wanted = ", ".join(map(repr, get_args(DampedInverse)))
            raise ValueError(f"how: got {how!r}, wanted one of {wanted}.")
        damping = jnp.asarray(damping)
        return self._map(lambda matrix: matrix.inverse(damping, how))

    def sqrt(self, damping: ScalarLike = 0.0) -> "BlockOperator":
        """The symmetric square root of B + damping·I."""
        return self._map(lambda matrix: matrix.power(0.5, jnp.asarray(damping)))

    def inverse_sqrt(self, damping: ScalarLike = 0.0) -> "BlockOperator":
        """(B + damping·I)^(−1/2): of white noise it makes samples with covariance the inverse."""
        return self._map(lambda matrix: matrix.power(-0.5, jnp.asarray(damping)))

    def trace(self) -> Scalar:
        """tr B."""
        return self._sum(lambda matrix: matrix.trace())

    def logdet(self, damping: ScalarLike = 0.0) -> Scalar:
        """log det(B + damping·I)."""
        damping = jnp.asarray(damping)
        return self._sum(lambda matrix: matrix.logdet(damping))

    def frobenius_norm(self) -> Scalar:
        """‖B‖ = √(Σ of the squared entries)."""
        return jnp.sqrt(self._sum(lambda matrix: matrix.square_norm()))

    def _sum(self, function: Any) -> Scalar:
        terms = [function(matrix) for matrix in self.matrices]
        dtype = _tree.common_dtype(terms)
        return functools.reduce(jnp.add, [term.astype(dtype) for term in terms])

    def _map(self, function: Any) -> "BlockOperator":
        matrices = tuple(function(matrix) for matrix in self.matrices)
        return BlockOperator(self.blocks, matrices, self.structure)


class BlockOperator(AbstractBlockOperator):
    """A function of another block operator."""

    blocks: tuple[Block, ...] = eqx.field(static=True)
    matrices: tuple[AbstractBlockMatrix, ...]
    structure: Any = eqx.field(static=True)


class KroneckerFactored(AbstractBlockOperator):
    """K-FAC's approximation of the Gauss-Newton or Fisher matrix: G ⊗ A for each weight with its
    bias, a diagonal for every other leaf (Martens & Grosse 2015; Grosse & Martens 2016 for
    convolutions; Eschenhagen et al. 2023 for shared weights). The l2 term is left out.

    **Arguments:**

    - `objective`: what is minimised; it needs no `example` here.
    - `model`: the model, or its trained part.
    - `batch`: where the curvature lives.
    - `key`: for `fisher="mc"`, and for stochastic objectives.
    - `fisher`: `"exact"` (the Gauss-Newton matrix: a backward pass for each output), `"mc"`
      (`samples` targets drawn for each event), `"empirical"` (the targets of the batch), or
      `"forward_only"` (G = I).
    - `samples`: of `"mc"`.
    - `sharing`: `"expand"` or `"reduce"` over positions that share a weight.
    - `diagonal`: parts of the paths of leaves that are to have a diagonal block.
    - `fused`: for weights that are several in one, by a part of their path, of how many equal parts
      their outputs consist; each has a block of its own.

    It holds the factors, n² + m² numbers for an m × n weight. No layer is tagged or wrapped:
    [`sites`][curvax.sites] shows what was found. **Raises** `ValueError` as the objective does for
    a batch that does not fit, for `fisher="mc"` without a key and for an unknown flavour.
    """

    blocks: tuple[Block, ...] = eqx.field(static=True)
    matrices: tuple[AbstractBlockMatrix, ...]
    structure: Any = eqx.field(static=True)

    def __init__(
        self,
        objective: Objective,
        model: PyTree[Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        fisher: FisherKind = "exact",
        samples: int = 1,
        sharing: Sharing = "expand",
        diagonal: tuple[str, ...] = (),
        fused: Mapping[str, int] | None = None,
    ):
        recipe = _recipe(key, None, fisher, samples, sharing, diagonal, fused)
        params, objective = objective.bind(model)
        self.blocks, moments = moments_of(objective, params, batch, key, BlockMoments(recipe))
        self.matrices = tuple(
            matrix_of(block, moments[block.path], fisher) for block in self.blocks
        )
        self.structure = _tree.freeze(_tree.structure(params))


class EigenvalueCorrected(AbstractBlockOperator):
    """EK-FAC: the second moments of the gradient in the eigenbasis of K-FAC's factors (George et
    al. 2018). Of all operators with that eigenbasis the nearest to the block, in Frobenius norm.

    **Arguments** as of [`KroneckerFactored`][curvax.KroneckerFactored], but for
    `fisher="forward_only"`, which **raises** `ValueError`. Positions that share a weight are taken
    as independent (`"expand"`) or as one (`"reduce"`): gradients of the size of a weight are formed
    for no example. Two passes over the batch and an eigendecomposition of each factor; it holds
    n² + m² + mn numbers for an m × n weight.
    """

    blocks: tuple[Block, ...] = eqx.field(static=True)
    matrices: tuple[AbstractBlockMatrix, ...]
    structure: Any = eqx.field(static=True)

    def __init__(
        self,
        objective: Objective,
        model: PyTree[Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        fisher: FisherKind = "exact",
        samples: int = 1,
        sharing: Sharing = "expand",
        diagonal: tuple[str, ...] = (),
        fused: Mapping[str, int] | None = None,
    ):
        if fisher == "forward_only":
            raise ValueError("fisher: got 'forward_only', wanted a flavour that sees gradients.")
        factored = KroneckerFactored(
            objective,
            model,
            batch,
            key,
            fisher=fisher,
            samples=samples,
            sharing=sharing,
            diagonal=diagonal,
            fused=fused,
        )
        recipe = _recipe(key, None, fisher, samples, sharing, diagonal, fused)
        params, objective = objective.bind(model)
        spectral = {
            block.path: matrix.spectral()
            for block, matrix in zip(factored.blocks, factored.matrices, strict=True)
            if isinstance(matrix, Product)
        }
        bases = {
            path: (None, None, (rotated.input_basis, rotated.output_basis))
            for path, rotated in spectral.items()
        }
        quantity = BlockMoments(recipe, rotated=True)
        _, moments = moments_of(objective, params, batch, key, quantity, lambda _: bases)
        corrected = {
            path: Rotated(rotated.output_basis, rotated.input_basis, moments[path].rotated)
            for path, rotated in spectral.items()
        }
        self.blocks = factored.blocks
        self.matrices = tuple(
            corrected.get(block.path, matrix)
            for block, matrix in zip(factored.blocks, factored.matrices, strict=True)
        )
        self.structure = factored.structure


class LowRankKronecker(AbstractBlockOperator):
    """K-FAC with factors Q M Qᵀ + τ(I − QQᵀ) of `rank` columns, each with the trace of the full
    factor; nothing n × n is formed.

    **Arguments** as of [`KroneckerFactored`][curvax.KroneckerFactored], and

    - `rank`: a share of a factor's size, a number of columns, or a mapping to these from parts of
      paths; small sides are full all the same (see [`kfac`][curvax.methods.kfac.kfac]).
    - `passes`: over the batch, each a step of subspace iteration from a random basis (Halko et al.
      2011), by a Nyström approximation (Tropp et al. 2017).

    It holds nk + k² numbers for a side of n at rank k. **Raises** `ValueError` also for a rank or
    a number of passes out of range.
    """

    blocks: tuple[Block, ...] = eqx.field(static=True)
    matrices: tuple[AbstractBlockMatrix, ...]
    structure: Any = eqx.field(static=True)

    def __init__(
        self,
        objective: Objective,
        model: PyTree[Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        rank: Ranks = 0.15,
        passes: int = 3,
        fisher: FisherKind = "exact",
        samples: int = 1,
        sharing: Sharing = "expand",
        diagonal: tuple[str, ...] = (),
        fused: Mapping[str, int] | None = None,
    ):
        check_count("passes", passes)
        recipe = _recipe(key, rank, fisher, samples, sharing, diagonal, fused)
        params, objective = objective.bind(model)
        objective.check(params, batch, key)
        self.blocks = recipe.blocks(objective, params, objective.example(batch).x)[1]
        memories: dict[tuple[str, str], FactorMemory] = {}
        dtype = _tree.accumulation_dtype(_tree.common_dtype(params))
        for seed, block in enumerate(self.blocks):
            if isinstance(block, KroneckerBlock):
                for i, (side, form) in enumerate(_forms(block)):
                    memory = first_factor(form, block.stack, dtype, 2 * seed + i)
                    memories[block.path, side] = memory
        moments: Any = {}
        for _ in range(passes):
            held = {name: getattr(m.factor, "basis", None) for name, m in memories.items()}
            bases = {path: (held[path, "input"], held[path, "output"]) for path, _ in held}
            _, moments = moments_of(
                objective, params, batch, key, BlockMoments(recipe), lambda _, b=bases: b
            )
            measured = {name: getattr(moments[name[0]], name[1]) for name in memories}
            measured = {name: moment for name, moment in measured.items() if moment is not None}
            # A decay of zero: each pass forgets the one before, but for the basis.
            old = [memories[name] for name in measured]
            updated = refresh(old, list(measured.values()), 0.0)
            memories |= dict(zip(measured, updated, strict=True))
        matrices = []
        for block in self.blocks:
            if isinstance(block, DiagonalBlock):
                matrices.append(Entries(moments[block.path]))
                continue
            input, output = (memories[block.path, side].factor for side, _ in _forms(block))
            matrices.append(Product(output, input))
        self.matrices = tuple(matrices)
        self.structure = _tree.freeze(_tree.structure(params))


def _recipe(key: PRNGKeyArray | None, rank: Ranks, fisher: Any, *rest: Any) -> Recipe:
    recipe = Recipe(rank, fisher, *rest)
    if fisher == "mc" and key is None:
        raise ValueError("key: got None, but fisher='mc' draws targets: pass a key.")
    return recipe


def _forms(block: KroneckerBlock) -> tuple[tuple[str, Form], tuple[str, Form]]:
    return ("input", block.input), ("output", block.output)


def matrix_of(block: Block, moments: Any, fisher: FisherKind) -> AbstractBlockMatrix:
    """The matrix of a block from its moments."""
    if isinstance(block, DiagonalBlock):
        ones = fisher == "forward_only"
        return Entries(jnp.ones_like(moments) if ones else moments)
    input = _factor(moments.input)
    if moments.output is None:
        return Product(_identity(block.output.size, input.trace()), input)
    return Product(_factor(moments.output), input)


def _factor(moment: Moment) -> AbstractFactor:
    if moment.product.ndim == 2:
        return DiagonalFactor(moment.product)
    return DenseFactor((moment.product + jnp.swapaxes(moment.product, 1, 2)) / 2)


def _identity(size: int, like: Array) -> DiagonalFactor:
    return DiagonalFactor(jnp.ones((*like.shape, size), like.dtype))
