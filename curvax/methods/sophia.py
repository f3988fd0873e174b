"""Sophia, with the two estimates of the diagonal."""

import optax
from jaxtyping import ScalarLike

from curvax._checks import check_share
from curvax.directions import preconditioned
from curvax.objective import Objective
from curvax.plan import BartlettDiagonal, HutchinsonDiagonal
from curvax.preconditioners import ThresholdedDiagonal
from curvax.scalings import Clipped
from curvax.transform import Method


def sophia_g(
    objective: Objective,
    *,
    every: int = 10,
    momentum: ScalarLike = 0.96,
    decay: ScalarLike = 0.99,
    gamma: ScalarLike = 0.05,
    eps: ScalarLike = 1e-12,
    limit: ScalarLike = 1.0,
    debias: bool = False,
) -> Method:
    """clip(m / max(γh, ε), ±limit), with m and h the moving averages of the gradient and of an
    estimate of the Gauss-Newton matrix's diagonal.

    Sophia-G (Liu et al. 2023, Algorithm 3 with Algorithm 2): the diagonal is the
    Gauss-Newton-Bartlett estimate, B times the squares of a gradient for targets that are drawn
    from the model. Both averages start from zero and are not corrected for it.

    **Arguments:**

    - `objective`: what is minimised, with a loss that targets can be drawn from.
    - `every`: k, the steps between two estimates.
    - `momentum`: β₁, the decay of m, and `decay`: β₂, that of h, at each estimate.
    - `gamma`: γ. The larger, the fewer entries are clipped; the authors tune it until 10 to 50 %
      are not, the win rate, which `optax.tree_utils.tree_get(state, "win_rate")` gives.
    - `eps`: ε, and `limit`: to which entries are clipped.
    - `debias`: corrects both averages for their start, as Somax does (Optax only m).

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` (the authors take 0.2) and `optax.scale_by_learning_rate`. No entry
    of an update is larger than `limit` before the learning rate.

    **State:** two copies of the parameters, m and h, in float32 at least, and the win rate.
    **Cost:** a gradient, and in every k-th step one more backward pass.

    **Raises** `ValueError` for arguments out of range; in `update` without `observation` and
    `batch`, and without a key.
    """
    estimate = BartlettDiagonal()
    h = ThresholdedDiagonal(estimate, every, decay, gamma, eps, debias)
    return _clipped(objective, h, momentum, limit)


def sophia_h(
    objective: Objective,
    *,
    every: int = 10,
    samples: int = 1,
    momentum: ScalarLike = 0.96,
    decay: ScalarLike = 0.99,
    gamma: ScalarLike = 0.01,
    eps: ScalarLike = 1e-12,
    limit: ScalarLike = 1.0,
    debias: bool = False,
) -> Method:
    """Sophia with Hutchinson's estimate of the Hessian's diagonal.

    Sophia-H (Liu et al. 2023, Algorithm 3 with Algorithm 1), for any loss. Where the diagonal is
    negative, the step is one of signs.

    **Arguments** as of [`sophia_g`][curvax.methods.sophia.sophia_g], and `samples`: random vectors
    in an estimate.

    **Returns** what [`sophia_g`][curvax.methods.sophia.sophia_g] does.

    **State:** as of [`sophia_g`][curvax.methods.sophia.sophia_g]. **Cost:** a gradient, and in
    every k-th step a product with the Hessian, about two gradients, for each sample.

    **Raises** `ValueError` where [`sophia_g`][curvax.methods.sophia.sophia_g] does.
    """
    estimate = HutchinsonDiagonal(samples)
    h = ThresholdedDiagonal(estimate, every, decay, gamma, eps, debias)
    return _clipped(objective, h, momentum, limit)


def _clipped(
    objective: Objective, h: ThresholdedDiagonal, momentum: ScalarLike, limit: ScalarLike
) -> Method:
    check_share("momentum", momentum)
    m = optax.ema(momentum, debias=h.debias)
    return preconditioned(objective, h, momentum=m, scaling=Clipped(limit))
