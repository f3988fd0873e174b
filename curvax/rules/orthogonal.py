"""A matrix with equal singular values in place of a gradient."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, ScalarLike

from curvax._linalg import joined, spans, transposed
from curvax.orthogonal import QUINTIC, Coefficients, newton_schulz
from curvax.rules.base import AbstractTensorRule

# Matrices that keep a device busy: a stack of so many is not copied into a larger one.
_ENOUGH = 8


class NewtonSchulz(AbstractTensorRule):
    """Each matrix replaced by the nearest semi-orthogonal one, roughly, times a number.

    The state is empty. Matrices of equal shape, transposed or not, are iterated together.

    **Arguments:**

    - `coefficients`, `eps`, `dtype`: of [`newton_schulz`][curvax.orthogonal.newton_schulz].
    - `rms`: what the matrix is multiplied by. None is for √max(1, outputs/inputs) (Jordan et al.
      2024); with a number its root mean square is about that, whatever its shape, by a factor of
      `rms` √max(inputs, outputs) (Liu et al. 2025).
    """

    coefficients: Coefficients = eqx.field(static=True, default=(QUINTIC,) * 5)
    eps: ScalarLike = 1e-30
    rms: ScalarLike | None = None
    dtype: Any = eqx.field(static=True, default=None)

    def __check_init__(self):
        if any(len(each) != 3 for each in self.coefficients):
            raise ValueError(
                f"coefficients: got {self.coefficients}, wanted a tuple of three numbers for each "
                "step."
            )
        if self.dtype is not None and jnp.finfo(self.dtype).maxexp < 128:
            raise ValueError(
                f"dtype: got {jnp.dtype(self.dtype)}, wanted one with the range of float32."
            )
        if isinstance(self.rms, int | float) and not self.rms > 0:
            raise ValueError(f"rms: got {self.rms}, wanted a positive number or None.")

    def init(self, stack: Array) -> tuple[()]:
        if stack.ndim != 3:
            raise ValueError(
                f"layouts: got tensors of shape {stack.shape[1:]}, wanted matrices: see the "
                "argument `matrices` of Layouts.of."
            )
        return ()

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        groups: dict[Any, list[int]] = {}
        for i, stack in enumerate(stacks):
            key = (stack.dtype, *sorted(stack.shape[1:]))
            groups.setdefault(key if stack.shape[0] < _ENOUGH else i, []).append(i)
        results = list(stacks)
        for members in groups.values():
            tall = [stacks[i].shape[1] > stacks[i].shape[2] for i in members]
            wide = [
                transposed(stacks[i]) if turn else stacks[i]
                for i, turn in zip(members, tall, strict=True)
            ]
            done = newton_schulz(joined(wide), self.coefficients, eps=self.eps, dtype=self.dtype)
            for i, turn, span in zip(members, tall, spans(wide), strict=True):
                part = transposed(done[span]) if turn else done[span]
                results[i] = part * self._factor(part)
        return results, states

    def _factor(self, stack: Array) -> Array:
        _, outputs, inputs = stack.shape
        if self.rms is None:
            return jnp.asarray(math.sqrt(max(1.0, outputs / inputs)), stack.dtype)
        return jnp.asarray(self.rms, stack.dtype) * math.sqrt(max(outputs, inputs))
