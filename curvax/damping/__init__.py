"""Damping: policies (constant, scheduled, Levenberg-Marquardt, trust region), and how λ is shared
out between the factors of a Kronecker product.
"""

from curvax.damping.factors import AbstractFactorDamping as AbstractFactorDamping
from curvax.damping.factors import FactoredTikhonov as FactoredTikhonov
from curvax.damping.factors import RelativeTikhonov as RelativeTikhonov
from curvax.damping.policies import AbstractDamping as AbstractDamping
from curvax.damping.policies import Constant as Constant
from curvax.damping.policies import DampingState as DampingState
from curvax.damping.policies import Gain as Gain
from curvax.damping.policies import LevenbergMarquardt as LevenbergMarquardt
from curvax.damping.policies import Scheduled as Scheduled
from curvax.damping.policies import TrustRegion as TrustRegion
from curvax.damping.policies import as_damping as as_damping
