"""AdaHessian."""

import optax
from jaxtyping import ScalarLike

from curvax._checks import check_positive, check_share
from curvax.damping import AbstractDamping
from curvax.directions import preconditioned
from curvax.objective import Objective
from curvax.plan import HessianCurvature, HutchinsonDiagonal
from curvax.preconditioners import RootMeanSquareDiagonal
from curvax.preconditioners.averaging import Averages, SpatialAverage
from curvax.scalings import AbstractScaling, AsIs
from curvax.transform import Method


def adahessian(
    objective: Objective,
    *,
    every: int = 1,
    samples: int = 1,
    average: Averages | None = None,
    power: ScalarLike = 1.0,
    momentum: ScalarLike = 0.9,
    decay: ScalarLike = 0.999,
    eps: AbstractDamping | ScalarLike = 1e-4,
    scaling: AbstractScaling = AsIs(),
) -> Method:
    """m / (√v ^ power + ε), with m and v the moving averages of the gradient and of the square of
    an estimate of the Hessian's diagonal, both corrected for their start.

    AdaHessian (Yao et al. 2021, Algorithm 1): Adam with the diagonal of the Hessian, estimated by
    Hutchinson's method, in the place of the gradient in its second moment.

    **Arguments:**

    - `objective`: what is minimised.
    - `every`: steps between two estimates; v stays as it is in those between.
    - `samples`: random vectors in an estimate; a product with the Hessian each.
    - `average`: over which entries of a leaf the absolute values of the diagonal are averaged
      before they are squared, as of [`SpatialAverage`][curvax.SpatialAverage]: by default kernels
      of convolutions over their spatial axes, and other leaves not at all. `{"": ()}` averages
      nothing, `{"embed": 8}` blocks of 8 neighbours, `{"head": (-1,)}` rows.
    - `power`: the Hessian power k, in [0, 1].
    - `momentum`: β₁, the decay of m, and `decay`: β₂, that of v.
    - `eps`: ε, which is the damping of this method, and may be a policy; the authors take 1e-4 for
      images and 1e-8 for transformers.
    - `scaling`: of the direction.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`. The learning rates are those of
    a Newton method, 0.15 in the authors' code for images.

    **State:** two copies of the parameters, m and v, in float32 at least. **Cost:** a gradient, and
    in every `every`-th step a product with the Hessian, about two gradients, for each sample.

    **Raises** `ValueError` for arguments out of range; in `update` without `observation` and
    `batch`, without a key, and for an `average` that does not fit its leaf.
    """
    check_share("momentum", momentum)
    check_positive("eps", eps)
    estimate, means = HutchinsonDiagonal(samples), SpatialAverage(average)
    return preconditioned(
        objective,
        RootMeanSquareDiagonal(estimate, every, decay, power, means),
        damping=eps,
        momentum=optax.ema(momentum),
        scaling=scaling,
        curvature=HessianCurvature(),
    )
