"""A model's outputs on a batch, linearised in the parameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from curvax import _tree
from curvax._masked import Embedded, keep_unmasked
from curvax._sharding import sharded_as


class Linearisation(eqx.Module):
    """The model's outputs on a batch, linearised in the parameters.

    `tangent` is the linear map Δθ ↦ JΔθ with its residuals stored, so that products with J and
    Jᵀ cost no further forward pass. `coefficients` holds the weight of each event in the
    objective (1/N for a plain mean over N events), with the shape of the loss's values or ().
    """

    params: PyTree[Any]
    outputs: Float[Array, "batch ..."]
    targets: PyTree[Array]
    coefficients: Float[Array, "..."]
    tangent: Callable[[PyTree[Any]], Array]

    def jvp(self, vector: PyTree[Any]) -> Array:
        """J v, of the shape of the outputs."""
        return self.tangent(vector)

    def vjp(self, cotangent: Array) -> PyTree[Any]:
        """Jᵀ u, of the structure of the parameters."""
        transpose = jax.linear_transpose(self.tangent, _tree.structure(self.params))
        return transpose(sharded_as(cotangent.astype(self.outputs.dtype), self.outputs))[0]

    def restrict(self, template: PyTree[Any]) -> "Linearisation":
        """The linearisation in only those parameters that `template` does not mask."""
        kept = keep_unmasked(template, self.params)
        tangent = Embedded(self.tangent, _tree.structure(self.params))
        return Linearisation(kept, self.outputs, self.targets, self.coefficients, tangent)
