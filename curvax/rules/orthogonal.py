"""A matrix with equal singular values in place of a gradient."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Int, ScalarLike

from curvax.orthogonal import QUINTIC, Coefficients, orthogonalized
from curvax.rules.base import AbstractTensorRule
from curvax.tensors import Layout


class NewtonSchulz(AbstractTensorRule):
    """Each matrix replaced by the nearest semi-orthogonal one, roughly.

    The state is empty. How matrices of several shapes are iterated together:
    `curvax.orthogonal.orthogonalized`.

    **Arguments:**

    - `coefficients`, `eps`, `dtype`: of [`newton_schulz`][curvax.orthogonal.newton_schulz].
    """

    coefficients: Coefficients = eqx.field(static=True, default=(QUINTIC,) * 5)
    eps: ScalarLike = 1e-30
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
        return orthogonalized(stacks, self.coefficients, eps=self.eps, dtype=self.dtype), states


def spectral_scale(rms: ScalarLike | None) -> Callable[[Layout], ScalarLike]:
    """What a semi-orthogonal matrix is multiplied by: √max(1, outputs/inputs) (Jordan et al. 2024),
    or for a number `rms` that number times √max(inputs, outputs), so that the root mean square of
    its entries is about `rms`, whatever its shape (Liu et al. 2025).
    """
    if isinstance(rms, int | float) and not rms > 0:
        raise ValueError(f"rms: got {rms}, wanted a positive number or None.")

    def scale(layout: Layout) -> ScalarLike:
        if rms is not None:
            return rms * math.sqrt(max(layout.sizes))
        outputs, inputs = layout.sizes[:: -1 if layout.outputs else 1]
        return math.sqrt(max(1.0, outputs / inputs))

    return scale
