"""The factors of K-FAC and EK-FAC as the state of a preconditioner: measured and refreshed every so
many steps, and applied in all.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from curvax import _tree
from curvax._linalg import matmul, transposed
from curvax.blockwise import AbstractBlockPreconditioner, Memory
from curvax.damping import AbstractFactorDamping
from curvax.objective import Params
from curvax.operators.factors import DiagonalFactor, spectra
from curvax.operators.kronecker import AbstractBlockMatrix, Entries, Product, Rotated
from curvax.plan import Observation, Requirement
from curvax.plan.moments import BlockMoments, Recipe
from curvax.refresh import (
    FactorMemory,
    counted,
    finite_each,
    first_factor,
    invert,
    pick,
    refresh,
    weight_of_past,
)
from curvax.taps.blocks import Block, DiagonalBlock, Form, KroneckerBlock

# One factor of a state: the path of its block, and "input" or "output".
Place = tuple[str, str]


class KroneckerMemory(NamedTuple):
    """The factors of one Kronecker block. `refreshed` is the step of the last refresh, −1
    before the first.
    """

    input: FactorMemory
    output: FactorMemory
    refreshed: Int[Array, ""]


class EigenMemory(NamedTuple):
    """Factors, their eigenbases, and the second moments of gradients in those."""

    input: FactorMemory
    output: FactorMemory
    input_basis: Float[Array, "stack in in"] | None
    output_basis: Float[Array, "stack out out"] | None
    scales: Float[Array, "stack out in"]
    updates: Int[Array, ""]
    refreshed: Int[Array, ""]


class DiagonalMemory(NamedTuple):
    """The moving average of a diagonal block, of the shape of its leaf."""

    entries: Array
    updates: Int[Array, ""]
    failures: Int[Array, ""]
    refreshed: Int[Array, ""]


class _Factors(AbstractBlockPreconditioner):
    """What K-FAC and EK-FAC share: factors with moving averages."""

    recipe: eqx.AbstractVar[Recipe]
    refresh_every: eqx.AbstractVar[int]
    stagger: eqx.AbstractVar[int]
    decay: eqx.AbstractVar[float]
    split: eqx.AbstractVar[AbstractFactorDamping]

    def __check_init__(self):
        for name in ("refresh_every", "stagger"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1.")
        if isinstance(self.decay, int | float) and not 0 <= self.decay < 1:
            raise ValueError(f"decay: got {self.decay}, wanted a number in [0, 1).")

    def init(self, blocks: tuple[Block, ...], params: Params) -> Memory:
        leaves = jax.tree.leaves(params)
        memory: Memory = {}
        for number, block in enumerate(blocks):
            leaf = leaves[block.leaf]
            dtype = _tree.accumulation_dtype(leaf.dtype)
            if isinstance(block, DiagonalBlock):
                zero = lambda: jnp.zeros((), jnp.int32)
                entries = jnp.zeros(leaf.shape, dtype)
                memory[block.path] = DiagonalMemory(entries, zero(), zero(), never())
            else:
                input, output = (
                    first_factor(form, block.stack, dtype, 2 * number + side)
                    for side, form in enumerate((block.input, block.output))
                )
                memory[block.path] = self._first(block, input, output)
        return memory

    @abc.abstractmethod
    def _first(self, block: KroneckerBlock, input: FactorMemory, output: FactorMemory) -> Any:
        """The state of a block before anything was measured, around that of its factors."""

    def _slots(self) -> list[tuple[BlockMoments, int]]:
        """The quantity of each slot, and the step of a cycle that it is due on."""
        slots = min(self.stagger, self.refresh_every)
        return [
            (BlockMoments(self.recipe, slot, slots), slot * self.refresh_every // slots)
            for slot in range(slots)
        ]

    def requirements(self) -> tuple[Requirement, ...]:
        return tuple(
            Requirement(quantity, "factors", self.refresh_every, offset)
            for quantity, offset in self._slots()
        )

    def update(
        self,
        memory: Memory,
        blocks: tuple[Block, ...],
        observation: Observation,
        damping: Scalar,
        count: Int[Array, ""],
    ) -> Memory:
        new = memory
        for quantity, _ in self._slots():
            due = observation.due(quantity)
            if due is False:
                continue
            mine = quantity.mine(blocks)
            moments = observation[quantity]
            fresh = lambda new=new, mine=mine, moments=moments: self._refreshed(
                {b.path: new[b.path] for b in mine}, mine, moments, damping, count
            )
            if due is True:
                new = new | fresh()
            else:
                stale = {b.path: new[b.path] for b in mine}
                new = new | jax.lax.cond(due, fresh, lambda stale=stale: stale)
        return new

    def _refreshed(
        self,
        memory: Memory,
        blocks: tuple[Block, ...],
        moments: Any,
        damping: Scalar,
        count: Array,
    ) -> Memory:
        kronecker = [b.path for b in blocks if isinstance(b, KroneckerBlock)]
        sides = ["input"] if self.recipe.fisher == "forward_only" else ["input", "output"]
        places = [(path, side) for side in sides for path in kronecker]
        updated = refresh(_at(memory, places), _at(moments, places), self.decay)
        new = self._finish(memory, _replaced(memory, places, updated), places, damping)
        for block in blocks:
            if isinstance(block, DiagonalBlock):
                new[block.path] = self._diagonal(memory[block.path], moments[block.path])
        # An array of its own for each: a buffer that stands twice in a state cannot be donated.
        return {path: each._replace(refreshed=count + 0) for path, each in new.items()}

    @abc.abstractmethod
    def _finish(
        self,
        old: Memory,
        new: Memory,
        places: list[Place],
        damping: Scalar,
    ) -> Memory:
        """Inverses or eigenbases of the factors that came anew, at those places."""

    def _diagonal(self, memory: DiagonalMemory, moment: Array) -> DiagonalMemory:
        if self.recipe.fisher == "forward_only":
            return memory
        past = weight_of_past(self.decay, memory.updates, moment.dtype)
        old = memory.entries
        entries = (past * old + (1 - past) * moment).astype(old.dtype)
        ok = jnp.all(jnp.isfinite(entries))
        return memory._replace(
            entries=jnp.where(ok, entries, old),
            updates=memory.updates + ok.astype(jnp.int32),
            failures=memory.failures + (~ok).astype(jnp.int32),
        )

    def inverse(self, memory: Memory, block: Block, damping: Scalar) -> AbstractBlockMatrix:
        each = memory[block.path]
        if not isinstance(block, DiagonalBlock):
            return self._inverse(each, damping)

        def shifted(entries: Array) -> Array:
            return entries + jnp.asarray(self.split.diagonal(damping, entries), entries.dtype)

        for _ in range(block.loops):  # each layer of a scanned leaf by itself
            shifted = jax.vmap(shifted)
        return Entries(jnp.where(each.updates > 0, 1 / shifted(each.entries), 1.0))

    @abc.abstractmethod
    def _inverse(self, each: Any, damping: Scalar) -> AbstractBlockMatrix:
        """The damped inverse of a Kronecker block."""


class KroneckerPreconditioner(_Factors):
    """(A + γ_A I)⁻¹ and (G + γ_G I)⁻¹ on the two sides of the gradient (Martens & Grosse 2015).

    **Arguments:** `recipe`; `refresh_every`, `stagger`, `decay` and `split` as of
    [`kfac`][curvax.methods.kfac.kfac].
    """

    recipe: Recipe = eqx.field(static=True)
    refresh_every: int = eqx.field(static=True)
    stagger: int = eqx.field(static=True)
    decay: float
    split: AbstractFactorDamping

    def _first(
        self, block: KroneckerBlock, input: FactorMemory, output: FactorMemory
    ) -> KroneckerMemory:
        del block
        return KroneckerMemory(input, output, never())

    def bases(self, memory: Memory, rotated: bool) -> Mapping[str, Any]:
        del rotated
        sketched = lambda factor: getattr(factor, "basis", None)
        return {
            path: (sketched(each.input.factor), sketched(each.output.factor))
            for path, each in memory.items()
            if isinstance(each, KroneckerMemory)
        }

    def _finish(
        self,
        old: Memory,
        new: Memory,
        places: list[Place],
        damping: Scalar,
    ) -> Memory:
        del old
        shifts: dict[Place, Array] = {}
        for path in dict.fromkeys(path for path, _ in places):
            both = new[path].input.factor, new[path].output.factor
            shifts[path, "input"], shifts[path, "output"] = self.split.shifts(damping, *both)
        inverted = invert(_at(new, places), [shifts[place] for place in places])
        return _replaced(new, places, inverted)

    def _inverse(self, each: KroneckerMemory, damping: Scalar) -> Product:
        del damping  # it went into the inverses when they were refreshed
        return Product(each.output.damped_inverse, each.input.damped_inverse)


class EigenPreconditioner(_Factors):
    """The inverse of second moments, measured in the eigenbasis of the Kronecker factors (George et
    al. 2018). The factors are refreshed as in K-FAC, the moments one step later in the new basis.

    **Arguments:** as of [`KroneckerPreconditioner`][curvax.KroneckerPreconditioner]; the recipe's
    factors are full (`rank=None`).
    """

    recipe: Recipe = eqx.field(static=True)
    refresh_every: int = eqx.field(static=True)
    stagger: int = eqx.field(static=True)
    decay: float
    split: AbstractFactorDamping

    def _rotated(self) -> BlockMoments:
        return BlockMoments(self.recipe, rotated=True)

    def requirements(self) -> tuple[Requirement, ...]:
        after = 1 % self.refresh_every
        rotated = Requirement(self._rotated(), "scales", self.refresh_every, after)
        return (*super().requirements(), rotated)

    def _first(
        self, block: KroneckerBlock, input: FactorMemory, output: FactorMemory
    ) -> EigenMemory:
        stack, dtype = block.stack, input.factor.trace().dtype
        none = DiagonalFactor(jnp.zeros((stack, 0), dtype))  # the scales are inverted instead

        def identity(form: Form) -> Array | None:
            if form.kind == "diagonal":
                return None
            square = jnp.zeros((stack, form.size, form.size), dtype)
            return square + jnp.eye(form.size, dtype=dtype)[None]

        return EigenMemory(
            input._replace(inverse=none),
            output._replace(inverse=jax.tree.map(jnp.copy, none)),
            identity(block.input),
            identity(block.output),
            jnp.ones((stack, block.output.size, block.input.size), dtype),
            jnp.zeros((), jnp.int32),
            never(),
        )

    def bases(self, memory: Memory, rotated: bool) -> Mapping[str, Any]:
        kronecker = {p: m for p, m in memory.items() if isinstance(m, EigenMemory)}
        if not rotated:
            return {path: (None, None) for path in kronecker}
        return {
            path: (None, None, (each.input_basis, each.output_basis))
            for path, each in kronecker.items()
        }

    def _finish(
        self,
        old: Memory,
        new: Memory,
        places: list[Place],
        damping: Scalar,
    ) -> Memory:
        del damping
        paths = list(dict.fromkeys(path for path, _ in places))
        sides = [(path, side) for path in paths for side in ("input", "output")]
        found = dict(zip(sides, spectra([each.factor for each in _at(new, sides)]), strict=True))
        for path in paths:
            was, now = old[path], new[path]
            # Old moments in the new bases; the first time from the factors themselves.
            turned, values = was.scales, {}
            for side in ("output", "input"):
                spectrum, before = found[path, side], getattr(was, f"{side}_basis")
                vectors, values[side] = spectrum.vectors, spectrum.values
                if vectors is None:  # a diagonal has its basis already
                    continue
                ok = finite_each(vectors)
                values[side] = pick(ok, spectrum.values, jnp.ones_like(spectrum.values))
                basis = pick(ok, vectors, before)
                overlap = jnp.square(matmul(transposed(basis), before))
                if side == "output":
                    turned = matmul(overlap, turned)
                else:
                    turned = matmul(turned, transposed(overlap))
                factor = getattr(now, side)
                factor = counted(factor, factor.updates, ok)
                now = now._replace(**{side: factor, f"{side}_basis": basis})
            fresh = values["output"][:, :, None] * values["input"][:, None, :]
            new[path] = now._replace(scales=jnp.where(was.updates > 0, turned, fresh))
        return new

    def update(
        self,
        memory: Memory,
        blocks: tuple[Block, ...],
        observation: Observation,
        damping: Scalar,
        count: Int[Array, ""],
    ) -> Memory:
        quantity = self._rotated()
        due = observation.due(quantity)
        if due is not False:
            measured = lambda: self._measured(memory, observation[quantity])
            memory = measured() if due is True else jax.lax.cond(due, measured, lambda: memory)
        return super().update(memory, blocks, observation, damping, count)

    def _measured(self, memory: Memory, moments: Any) -> Memory:
        new = dict(memory)
        for path, each in memory.items():
            if not isinstance(each, EigenMemory):
                continue
            past = weight_of_past(self.decay, each.updates, each.scales.dtype)
            scales = past * each.scales + (1 - past) * moments[path].rotated
            ready = jnp.all(jnp.isfinite(scales)) & (each.input.updates[0] > 0)
            new[path] = each._replace(
                scales=jnp.where(ready, scales, each.scales),
                updates=each.updates + ready.astype(jnp.int32),
            )
        return new

    def _inverse(self, each: EigenMemory, damping: Scalar) -> Rotated:
        scales = each.scales
        shift = jax.vmap(lambda s: jnp.asarray(self.split.diagonal(damping, s), s.dtype))(scales)
        inverse = jnp.where(each.input.updates[0] > 0, 1 / (scales + shift[:, None, None]), 1.0)
        return Rotated(each.output_basis, each.input_basis, inverse)


def _at(tree: Mapping[str, Any], places: list[Place]) -> list[Any]:
    """What a state, or moments, have at some places."""
    return [getattr(tree[path], side) for path, side in places]


def _replaced(memory: Memory, places: list[Place], factors: list[FactorMemory]) -> Memory:
    """The state with other factors at those places."""
    new = dict(memory)
    for (path, side), factor in zip(places, factors, strict=True):
        new[path] = new[path]._replace(**{side: factor})
    return new


def never() -> Int[Array, ""]:
    """The step of a refresh that has not been."""
    return jnp.full((), -1, jnp.int32)
