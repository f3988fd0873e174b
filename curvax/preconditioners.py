"""Preconditioners of the inner solver: cheap approximations of (A + λI)⁻¹."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Scalar

from curvax import _tree
from curvax._masked import keep_unmasked
from curvax.objective import Params
from curvax.operators import Diagonal
from curvax.plan.plan import Observation, Requirement
from curvax.plan.quantities import AbstractQuantity, BartlettDiagonal


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


class DiagonalState(NamedTuple):
    """Moving average of the diagonal, and the total weight that it has so far (for its bias)."""

    average: Params
    weight: Array


class DiagonalPreconditioner(AbstractPreconditioner):
    """(|d| + λ)^(−exponent), with d a moving average of a diagonal estimate.

    **Arguments:** `estimate`: the quantity that gives d; `every`: steps between two estimates;
    `decay` of the moving average; `exponent`: 0.75 as in Martens (2010, section 4.7), which
    distrusts a noisy diagonal, or 1 for the plain inverse.
    """

    estimate: AbstractQuantity = BartlettDiagonal()
    every: int = eqx.field(static=True, default=10)
    decay: float = 0.95
    exponent: float = 0.75

    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement(self.estimate, "preconditioner", self.every),)

    def init(self, params: Params) -> DiagonalState:
        return DiagonalState(_tree.zeros_like(params), jnp.zeros((), jnp.float32))

    def update(self, state: DiagonalState, observation: Observation) -> DiagonalState:
        due = observation.due(self.estimate)
        if due is False:
            return state
        fresh = keep_unmasked(state.average, observation[self.estimate])
        average = jax.tree.map(
            lambda a, d: (self.decay * a + (1 - self.decay) * d.astype(a.dtype)).astype(a.dtype),
            state.average,
            fresh,
        )
        updated = DiagonalState(average, self.decay * state.weight + (1 - self.decay))
        return updated if due is True else _tree.where(due, updated, state)

    def operator(self, state: DiagonalState, damping: Scalar) -> Diagonal:
        weight = jnp.where(state.weight > 0, state.weight, 1)

        def inverse(average: Array) -> Array:
            dtype = _tree.accumulation_dtype(average.dtype)
            mean = average.astype(dtype) / weight.astype(dtype)
            entries = jnp.abs(mean) + jnp.asarray(damping, dtype)
            return jnp.power(entries, -self.exponent).astype(average.dtype)

        return Diagonal(jax.tree.map(inverse, state.average))
