"""curvax: curvature-aware training in JAX.

Operators are Equinox modules and lineax linear operators; methods are Optax transformations.
"""

from curvax import methods as methods
from curvax.damping import AbstractDamping as AbstractDamping
from curvax.damping import Constant as Constant
from curvax.damping import DampingState as DampingState
from curvax.damping import Gain as Gain
from curvax.damping import LevenbergMarquardt as LevenbergMarquardt
from curvax.damping import Scheduled as Scheduled
from curvax.damping import TrustRegion as TrustRegion
from curvax.estimators import flat as flat
from curvax.estimators import gauss_newton_bartlett as gauss_newton_bartlett
from curvax.estimators import hutchinson_diagonal as hutchinson_diagonal
from curvax.estimators import hutchinson_trace as hutchinson_trace
from curvax.losses import AbstractLoss as AbstractLoss
from curvax.losses import CustomLoss as CustomLoss
from curvax.losses import Gaussian as Gaussian
from curvax.losses import Poisson as Poisson
from curvax.losses import SigmoidCrossEntropy as SigmoidCrossEntropy
from curvax.losses import SoftmaxCrossEntropy as SoftmaxCrossEntropy
from curvax.losses import SquaredError as SquaredError
from curvax.objective import Linearisation as Linearisation
from curvax.objective import Objective as Objective
from curvax.operators import AbstractOperator as AbstractOperator
from curvax.operators import BlockDiagonal as BlockDiagonal
from curvax.operators import Composed as Composed
from curvax.operators import Damped as Damped
from curvax.operators import Diagonal as Diagonal
from curvax.operators import Fisher as Fisher
from curvax.operators import GaussNewton as GaussNewton
from curvax.operators import Hessian as Hessian
from curvax.operators import Jacobian as Jacobian
from curvax.operators import Scaled as Scaled
from curvax.operators import Sum as Sum
from curvax.operators import Transpose as Transpose
from curvax.operators import accumulate as accumulate
from curvax.operators import accumulate_stacked as accumulate_stacked
from curvax.plan import BartlettDiagonal as BartlettDiagonal
from curvax.plan import FisherCurvature as FisherCurvature
from curvax.plan import GaussNewtonCurvature as GaussNewtonCurvature
from curvax.plan import HessianCurvature as HessianCurvature
from curvax.plan import HutchinsonDiagonal as HutchinsonDiagonal
from curvax.plan import Observation as Observation
from curvax.plan import Plan as Plan
from curvax.plan import Requirement as Requirement
from curvax.preconditioners import AbstractPreconditioner as AbstractPreconditioner
from curvax.preconditioners import DiagonalPreconditioner as DiagonalPreconditioner
from curvax.solvers import CG as CG
from curvax.solvers import Eigh as Eigh
from curvax.solvers import RowSpace as RowSpace
from curvax.step import Step as Step
from curvax.step import StepState as StepState
from curvax.step import make_step as make_step
from curvax.transform import Method as Method
from curvax.transform import Metrics as Metrics
from curvax.transform import SecondOrderState as SecondOrderState
from curvax.transform import second_order as second_order

__version__ = "0.1.0"
