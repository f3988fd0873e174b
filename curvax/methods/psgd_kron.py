"""PSGD with Kronecker factors."""

from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, ScalarLike

from curvax.rules.chained import Chained
from curvax.rules.momentum import Momentum
from curvax.rules.whitening import TriangularWhitening
from curvax.tensors import Axes, Layouts
from curvax.tensorwise import tensorwise


def psgd_kron(
    *,
    momentum: ScalarLike = 0.9,
    probability: ScalarLike | Callable[[Array], Any] | None = None,
    rate: ScalarLike = 0.1,
    longest: int = 8192,
    one_sided: bool = False,
    limit: ScalarLike | None = 1.1,
    scale: ScalarLike = 1.0,
    seed: int = 0,
    merge: int = 0,
    axes: Axes | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """(Q₁ᵀQ₁) M (Q₂ᵀQ₂) of the momentum M, with triangular Q₁ and Q₂ that whiten it; for tensors of
    higher order a factor for each dimension, for vectors a diagonal.

    PSGD Kron (Li 2018, section on Kronecker products; Pooladzandi & Li 2024, for whitening): the
    factors are fitted by relative gradient descent with one random vector a fit. The directions are
    those of psgd-jax 0.2.9 with the same random vectors, but for axes of length 1, and for scalars.

    **Arguments:**

    - `momentum`: of [`Momentum`][curvax.Momentum], before the preconditioner, which is fitted to
      it.
    - `probability`, `rate`, `longest`, `one_sided`, `limit`, `scale`, `seed`: of
      [`TriangularWhitening`][curvax.TriangularWhitening]. A `probability` of 1/k fits in every k-th
      step; None in each of the first 500, and then ever more rarely, down to every 33rd.
    - `merge`: neighbouring dimensions are merged as long as the product is at most this.
    - `axes`: the names of the axes of leaves, by a part of their path, as of
      [`Layouts`][curvax.tensors.Layouts]: `{"layers": "layers ..."}` for layers in one array.
    - `rest`: for scalars, and what `axes` says is no tensor. None is
      `optax.scale_by_adam(momentum)`.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`. The root mean square of a
    tensor's update is at most `limit` before the learning rate; a third of Adam's is usual.

    **State:** the momentum, one copy of the parameters, and m² + n² numbers for each m × n matrix.
    **Cost:** a step 4mn(m + n) operations, of which a square matrix's smaller side saves some; a
    fit about 7mn(m + n) + (m³ + n³) more.

    **Raises** `ValueError` for arguments out of range, and in `init` for names of axes that do not
    fit.
    """
    white = TriangularWhitening(probability, rate, longest, one_sided, limit, scale, seed)
    rest = optax.scale_by_adam(momentum) if rest is None else rest
    rule = Chained(Momentum(momentum), white)
    return tensorwise(rule, Layouts.of(axes, merge=merge), rest=rest)
