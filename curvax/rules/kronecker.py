"""A gradient times inverse roots of its second moments, one for each dimension of its tensors."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from curvax._checks import check_cadence, check_decays
from curvax.roots import (
    AbstractInverseRoot,
    EigenbasisRoot,
    RootState,
    first_root,
    refreshed,
)
from curvax.rules.base import AbstractTensorRule
from curvax.rules.low_rank import LowRankSide, first_low_rank, refreshed_sides, rooted
from curvax.rules.sides import along, second_moment, spread, with_factor
from curvax.taps.blocks import Form
from curvax.taps.wishes import SideRank, as_rank


class FullSide(NamedTuple):
    """Of a dimension of length n the second moment, n × n, and its inverse root."""

    factor: Float[Array, "stack n n"]
    root: RootState

    @property
    def resting(self) -> Any:
        """What only refreshes read."""
        return self.factor, self.root.memory

    def measured(self, stack: Array, dim: int, decay: Array, weight: Array) -> "FullSide":
        """After a gradient."""
        moment = second_moment(stack, dim)
        return self._replace(factor=decay * self.factor + weight * moment)

    def applied(self, stack: Array, dim: int) -> Array:
        """The inverse root times each vector along a dimension."""
        return along(stack, self.root.root, dim)


class DiagonalSide(NamedTuple):
    """Of a dimension the diagonal of the second moment."""

    factor: Float[Array, "stack n"]

    def measured(self, stack: Array, dim: int, decay: Array, weight: Array) -> "DiagonalSide":
        """After a gradient."""
        others = [i for i in range(1, stack.ndim) if i != dim + 1]
        return DiagonalSide(decay * self.factor + weight * jnp.sum(jnp.square(stack), others))


Side = FullSide | LowRankSide | DiagonalSide | None


class KroneckerState(NamedTuple):
    """For each dimension of the tensors of a stack its factor, or None."""

    sides: tuple[Side, ...]


class KroneckerRoots(AbstractTensorRule):
    """G ×₁ L₁^−e ×₂ L₂^−e … with a second moment Lᵢ for each dimension: Shampoo's direction (Gupta,
    Koren & Singer 2018, algorithm 2).

    Lᵢ ← βLᵢ + (1 − β)G₍ᵢ₎G₍ᵢ₎ᵀ, corrected for its start at zero as Adam's averages are (Shi et al.
    2023); for β = 1 the sum. In a step with a refresh, roots are those of the moments with this
    step's gradient.

    **Arguments:**

    - `root`: the way to the inverse roots.
    - `decay`: β.
    - `refresh_every`, `statistics_every`: steps from one refresh of the roots, and from one
      measurement of the moments, to the next.
    - `exponent`: e. None is 1/(2k) for k dimensions that have a factor.
    - `longest`: longer dimensions have no factor; with `diagonal` they have a diagonal one.
    - `one_sided`: only the shortest dimension has a factor.
    - `early`: roots are also refreshed in those of the first `refresh_every` steps whose number is
      a power of two. The moment of a few gradients is singular, and a root of it that is kept for
      long blows up what later gradients have outside of its range.
    - `rank`: how a factor is held: a share of its size, a number of columns, or None for full
      matrices. Dimensions of at most 32 have full ones, and those above 8192 none.
    """

    root: AbstractInverseRoot = EigenbasisRoot()
    decay: ScalarLike = 0.99
    refresh_every: int = eqx.field(static=True, default=10)
    statistics_every: int = eqx.field(static=True, default=1)
    exponent: float | None = eqx.field(static=True, default=None)
    longest: int | None = eqx.field(static=True, default=None)
    diagonal: bool = eqx.field(static=True, default=False)
    one_sided: bool = eqx.field(static=True, default=False)
    early: bool = eqx.field(static=True, default=True)
    rank: SideRank = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_decays(sums=True, decay=self.decay)
        check_cadence("refresh_every", self.refresh_every)
        check_cadence("statistics_every", self.statistics_every)
        if self.exponent is not None and not self.exponent > 0:
            raise ValueError(f"exponent: got {self.exponent}, wanted a positive number.")
        as_rank(self.rank)
        if self.rank is not None and jax.tree.leaves(self.root.init(1, 1, jnp.float32)):
            raise ValueError(
                f"root: got {type(self.root).__name__} with rank={self.rank}, wanted one that "
                "remembers nothing, such as CoupledNewtonRoot: a core has new coordinates after "
                "each refresh."
            )

    def init(self, stack: Array) -> KroneckerState:
        count, *shape = stack.shape
        sides: list[Side] = []
        factors = with_factor(stack.shape[1:], self.longest, self.one_sided)
        for dim, (size, has) in enumerate(zip(shape, factors, strict=True)):
            form = Form.of(size, math.prod(shape) // size, self.rank)
            if has and self.rank is not None and form.kind == "sketch":
                side = first_low_rank(self.root, count, size, form.rank, stack.dtype, dim)
                sides.append(side)
            elif has and (self.rank is None or form.kind == "full"):
                zeros = jnp.zeros((count, size, size), stack.dtype)
                sides.append(FullSide(zeros, first_root(self.root, count, size, stack.dtype)))
            elif self.diagonal and not self.one_sided:
                sides.append(DiagonalSide(jnp.zeros((count, size), stack.dtype)))
            else:
                sides.append(None)
        if any(isinstance(side, FullSide | LowRankSide) for side in sides):
            self.root.check(self._exponent(sides))
        return KroneckerState(tuple(sides))

    def observe(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> Sequence[KroneckerState]:
        measure = lambda states: list(map(self._measured, stacks, states))
        if self.statistics_every == 1:
            return measure(states)
        due = count % self.statistics_every == 0
        return jax.lax.cond(due, measure, lambda states: states, list(states))

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        due = count % self.refresh_every == 0
        if self.early:
            due = due | ((count < self.refresh_every) & (count & (count - 1) == 0))
        return due

    def refresh(self, states: Sequence[Any], count: Int[Array, ""]) -> Sequence[KroneckerState]:
        rooted_sides = [
            (side, self._exponent(state.sides))
            for state in states
            for side in state.sides
            if isinstance(side, FullSide | LowRankSide)
        ]
        thin = iter(refreshed_sides([s for s, _ in rooted_sides if isinstance(s, LowRankSide)]))
        held = [(next(thin) if isinstance(s, LowRankSide) else s, e) for s, e in rooted_sides]
        scales = [self._correction(count, side.root.root.dtype) for side, _ in held]
        matrices = [
            (side.factor if isinstance(side, FullSide) else side.factor.core) / scale
            for (side, _), scale in zip(held, scales, strict=True)
        ]
        exponents = [exponent for _, exponent in held]
        roots = [side.root for side, _ in held]
        roots = refreshed(self.root, matrices, roots, exponents, count == 0)
        new = iter(
            side._replace(root=root)
            if isinstance(side, FullSide)
            else rooted(side, root, self.root, exponent, scale)
            for (side, exponent), root, scale in zip(held, roots, scales, strict=True)
        )
        fresh = lambda side: next(new) if isinstance(side, FullSide | LowRankSide) else side
        return [KroneckerState(tuple(map(fresh, state.sides))) for state in states]

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        return [
            self._applied(stack, state.sides, count)
            for stack, state in zip(stacks, states, strict=True)
        ], states

    def _exponent(self, sides: Sequence[Side]) -> float:
        if self.exponent is not None:
            return self.exponent
        return 1 / (2 * max(sum(side is not None for side in sides), 1))

    def _correction(self, count: Int[Array, ""], dtype: Any) -> Array:
        """What a moving average that started at zero has of its value."""
        decay = jnp.asarray(self.decay, dtype)
        measured = (count // self.statistics_every + 1).astype(dtype)
        return jnp.where(decay < 1, 1 - decay**measured, 1)

    def _measured(self, stack: Array, state: KroneckerState) -> KroneckerState:
        decay = jnp.asarray(self.decay, stack.dtype)
        weight = jnp.where(decay < 1, 1 - decay, 1)
        return KroneckerState(
            tuple(
                None if side is None else side.measured(stack, dim, decay, weight)
                for dim, side in enumerate(state.sides)
            )
        )

    def _applied(self, stack: Array, sides: Sequence[Side], count: Int[Array, ""]) -> Array:
        exponent = self._exponent(sides)
        for dim, side in enumerate(sides):
            if isinstance(side, FullSide | LowRankSide):
                stack = side.applied(stack, dim)
            elif isinstance(side, DiagonalSide):
                values = side.factor / self._correction(count, stack.dtype)
                values = values + self.root.lift(jnp.max(values, axis=1))[:, None]
                # Nothing has come in where a value is zero.
                safe = jnp.where(values > 0, values, 1)
                stack = stack * spread(safe**-exponent, dim, stack.ndim - 1)
        return stack
