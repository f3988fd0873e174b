"""The natural gradient in the space of the batch's rows, and its momentum."""

from typing import Literal

import lineax as lx
from jaxtyping import ScalarLike

from curvax._checks import check_share
from curvax.damping import AbstractDamping
from curvax.directions import second_order
from curvax.objective import Objective
from curvax.plan import FisherCurvature
from curvax.solvers import RowSpace
from curvax.transform import Method

Fisher = Literal["exact", "mc", "empirical"]


def minsr(
    objective: Objective,
    *,
    fisher: Fisher = "exact",
    samples: int = 1,
    damping: AbstractDamping | ScalarLike = 1e-3,
    solver: lx.AbstractLinearSolver = RowSpace(),
) -> Method:
    """(F + λI)⁻¹ g = Oᵀ(OOᵀ + λI)⁻¹ ε, with one row of O for each output or score of the batch.

    Minimum-step stochastic reconfiguration (Chen & Heyl 2023): of all steps that do as well on the
    batch the shortest, as λ goes to zero. F = OᵀO is the Fisher matrix of the batch and g = Oᵀε its
    gradient. In the authors' variational Monte Carlo O is centred, which is a model's own affair
    (predict the logarithm of a normalised amplitude); the pseudo-inverse is damped here.

    **Arguments:** `objective`; `fisher`, `samples` and `damping` as of
    [`natural_gradient`][curvax.methods.natural_gradient.natural_gradient]; `solver`: for very many
    rows `RowSpace(inner=CG(...))` needs no Gram matrix.

    **Returns** an Optax transformation that keeps the sign of the gradient.

    **State:** none of the size of the parameters. **Cost:** as of [`egn`][curvax.methods.egn.egn],
    whose policy of damping and choice of curvature are others; with a Fisher of scores one row for
    each event and sample.

    **Raises** `ValueError` where
    [`natural_gradient`][curvax.methods.natural_gradient.natural_gradient] does.
    """
    curvature = FisherCurvature(fisher, samples)
    return second_order(objective, curvature=curvature, solver=solver, damping=damping)


def spring(
    objective: Objective,
    *,
    momentum: float = 0.99,
    fisher: Fisher = "exact",
    samples: int = 1,
    damping: AbstractDamping | ScalarLike = 1e-3,
    solver: lx.AbstractLinearSolver = RowSpace(),
) -> Method:
    """φ = μφ₋₁ + Oᵀ(OOᵀ + λI)⁻¹ (ε − μOφ₋₁): MinSR that keeps what former batches said.

    Subsampled projected-increment natural gradient descent (Goldshlager, Abrahamsen & Lin 2024):
    φ minimises ‖Oφ − ε‖² + λ‖φ − μφ₋₁‖², a regularised randomised Kaczmarz step from the last
    direction. Along what the batch does not see it goes on as before; with μ = 0 it is
    [`minsr`][curvax.methods.spring.minsr].

    The paper's bound C on the length of a step of learning rate η, min(η, √C/‖φ‖)·φ, is Optax's,
    behind the learning rate: `optax.chain(spring(...), optax.scale_by_learning_rate(eta),
    optax.clip_by_global_norm(C**0.5))`. The paper has C = 0.001, and lets η fall as 1/t. As there,
    φ₋₁ is the direction before both.

    **Arguments:** `momentum`: μ in [0, 1); the others as of
    [`minsr`][curvax.methods.spring.minsr].

    **Returns** an Optax transformation that keeps the sign of the gradient.

    **State:** one copy of the parameters, φ₋₁. **Cost:** that of
    [`minsr`][curvax.methods.spring.minsr] and one product with O.

    **Raises** `ValueError` for a momentum outside of [0, 1), and where
    [`minsr`][curvax.methods.spring.minsr] does.
    """
    check_share("momentum", momentum)
    return second_order(
        objective,
        curvature=FisherCurvature(fisher, samples),
        solver=solver,
        damping=damping,
        momentum=momentum,
    )
