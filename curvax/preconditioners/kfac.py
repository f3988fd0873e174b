"""K-FAC's approximation of the curvature as the preconditioner of an inner solver."""

from collections.abc import Mapping
from typing import NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Scalar, ScalarLike

from curvax import _tree
from curvax._binding import bound_objective
from curvax._checks import check_share
from curvax._masked import is_masked_tree
from curvax.objective import Params
from curvax.operators.factors import AbstractFactor, DenseFactor, DiagonalFactor
from curvax.operators.kfac import BlockOperator, matrix_of
from curvax.operators.kronecker import AbstractBlockMatrix, DampedInverse, Entries, Product
from curvax.plan.moments import BlockMoments, Recipe
from curvax.plan.plan import Observation, Requirement
from curvax.preconditioners.base import AbstractPreconditioner
from curvax.taps.blocks import Block, DiagonalBlock, Form
from curvax.taps.moments import FisherKind
from curvax.taps.statistics import Sharing


class KFACState(NamedTuple):
    """Moving averages of the factors, and the total weight that they have so far."""

    average: BlockOperator
    weight: Array


class KFACPreconditioner(AbstractPreconditioner):
    """(G + γ_G I)⁻¹ ⊗ (A + γ_A I)⁻¹ for each weight, inverted anew with the λ of each step.

    K-FAC (Martens & Grosse 2015) leaves out how weights of different layers, and inputs and
    outputs of one, go together; a few steps of CG, which it preconditions, put that back. Unlike in
    [`kfac`][curvax.methods.kfac.kfac] factors are full, and λ is that of the solver. The l2 term,
    as far as it is not in λ, is left to CG.

    **Arguments:**

    - `fisher`, `samples`, `sharing`, `diagonal`, `fused`: as of
      [`kfac`][curvax.methods.kfac.kfac]. `"mc"` needs a key in every step.
    - `every`: steps between two measurements.
    - `decay`: of the moving averages, corrected for their start.
    - `how`: the damped inverse of a block: `"pi"` or `"per_factor"`, by Cholesky, or `"exact"`, by
      eigendecompositions, as of `KroneckerFactored.inverse`.

    It holds n² + m² numbers for an m × n weight. Each step inverts every factor.

    `init` **raises** `ValueError` without an example in the objective, and under `optax.masked` or
    `optax.partition`; `update` for a batch on which the model has other blocks.
    """

    recipe: Recipe = eqx.field(static=True)
    every: int = eqx.field(static=True)
    decay: ScalarLike
    how: DampedInverse = eqx.field(static=True)

    def __init__(
        self,
        fisher: FisherKind = "mc",
        *,
        samples: int = 1,
        sharing: Sharing = "expand",
        diagonal: tuple[str, ...] = (),
        fused: Mapping[str, int] | None = None,
        every: int = 1,
        decay: ScalarLike = 0.9,
        how: DampedInverse = "pi",
    ):
        check_share("decay", decay)
        if how not in get_args(DampedInverse):
            wanted = ", ".join(map(repr, get_args(DampedInverse)))
            raise ValueError(f"how: got {how!r}, wanted one of {wanted}.")
        self.recipe = Recipe(None, fisher, samples, sharing, diagonal, fused)
        self.every, self.decay, self.how = every, decay, how

    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement(BlockMoments(self.recipe), "preconditioner", self.every),)

    def init(self, params: Params) -> KFACState:
        objective = bound_objective()
        if objective is None or is_masked_tree(params):
            raise ValueError(
                "init: K-FAC as a preconditioner must see the whole model, and got only a part of "
                "it. Mask what comes behind the method: optax.chain(method, optax.masked(…))."
            )
        blocks = self.recipe.blocks(objective, params, objective.inputs)[1]
        leaves = jax.tree.leaves(params)
        dtype = _tree.accumulation_dtype(_tree.common_dtype(params))
        matrices = tuple(_zero(block, leaves[block.leaf].shape, dtype) for block in blocks)
        structure = _tree.freeze(_tree.structure(params))
        return KFACState(BlockOperator(blocks, matrices, structure), jnp.zeros((), dtype))

    def update(self, state: KFACState, observation: Observation) -> KFACState:
        quantity = BlockMoments(self.recipe)
        due = observation.due(quantity)
        if due is False:
            return state
        average = state.average

        def refreshed() -> KFACState:
            moments = observation[quantity]
            wanted = {block.path for block in average.blocks}
            if set(moments) != wanted:
                raise ValueError(
                    "batch: the model uses its parameters otherwise than on the objective's "
                    f"example: blocks {sorted(set(moments) ^ wanted)} are in one but not in the "
                    "other."
                )
            matrices = tuple(
                matrix_of(block, moments[block.path], self.recipe.fisher)
                for block in average.blocks
            )
            fresh = BlockOperator(average.blocks, matrices, average.structure)
            one = jnp.ones_like(state.weight)
            return jax.tree.map(self._average, state, KFACState(fresh, one))

        return refreshed() if due is True else jax.lax.cond(due, refreshed, lambda: state)

    def _average(self, old: Array, new: Array) -> Array:
        past, now = (jnp.asarray(share, old.dtype) for share in (self.decay, 1 - self.decay))
        return past * old + now * new.astype(old.dtype)

    def operator(self, state: KFACState, damping: Scalar) -> BlockOperator:
        weight = jnp.where(state.weight > 0, state.weight, 1)
        mean = jax.tree.map(lambda a: a / weight.astype(a.dtype), state.average)
        return mean.inverse(damping, self.how)


def _zero(block: Block, shape: tuple[int, ...], dtype: jnp.dtype) -> AbstractBlockMatrix:
    if isinstance(block, DiagonalBlock):
        return Entries(jnp.zeros(shape, dtype))

    def factor(form: Form) -> AbstractFactor:
        if form.kind == "full":
            return DenseFactor(jnp.zeros((block.stack, form.size, form.size), dtype))
        return DiagonalFactor(jnp.zeros((block.stack, form.size), dtype))

    return Product(factor(block.output), factor(block.input))
