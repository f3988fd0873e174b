"""Adam in the leading eigenvectors of a gradient's second moments, and in all that is outside of
their span with one second moment for it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from curvax._checks import check_cadence, check_decays
from curvax.rules.bases import (
    AbstractEigenbasisRule,
    EigenSide,
    Turned,
    first_side,
    projected,
    reordered,
    sides_of,
    turned_sides,
)
from curvax.rules.low_rank import sketched
from curvax.rules.sides import second_moment, with_factor
from curvax.rules.subspaces import (
    Mixed,
    SubspaceSide,
    first_subspace,
    mean_squares,
    mixed_sides,
    scaled,
)
from curvax.taps.blocks import Form
from curvax.taps.wishes import SideRank, as_rank


class SubspaceState(NamedTuple):
    """Adam's moments, not corrected for their start: the mean in the tensors' own coordinates, the
    squares in those of the sides, with one more along a dimension for all that is outside.
    """

    mean: Float[Array, "stack ..."]
    square: Float[Array, "stack ..."]
    sides: tuple[EigenSide | SubspaceSide | None, ...]


class SubspaceAdam(AbstractEigenbasisRule):
    """[`EigenbasisAdam`][curvax.EigenbasisAdam] with the leading eigenvectors of GGᵀ alone: SOAP at
    low rank.

    With orthonormal P (m × k) and Q (n × l) a gradient is the sum of four parts: PPᵀGQQᵀ, PPᵀG(I −
    QQᵀ), (I − PPᵀ)GQQᵀ and (I − PPᵀ)G(I − QQᵀ). Each coordinate of PᵀGQ has Adam's second moment;
    for each row of PᵀG(I − QQᵀ) there is one, the mean over the n − l dimensions outside; one for
    each column of the third part, and one for the fourth: (k + 1)(l + 1) in all. Each part of the
    mean is divided by the root of its own. With all sides full it is `EigenbasisAdam`. That what is
    outside of a subspace shares one number is as in arXiv:2605.06316; the rest is not that method.

    Nothing n × n is formed. The moving average of FQ sees every gradient, F = GGᵀ; a refresh makes
    a new basis of it by one pass of a Nyström approximation (Tropp et al. 2017), which is a step of
    orthogonal iteration, and turns its columns towards the eigenvectors in their span by one more,
    sorted by eigenvalue. Squares then are those that the new coordinates would have if the old ones
    were not correlated, v'ᵢ = Σⱼ(q'ᵢᵀqⱼ)²vⱼ with those outside for what q'ᵢ has there; what the new
    basis leaves out goes to the mean outside. For columns that only change places, and for full
    sides, it is their order.

    **Arguments:** `rank`: the columns of a basis, as a share of the dimension's length or a number;
    None for full bases. Dimensions of at most 32 have full ones, and those above 8192 none. The
    others are those of `EigenbasisAdam`; `tolerance` is for full bases.
    """

    rank: SideRank = eqx.field(static=True, default=0.15)
    b1: ScalarLike = 0.95
    b2: ScalarLike = 0.95
    eps: ScalarLike = 1e-8
    decay: ScalarLike | None = None
    refresh_every: int = eqx.field(static=True, default=10)
    longest: int | None = eqx.field(static=True, default=None)
    one_sided: bool = eqx.field(static=True, default=False)
    tolerance: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_decays(b1=self.b1, b2=self.b2, decay=self.decay)
        check_cadence("refresh_every", self.refresh_every)
        as_rank(self.rank)

    def init(self, stack: Array) -> SubspaceState:
        count, *shape = stack.shape
        sides: list[EigenSide | SubspaceSide | None] = []
        has = with_factor(tuple(shape), self.longest, self.one_sided)
        for dim, (size, there) in enumerate(zip(shape, has, strict=True)):
            form = Form.of(size, math.prod(shape) // size, self.rank)
            if there and form.kind == "sketch":
                sides.append(first_subspace(form, count, stack.dtype, dim))
            else:
                full = there and form.kind == "full"
                sides.append(first_side(count, size, stack.dtype) if full else None)
        coordinates = (
            side.basis.shape[2] + 1 if isinstance(side, SubspaceSide) else size
            for side, size in zip(sides, shape, strict=True)
        )
        return SubspaceState(stack, jnp.zeros((count, *coordinates), stack.dtype), tuple(sides))

    def turns(self, sides: Sequence[Any], first: Bool[Array, ""]) -> Sequence[Turned | Mixed]:
        thin = iter(mixed_sides([side for side in sides if isinstance(side, SubspaceSide)], first))
        whole = [side for side in sides if isinstance(side, EigenSide)]
        full = iter(turned_sides(whole, first, tolerance=self.tolerance))
        return [next(thin if isinstance(side, SubspaceSide) else full) for side in sides]

    def turned(self, state: SubspaceState, turns: Sequence[Any]) -> SubspaceState:
        return SubspaceState(state.mean, reordered(state.square, turns), sides_of(turns))

    def step(
        self, gradient: Array, state: SubspaceState, count: Int[Array, ""]
    ) -> tuple[Array, SubspaceState]:
        dtype = gradient.dtype
        b1, b2, eps = (jnp.asarray(each, dtype) for each in (self.b1, self.b2, self.eps))
        decay = b2 if self.decay is None else jnp.asarray(self.decay, dtype)
        begun = (count > 0).astype(dtype)
        steps = jnp.maximum(count, 1).astype(dtype)
        full = [side if isinstance(side, EigenSide) else None for side in state.sides]
        thin = {d: s.basis for d, s in enumerate(state.sides) if isinstance(s, SubspaceSide)}

        mean = state.mean + begun * (1 - b1) * (gradient - state.mean)
        seen = mean_squares(projected(gradient, full), thin)
        square = state.square + begun * (1 - b2) * (seen - state.square)
        correction = jnp.sqrt(1 - b2**steps) / (1 - b1**steps)
        scales = correction / (jnp.sqrt(square) + eps)
        step = projected(scaled(projected(mean, full), scales, thin), full, back=True)

        def measured(side: Any, dim: int) -> Any:
            if isinstance(side, EigenSide):
                moment = second_moment(gradient, dim)
                return side._replace(factor=decay * side.factor + (1 - decay) * moment)
            if side is None:
                return None
            product = sketched(gradient, side.basis, dim)
            return side._replace(sketch=decay * side.sketch + (1 - decay) * product)

        sides = tuple(measured(side, dim) for dim, side in enumerate(state.sides))
        return step, SubspaceState(mean, square, sides)
