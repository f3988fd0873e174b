"""Preconditioners made from a diagonal."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Scalar, ScalarLike

from curvax import _tree
from curvax._checks import check_positive, check_share
from curvax._masked import keep_unmasked
from curvax.objective import Params
from curvax.operators import Diagonal, InverseDiagonal
from curvax.plan.plan import Observation, Requirement
from curvax.plan.quantities import AbstractQuantity, BartlettDiagonal, HutchinsonDiagonal
from curvax.preconditioners.averaging import SpatialAverage
from curvax.preconditioners.base import AbstractPreconditioner


class DiagonalState(NamedTuple):
    """Moving average of the diagonal, and the total weight that it has so far (for its bias)."""

    average: Params
    weight: Array


class AbstractDiagonalPreconditioner(AbstractPreconditioner):
    """A preconditioner made from a moving average of what an estimate of a diagonal gives.

    A subclass gives `operator`; `averaged` where the average is of something else than the
    estimate. Where no estimate is due, nothing is computed.
    """

    estimate: eqx.AbstractVar[AbstractQuantity]
    every: eqx.AbstractVar[int]
    decay: eqx.AbstractVar[ScalarLike]

    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement(self.estimate, "preconditioner", self.every),)

    def init(self, params: Params) -> DiagonalState:
        average = _tree.zeros_like(_tree.widened(params))
        dtype = _tree.accumulation_dtype(_tree.common_dtype(average))
        return DiagonalState(average, jnp.zeros((), dtype))

    def averaged(self, fresh: Params, observation: Observation) -> Params:
        """What the average is of, from an estimate for all parameters."""
        del observation
        return fresh

    def update(self, state: DiagonalState, observation: Observation) -> DiagonalState:
        due = observation.due(self.estimate)
        if due is False:
            return state

        def refreshed() -> DiagonalState:
            fresh = self.averaged(observation[self.estimate], observation)
            fresh = keep_unmasked(state.average, fresh)
            return jax.tree.map(self._average, state, DiagonalState(fresh, jnp.ones(())))

        return refreshed() if due is True else jax.lax.cond(due, refreshed, lambda: state)

    def _average(self, old: Array, new: Array) -> Array:
        # In this order: 1 − 0.999 is not to be rounded to float32 twice.
        past, now = (jnp.asarray(share, old.dtype) for share in (self.decay, 1 - self.decay))
        return past * old + now * new.astype(old.dtype)


class DiagonalPreconditioner(AbstractDiagonalPreconditioner):
    """(|d| + λ)^(−exponent), with d a moving average of a diagonal estimate.

    **Arguments:** `estimate`: the quantity that gives d; `every`: steps between two estimates;
    `decay` of the moving average; `exponent`: 0.75 as in Martens (2010, section 4.7), which
    distrusts a noisy diagonal, or 1 for the plain inverse.
    """

    estimate: AbstractQuantity = BartlettDiagonal()
    every: int = eqx.field(static=True, default=10)
    decay: ScalarLike = 0.95
    exponent: float = 0.75

    def init(self, params: Params) -> DiagonalState:
        # A solver wants an operator of the parameters' dtypes.
        return DiagonalState(_tree.zeros_like(params), jnp.zeros((), jnp.float32))

    def operator(self, state: DiagonalState, damping: Scalar) -> Diagonal:
        weight = jnp.where(state.weight > 0, state.weight, 1)

        def inverse(average: Array) -> Array:
            dtype = _tree.accumulation_dtype(average.dtype)
            mean = average.astype(dtype) / weight.astype(dtype)
            entries = jnp.abs(mean) + jnp.asarray(damping, dtype)
            return jnp.power(entries, -self.exponent).astype(average.dtype)

        return Diagonal(jax.tree.map(inverse, state.average))


class RootMeanSquareDiagonal(AbstractDiagonalPreconditioner):
    """1 / (√v ^ power + λ), with v the moving average of the squares of a diagonal estimate,
    corrected for its start (Yao et al. 2021, AdaHessian, section 3.3).

    Before the first estimate it is zero: what is preconditioned stays where it is.

    **Arguments:**

    - `estimate`: the quantity that gives the diagonal; `every`: steps between two estimates.
    - `decay`: of the moving average.
    - `power`: the Hessian power, in [0, 1]: 1 for the absolute value of the diagonal, 0 for no
      preconditioning.
    - `average`: over which entries the diagonal is averaged before it is squared.
    """

    estimate: AbstractQuantity = HutchinsonDiagonal()
    every: int = eqx.field(static=True, default=1)
    decay: ScalarLike = 0.999
    power: ScalarLike = 1.0
    average: SpatialAverage = SpatialAverage()

    def __check_init__(self):
        check_share("decay", self.decay)
        check_share("power", self.power, one=True)

    def averaged(self, fresh: Params, observation: Observation) -> Params:
        means = self.average.apply(_tree.widened(fresh), observation)
        return jax.tree.map(jnp.square, means)

    def operator(self, state: DiagonalState, damping: Scalar) -> InverseDiagonal:
        measured = state.weight > 0
        weight = jnp.where(measured, state.weight, 1)

        def entries(average: Array) -> Array:
            dtype = average.dtype
            mean = average / weight.astype(dtype)
            # A power of 1, which is the rule, needs no logarithm.
            plain = isinstance(self.power, int | float) and self.power == 1
            half = jnp.asarray(0.5 * self.power, dtype)
            root = jnp.sqrt(mean) if plain else jnp.power(mean, half)
            return jnp.where(measured, root + damping.astype(dtype), jnp.inf)

        return InverseDiagonal(jax.tree.map(entries, state.average))


class ThresholdedDiagonal(AbstractDiagonalPreconditioner):
    """1 / max(γh + λ, ε), with h a moving average of a diagonal estimate: where the curvature is
    small or negative, the step is left to a scaling that clips (Liu et al. 2023, Sophia).

    **Arguments:**

    - `estimate`: the quantity that gives the diagonal; `every`: steps between two estimates.
    - `decay`: of the moving average, which starts from zero and is not corrected for that, unless
      with `debias`.
    - `gamma`: γ, and `eps`: ε > 0.
    """

    estimate: AbstractQuantity = BartlettDiagonal()
    every: int = eqx.field(static=True, default=10)
    decay: ScalarLike = 0.99
    gamma: ScalarLike = 0.05
    eps: ScalarLike = 1e-12
    debias: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_share("decay", self.decay)
        check_positive("gamma", self.gamma)
        check_positive("eps", self.eps)

    def operator(self, state: DiagonalState, damping: Scalar) -> InverseDiagonal:
        weight = jnp.where(state.weight > 0, state.weight, 1)

        def entries(average: Array) -> Array:
            dtype = average.dtype
            gamma = jnp.asarray(self.gamma, dtype)
            gamma = gamma / weight.astype(dtype) if self.debias else gamma
            curvature = gamma * average + damping.astype(dtype)
            return jnp.maximum(curvature, jnp.asarray(self.eps, dtype))

        return InverseDiagonal(jax.tree.map(entries, state.average))
