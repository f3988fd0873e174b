"""Momentum that is orthogonalised."""

from typing import Any

import optax
from jaxtyping import ScalarLike

from curvax.orthogonal import QUINTIC, Coefficients
from curvax.rules.base import AbstractTensorRule
from curvax.rules.chained import Chained
from curvax.rules.momentum import Momentum
from curvax.rules.orthogonal import NewtonSchulz, spectral_scale
from curvax.tensors import Axes, Layouts
from curvax.tensorwise import tensorwise


def muon(
    *,
    momentum: ScalarLike = 0.95,
    nesterov: bool = True,
    coefficients: Coefficients = (QUINTIC,) * 5,
    eps: ScalarLike = 1e-8,
    rms: ScalarLike | None = None,
    dtype: Any = None,
    preconditioner: AbstractTensorRule | None = None,
    axes: Axes | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """U Vᵀ of the momentum U Σ Vᵀ of each matrix, and Adam for all that is no matrix.

    Muon (Jordan et al. 2024): steepest descent in the spectral norm, or Shampoo without memory
    (Bernstein & Newhouse 2024). The directions are those of `optax.contrib.muon`, to rounding.

    **Arguments:**

    - `momentum`, `nesterov`: of [`Momentum`][curvax.Momentum], before the orthogonalisation.
    - `coefficients`: (a, b, c) of each step X ↦ aX + (bA + cA²)X, A = XXᵀ, of the iteration; after
      the default's five, singular values lie between about 0.7 and 1.2.
    - `eps`: is added to the norm that a matrix is divided by first, and is Adam's.
    - `rms`: None multiplies the result by √max(1, outputs/inputs); a number makes it about the root
      mean square of each matrix's update, whatever its shape. With 0.2 the learning rates of Adam
      fit (Liu et al. 2025).
    - `dtype`: of the iteration. None takes bfloat16 for float32 on devices other than a
      CPU, as is customary.
    - `preconditioner`: a rule for gradients before the momentum, such as
      [`KroneckerRoots()`][curvax.KroneckerRoots]: Muon in the metric of Shampoo's factors.
    - `axes`: the names of the axes of leaves, by a part of their path, as of
      [`Layouts`][curvax.tensors.Layouts]: `{"qkv": "in heads out"}` makes a matrix for each head,
      `{"layers": "layers ..."}` one for each layer of a scan, `{"embed": None}` leaves a matrix to
      `rest`. Without names every leaf of two axes is a matrix `"in out"`; Equinox's weights are
      `"out in"`, which makes a difference where `rms` is None.
    - `rest`: for the other leaves. None is `optax.scale_by_adam(eps=eps, nesterov=nesterov)`; in a
      chain with `optax.scale` it has a learning rate of its own.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.

    **State:** the momentum, one copy of the matrices; two copies of the rest; and what a
    `preconditioner` keeps. **Cost:** besides the gradient, for an m × n matrix with m ≤ n, 20 m²n +
    10 m³ operations for the five steps, where n > 1.5 m only 8 m²n + 28 m³: they are taken with XXᵀ
    alone. Matrices of equal shape are iterated together.

    **Raises** `ValueError` for arguments out of range, and in `init` for names of axes that do not
    fit.
    """
    rest = optax.scale_by_adam(eps=eps, nesterov=nesterov) if rest is None else rest
    first = () if preconditioner is None else (preconditioner,)
    then = NewtonSchulz(coefficients, eps, dtype)
    rule = Chained(*first, Momentum(momentum, nesterov), then)
    layouts = Layouts.of(axes, matrices=True)
    return tensorwise(rule, layouts, rest=rest, scale=spectral_scale(rms))
