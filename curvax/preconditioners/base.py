"""What every preconditioner is: a cheap approximation of (A + λI)⁻¹, for an inner solver or in its
place.
"""

import abc
from typing import Any

import equinox as eqx
import lineax as lx
from jaxtyping import Scalar

from curvax.objective import Params
from curvax.plan.plan import Observation, Requirement


class AbstractPreconditioner(eqx.Module):
    """What a preconditioner needs, keeps, and gives to the solver."""

    @abc.abstractmethod
    def requirements(self) -> tuple[Requirement, ...]:
        """The quantities it wants, and how often."""

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """Its state: a pytree of arrays that never changes structure."""

    @abc.abstractmethod
    def update(self, state: Any, observation: Observation) -> Any:
        """The state after an observation."""

    @abc.abstractmethod
    def operator(self, state: Any, damping: Scalar) -> lx.AbstractLinearOperator:
        """A positive semidefinite approximation of (A + λI)⁻¹."""
