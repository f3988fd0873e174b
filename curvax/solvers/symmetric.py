"""Dense solves of small symmetric systems that may be indefinite."""

import functools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from curvax import _tree


class Eigh(lx.AbstractLinearSolver):
    """Solves a dense symmetric system through its eigendecomposition.

    With `spectrum="absolute"` the eigenvalues are replaced by their absolute values, floored at
    `floor` times the largest: the result is then a descent direction also where the operator is
    indefinite (Nocedal & Wright 2006, section 3.4; Dauphin et al. 2014). With `spectrum="as_is"`
    it is the plain solution. For a few thousand unknowns at most: time n³, memory n².
    """

    spectrum: Literal["absolute", "as_is"] = eqx.field(static=True, default="absolute")
    floor: float = eqx.field(static=True, default=1e-6)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]):
        if not lx.is_symmetric(operator):
            raise ValueError(
                f"operator: got a {type(operator).__name__} that is not marked symmetric."
            )
        values, vectors = jnp.linalg.eigh(operator.as_matrix())
        smallest = values[0] if values.size else jnp.zeros((), values.dtype)
        if self.spectrum == "absolute":
            values = jnp.abs(values)
            values = jnp.maximum(values, self.floor * jnp.max(values))
        return values, vectors, smallest

    def compute(
        self, state: tuple[Array, Array, Array], vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        values, vectors, smallest = state
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        inner = product(vectors.T, _tree.ravel(vector, values.dtype)) / values
        solution = _tree.unravel(vector, product(vectors, inner))
        return solution, lx.RESULTS.successful, {"smallest_eigenvalue": smallest}

    def transpose(self, state, options: dict[str, Any]):
        return state, options

    def conj(self, state, options: dict[str, Any]):
        return state, options

    def assume_full_rank(self) -> bool:
        return True
