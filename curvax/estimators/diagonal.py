"""Estimates of the diagonal of the Gauss-Newton matrix from one more backward pass."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from curvax.batch import weigh
from curvax.linearisation import Linearisation
from curvax.objective import Objective, Params
from curvax.operators.metric import sampling_key


def gauss_newton_bartlett(
    objective: Objective, linearisation: Linearisation, key: PRNGKeyArray
) -> Params:
    """ĝ ⊙ ĝ with ĝ = Σ_e √c_e Jₑᵀ∇ℓ(z_e, ŷ_e), ŷ drawn from the model's predictions.

    An unbiased estimate of the diagonal of the Fisher information, and so of the Gauss-Newton
    matrix for a convex loss (Liu et al. 2023, Sophia, section 2.3, where uniform weights make it
    B·ĝ⊙ĝ). The l2 term is added exactly.
    """
    targets = objective.loss.sample(sampling_key(key), linearisation.outputs)
    scores = objective.loss.gradient(linearisation.outputs, targets)
    pulled = linearisation.vjp(weigh(jnp.sqrt(linearisation.coefficients), scores))
    return jax.tree.map(lambda g: jnp.square(g) + jnp.asarray(objective.l2, g.dtype), pulled)
