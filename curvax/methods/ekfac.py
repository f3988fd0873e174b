"""K-FAC with the eigenvalues corrected: EK-FAC."""

from collections.abc import Mapping

from jaxtyping import ScalarLike

from curvax.blockwise import precondition
from curvax.damping import AbstractDamping, AbstractFactorDamping, RelativeTikhonov
from curvax.factored import EigenPreconditioner
from curvax.objective import Objective
from curvax.plan.moments import Recipe
from curvax.scalings import RMS, AbstractScaling
from curvax.taps.moments import FisherKind
from curvax.taps.statistics import Sharing
from curvax.transform import Method


def ekfac(
    objective: Objective,
    *,
    refresh_every: int = 10,
    fisher: FisherKind = "mc",
    samples: int = 1,
    sharing: Sharing = "expand",
    damping: AbstractDamping | ScalarLike = 1.0,
    split: AbstractFactorDamping = RelativeTikhonov(),
    scaling: AbstractScaling = RMS(),
    decay: float = 0.9,
    diagonal: tuple[str, ...] = (),
    fused: Mapping[str, int] | None = None,
    rows: int | None = 4,
) -> Method:
    """U_G [(U_Gᵀ ∇W U_A) / (S + γ)] U_Aᵀ for each weight W, in the eigenbases of K-FAC's factors.

    EK-FAC (George et al. 2018): where K-FAC takes the products of the eigenvalues of A and G, S
    holds the second moments of the gradient, measured along the same axes (eq. 10). Of all
    matrices with these eigenvectors it is the nearest to the block.

    **Arguments** as of [`kfac`][curvax.methods.kfac.kfac], with these differences:

    - `refresh_every`: factors and their eigenbases are refreshed every so many steps, and S in the
      step after, in the new basis. Between the two S is the old one, turned into the new basis;
      before its first measurement it is the product of the eigenvalues.
    - `fisher`: `"mc"`, `"exact"` or `"empirical"`.
    - `damping`: enters in every step, as γ, not only at a refresh. Under
      [`RelativeTikhonov`][curvax.RelativeTikhonov] γ is λ times the mean of S, under
      [`FactoredTikhonov`][curvax.FactoredTikhonov] it is λ itself: there are no factors to split
      it between.
    - `decay`: of the factors, and of S.

    There is no `rank`: an eigenbasis is the point, so factors are full. There is no `stagger`.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.trace(0.9)` and `optax.scale_by_learning_rate`.

    **State:** of an n × n factor two matrices, the average and its eigenvectors, and S, of the size
    of the weight. **Cost:** between refreshes a gradient and four products with full bases for
    each weight. A refresh takes an eigendecomposition of each factor, about 9 n³ operations and
    slow on accelerators; the step after it one more set of backward passes. On wide layers
    [`kfac`][curvax.methods.kfac.kfac] at low rank is much cheaper.

    **Raises** `ValueError` where [`kfac`][curvax.methods.kfac.kfac] does.
    """
    if fisher == "forward_only":
        raise ValueError("fisher: got 'forward_only', wanted a flavour that sees gradients.")
    recipe = Recipe(None, fisher, samples, sharing, diagonal, fused, rows)
    factors = EigenPreconditioner(recipe, refresh_every, 1, decay, split)
    return precondition(objective, factors, damping=damping, scaling=scaling)
