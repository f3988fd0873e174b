"""How much of the identity (or how short a step) makes the quadratic model trustworthy.

A policy gives the damping λ of A + λI and a radius on the length of the solution, and learns from
the *gain ratio*

    ρ = (f(θ) − f(θ + δ)) / (m(0) − m(δ)),   m(δ) = f + gᵀδ + ½ δᵀAδ,

the decrease that a step δ brought over the decrease that the undamped model promised (Nocedal &
Wright 2006, eq. 4.4): 1 for a perfect model, negative for a step that made things worse.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar, ScalarLike

from curvax._checks import check_cadence, check_positive


class DampingState(NamedTuple):
    """λ, and the radius on ‖solution‖ (∞ where there is none): float32 scalars."""

    damping: Float[Array, ""]
    radius: Float[Array, ""]


class Gain(NamedTuple):
    """What a step brought: the gain ratio, and the length of the solution it was made from."""

    ratio: Scalar
    length: Scalar


class AbstractDamping(eqx.Module):
    """A damping policy."""

    @property
    @abc.abstractmethod
    def every(self) -> int | None:
        """Steps between two looks at the gain ratio, each of which costs one more forward pass and
        one product with J; None for a policy that does not look at it. A field, where it is set.
        """

    @property
    def bounded(self) -> bool:
        """Whether the radius is ever finite."""
        return False

    @abc.abstractmethod
    def init(self) -> DampingState:
        """The state before the first step."""

    def at(self, state: DampingState, count: Int[Array, ""]) -> DampingState:
        """The damping and radius in force on step `count`."""
        return state

    def update(self, state: DampingState, gain: Gain) -> DampingState:
        """The state after a step whose gain was measured."""
        return state

    def accepts(self, gain: Gain) -> Bool[Array, ""]:
        """Whether to take the step."""
        return jnp.asarray(True)


class Constant(AbstractDamping):
    """λ = `value`, always."""

    value: ScalarLike
    every: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_positive("value", self.value, zero=True)

    def init(self) -> DampingState:
        return _state(self.value)

    def at(self, state: DampingState, count: Int[Array, ""]) -> DampingState:
        # Not the λ of the state: under `optax.inject_hyperparams` the value may change.
        return _state(self.value)


class Scheduled(AbstractDamping):
    """λ = `schedule(count)`: any Optax schedule."""

    schedule: Callable[[Array], Array] = eqx.field(static=True)
    every: int | None = eqx.field(static=True, default=None)

    def init(self) -> DampingState:
        return _state(self.schedule(jnp.zeros((), jnp.int32)))

    def at(self, state: DampingState, count: Int[Array, ""]) -> DampingState:
        return _state(self.schedule(count))


class LevenbergMarquardt(AbstractDamping):
    """λ grows by `increase` where ρ < `lower` and shrinks by `decrease` where ρ > `upper`.

    The rule of Levenberg (1944) and Marquardt (1963) with the constants of Martens (2010,
    section 4.1); `every` > 1 looks at the ratio only so often, as Martens & Grosse (2015, section
    6.5) do, who then take the constants to the power of `every`. A step measured to raise the
    loss on its own batch (ρ < 0) is not taken.
    """

    initial: ScalarLike = 1.0
    every: int | None = eqx.field(static=True, default=1)
    increase: ScalarLike = 1.5
    decrease: ScalarLike = 2 / 3
    lower: ScalarLike = 0.25
    upper: ScalarLike = 0.75
    minimum: ScalarLike = 1e-8
    maximum: ScalarLike = 1e8

    def __check_init__(self):
        check_positive("initial", self.initial)
        check_cadence("every", self.every, never=True)

    def init(self) -> DampingState:
        return _state(self.initial)

    def update(self, state: DampingState, gain: Gain) -> DampingState:
        factor = jnp.where(gain.ratio > self.upper, self.decrease, 1.0)
        factor = jnp.where(gain.ratio < self.lower, self.increase, factor)
        value = jnp.clip(state.damping * factor, self.minimum, self.maximum)
        return state._replace(damping=value.astype(state.damping.dtype))

    def accepts(self, gain: Gain) -> Bool[Array, ""]:
        return ~(gain.ratio < 0)


class TrustRegion(AbstractDamping):
    """A radius on the length of the solution, beside a fixed λ.

    The radius shrinks by `shrink` where ρ < `lower`, and grows by `grow`, up to `maximum`, where
    ρ > `upper` and the solution reached it; a step with ρ < 0 is not taken (Nocedal & Wright
    2006, Algorithm 4.1). [`CG`][curvax.CG] follows the boundary (Steihaug 1983); the solution of
    any other solver is shortened to the radius.
    """

    initial: ScalarLike = 1.0
    value: ScalarLike = 1e-3
    every: int | None = eqx.field(static=True, default=1)
    shrink: ScalarLike = 0.25
    grow: ScalarLike = 2.0
    lower: ScalarLike = 0.25
    upper: ScalarLike = 0.75
    minimum: ScalarLike = 1e-6
    maximum: ScalarLike = 1e3

    def __check_init__(self):
        check_positive("initial", self.initial)
        check_positive("value", self.value, zero=True)
        check_cadence("every", self.every, never=True)

    def init(self) -> DampingState:
        return _state(self.value, self.initial)

    @property
    def bounded(self) -> bool:
        return True

    def update(self, state: DampingState, gain: Gain) -> DampingState:
        at_boundary = gain.length > 0.99 * state.radius
        factor = jnp.where((gain.ratio > self.upper) & at_boundary, self.grow, 1.0)
        # From the length of a step that was shorter than the radius, as it is the step that failed.
        shrunk = self.shrink * jnp.minimum(gain.length, state.radius)
        radius = jnp.where(gain.ratio < self.lower, shrunk, state.radius * factor)
        radius = jnp.clip(radius, self.minimum, self.maximum)
        return state._replace(radius=radius.astype(state.radius.dtype))

    def accepts(self, gain: Gain) -> Bool[Array, ""]:
        return ~(gain.ratio < 0)


def as_damping(damping: AbstractDamping | ScalarLike) -> AbstractDamping:
    """A number stands for `Constant`."""
    return damping if isinstance(damping, AbstractDamping) else Constant(value=damping)


def _state(value: ScalarLike, radius: ScalarLike = jnp.inf) -> DampingState:
    return DampingState(jnp.asarray(value, jnp.float32), jnp.asarray(radius, jnp.float32))
