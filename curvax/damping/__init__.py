"""Damping policies: constant, scheduled, Levenberg-Marquardt, trust region."""

from curvax.damping.policies import AbstractDamping as AbstractDamping
from curvax.damping.policies import Constant as Constant
from curvax.damping.policies import DampingState as DampingState
from curvax.damping.policies import Gain as Gain
from curvax.damping.policies import LevenbergMarquardt as LevenbergMarquardt
from curvax.damping.policies import Scheduled as Scheduled
from curvax.damping.policies import TrustRegion as TrustRegion
from curvax.damping.policies import as_damping as as_damping
