"""The moving average of a gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, ScalarLike

from curvax._checks import check_share
from curvax.rules.base import AbstractTensorRule


class MomentumState(NamedTuple):
    """The moving average m, not corrected for its start."""

    average: Array


class Momentum(AbstractTensorRule):
    """The moving average of the gradient, m ← βm + (1 − β)g, corrected for its start at zero.

    **Arguments:**

    - `decay`: β.
    - `nesterov`: the average that the next step would have with the same gradient,
      β m/(1 − βᵗ⁺²) + (1 − β) g/(1 − βᵗ⁺¹) at t = 0, 1, … (Dozat 2016).
    """

    decay: ScalarLike = 0.9
    nesterov: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        check_share("momentum", self.decay)

    def init(self, stack: Array) -> MomentumState:
        return MomentumState(jnp.zeros_like(stack))

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        steps, kept = [], []
        for gradient, state in zip(stacks, states, strict=True):
            decay = jnp.asarray(self.decay, gradient.dtype)
            now, ahead = (1 - decay ** (count + t).astype(decay.dtype) for t in (1, 2))
            average = decay * state.average + (1 - decay) * gradient
            kept.append(MomentumState(average))
            if self.nesterov:
                steps.append(decay / ahead * average + (1 - decay) / now * gradient)
            else:
                steps.append(average / now)
        return steps, kept
