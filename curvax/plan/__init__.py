"""Plans: what a step computes, for whom, how often, and at what cost."""

from curvax.plan.phases import Phase as Phase
from curvax.plan.phases import Rates as Rates
from curvax.plan.plan import Entry as Entry
from curvax.plan.plan import Observation as Observation
from curvax.plan.plan import Plan as Plan
from curvax.plan.plan import Requirement as Requirement
from curvax.plan.quantities import AbstractCurvatureQuantity as AbstractCurvatureQuantity
from curvax.plan.quantities import AbstractQuantity as AbstractQuantity
from curvax.plan.quantities import BartlettDiagonal as BartlettDiagonal
from curvax.plan.quantities import FisherCurvature as FisherCurvature
from curvax.plan.quantities import FisherDiagonal as FisherDiagonal
from curvax.plan.quantities import GainRatio as GainRatio
from curvax.plan.quantities import GaussNewtonCurvature as GaussNewtonCurvature
from curvax.plan.quantities import HessianCurvature as HessianCurvature
from curvax.plan.quantities import HutchinsonDiagonal as HutchinsonDiagonal
from curvax.plan.quantities import Scope as Scope
from curvax.plan.sketches import NystromSketch as NystromSketch
from curvax.plan.traffic import Collective as Collective
from curvax.plan.traffic import Traffic as Traffic
