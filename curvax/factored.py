"""The factors of K-FAC and EK-FAC as the state of a preconditioner: measured and refreshed every so
many steps, and applied in all.
"""

import abc
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Scalar

from curvax import _tree
from curvax._checks import check_count, check_share
from curvax._linalg import matmul, transposed
from curvax._ownership import over_devices
from curvax._sharding import compiler_sharded
from curvax._stacks import finite_each, identities, joined, pick
from curvax.blockwise import AbstractBlockPreconditioner, Memory
from curvax.damping import AbstractFactorDamping
from curvax.memories import (
    DiagonalMemory,
    EigenMemory,
    KroneckerMemory,
    Parts,
    first_diagonal,
    never,
)
from curvax.objective import Params
from curvax.operators.factors import AbstractFactor, DiagonalFactor, spectra
from curvax.operators.kronecker import AbstractBlockMatrix, Entries, Product, Rotated
from curvax.plan import Observation, Requirement
from curvax.plan.moments import BlockMoments, Recipe
from curvax.refresh import (
    FactorMemory,
    counted,
    first_factor,
    invert,
    refresh,
    weight_of_past,
)
from curvax.taps.blocks import Block, DiagonalBlock, KroneckerBlock
from curvax.taps.statistics import Moment

# One factor of a state: the name of its memory, and "input" or "output".
Place = tuple[str, str]


class _Factors(AbstractBlockPreconditioner):
    """What K-FAC and EK-FAC share: factors with moving averages."""

    recipe: eqx.AbstractVar[Recipe]
    refresh_every: eqx.AbstractVar[int]
    stagger: eqx.AbstractVar[int]
    decay: eqx.AbstractVar[float]
    split: eqx.AbstractVar[AbstractFactorDamping]

    def __check_init__(self):
        check_count("refresh_every", self.refresh_every)
        check_count("stagger", self.stagger)
        check_share("decay", self.decay)

    def init(self, blocks: tuple[Block, ...], params: Params) -> Memory:
        leaves = jax.tree.leaves(params)
        alike: dict[Any, list[Block]] = {}
        for quantity, _ in self._slots():
            for block in quantity.mine(blocks):
                alike.setdefault((quantity.slot, _form(block, leaves)), []).append(block)
        memory: Memory = {}
        for number, group in enumerate(alike.values()):
            first, leaf = group[0], leaves[group[0].leaf]
            dtype = _tree.accumulation_dtype(leaf.dtype)
            if isinstance(first, DiagonalBlock):
                parts = tuple((block.path, 1) for block in group)
                memory[first.path] = first_diagonal(first, parts, leaf, dtype)
                continue
            parts = tuple((block.path, block.stack) for block in cast(list[KroneckerBlock], group))
            stack = sum(count for _, count in parts)
            input, output = (
                first_factor(form, stack, dtype, 2 * number + side)
                for side, form in enumerate((first.input, first.output))
            )
            memory[first.path] = self._first(input, output, parts)
        return memory

    @abc.abstractmethod
    def _first(self, input: FactorMemory, output: FactorMemory, parts: Parts) -> Any:
        """The memory of Kronecker blocks before anything was measured, around their factors."""

    def paths(self, memory: Memory) -> frozenset[str]:
        return frozenset(path for each in memory.values() for path, _ in each.parts)

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
            mine = {block.path for block in quantity.mine(blocks)}
            stale = {name: each for name, each in new.items() if name in mine}
            moments = observation[quantity]
            fresh = lambda stale=stale, moments=moments: compiler_sharded(
                self._refreshed, stale, stale, moments, damping, count
            )
            if due is True:
                new = new | fresh()
            else:
                new = new | jax.lax.cond(due, fresh, lambda stale=stale: stale)
        return new

    def _refreshed(self, memory: Memory, moments: Any, damping: Scalar, count: Array) -> Memory:
        kronecker = [n for n, each in memory.items() if not isinstance(each, DiagonalMemory)]
        sides = ["input"] if self.recipe.fisher == "forward_only" else ["input", "output"]
        places = [(name, side) for side in sides for name in kronecker]
        measured = [_measured(memory[name], moments, side) for name, side in places]
        updated = refresh(_at(memory, places), measured, self.decay)
        new = self._finish(memory, _replaced(memory, places, updated), places, damping)
        for name, each in memory.items():
            if isinstance(each, DiagonalMemory):
                new[name] = self._diagonal(each, moments, damping)
        # An array of its own for each: a buffer that stands twice in a state cannot be donated.
        return {name: each.with_(refreshed=count + 0) for name, each in new.items()}

    @abc.abstractmethod
    def _finish(
        self,
        old: Memory,
        new: Memory,
        places: list[Place],
        damping: Scalar,
    ) -> Memory:
        """Inverses or eigenbases of the factors that came anew, at those places."""

    def _diagonal(self, memory: DiagonalMemory, moments: Any, damping: Scalar) -> DiagonalMemory:
        if self.recipe.fisher == "forward_only":
            return memory
        old = memory.entries
        moment = _tree.stacked([moments[path] for path, _ in memory.parts]).astype(old.dtype)
        past = weight_of_past(self.decay, memory.updates, moment.dtype)
        past = past.reshape(past.shape + (1,) * (old.ndim - 1))
        entries = (past * old + (1 - past) * moment).astype(old.dtype)
        shift_of = lambda each: jnp.asarray(self.split.diagonal(damping, each), each.dtype)
        for _ in range(memory.shift.ndim):
            shift_of = jax.vmap(shift_of)
        ok = finite_each(entries)
        return memory.with_(
            entries=pick(ok, entries, old),
            shift=pick(ok, shift_of(entries), memory.shift),
            updates=memory.updates + ok.astype(jnp.int32),
            failures=memory.failures + (~ok).astype(jnp.int32),
        )

    def inverses(
        self, memory: Memory, damping: Scalar
    ) -> Iterator[tuple[tuple[str, ...], AbstractBlockMatrix]]:
        for each in memory.values():
            paths = tuple(path for path, _ in each.parts)
            if isinstance(each, DiagonalMemory):
                inner = (1,) * (each.entries.ndim - each.shift.ndim)
                shift = each.shift.reshape(each.shift.shape + inner)
                yield paths, Entries(1 / (each.entries + shift))
            else:
                yield paths, self._inverse(each, damping)

    @abc.abstractmethod
    def _inverse(self, each: Any, damping: Scalar) -> AbstractBlockMatrix:
        """The damped inverse of the Kronecker blocks of a memory."""


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

    def _first(self, input: FactorMemory, output: FactorMemory, parts: Parts) -> KroneckerMemory:
        return KroneckerMemory(input=input, output=output, refreshed=never(), parts=parts)

    def bases(self, memory: Memory, rotated: bool) -> Mapping[str, Any]:
        del rotated
        sketched = lambda factor: getattr(factor, "basis", None)
        return {
            path: (sketched(own.input.factor), sketched(own.output.factor))
            for each in memory.values()
            if isinstance(each, KroneckerMemory)
            for path, own in each.split()
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
        for name in dict.fromkeys(name for name, _ in places):
            both = new[name].input.factor, new[name].output.factor
            shifts[name, "input"], shifts[name, "output"] = self.split.shifts(damping, *both)
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

    def _first(self, input: FactorMemory, output: FactorMemory, parts: Parts) -> EigenMemory:
        sizes, dtype = (output.factor.size, input.factor.size), input.factor.trace().dtype
        stack = sum(count for _, count in parts)
        # The scales are inverted instead of the factors.
        nothing = lambda: DiagonalFactor(jnp.zeros((stack, 0), dtype))

        def identity(factor: AbstractFactor) -> Array | None:
            dense = not isinstance(factor, DiagonalFactor)
            return identities(stack, factor.size, dtype) if dense else None

        return EigenMemory(
            input=input._replace(inverse=nothing()),
            output=output._replace(inverse=nothing()),
            input_basis=identity(input.factor),
            output_basis=identity(output.factor),
            scales=jnp.ones((stack, *sizes), dtype),
            updates=jnp.zeros((stack,), jnp.int32),
            refreshed=never(),
            parts=parts,
        )

    def bases(self, memory: Memory, rotated: bool) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for each in memory.values():
            for path, own in each.split() if isinstance(each, EigenMemory) else ():
                eigenbases = ((own.input_basis, own.output_basis),) if rotated else ()
                found[path] = (None, None, *eigenbases)
        return found

    def _finish(
        self,
        old: Memory,
        new: Memory,
        places: list[Place],
        damping: Scalar,
    ) -> Memory:
        del damping
        names = list(dict.fromkeys(name for name, _ in places))
        sides = [(name, side) for name in names for side in ("input", "output")]
        factors = [each.factor for each in _at(new, sides)]
        spectrum = lambda _, factors: spectra(factors)
        found = dict(zip(sides, over_devices(spectrum, sides, factors), strict=True))
        for name in names:
            was, now = old[name], new[name]
            # Old moments in the new bases; the first time from the factors themselves.
            turned, values = was.scales, {}
            for side in ("output", "input"):
                spectrum, before = found[name, side], getattr(was, f"{side}_basis")
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
                now = now.with_(**{side: factor, f"{side}_basis": basis})
            fresh = values["output"][:, :, None] * values["input"][:, None, :]
            new[name] = now.with_(scales=pick(was.updates > 0, turned, fresh))
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
            measured = lambda: compiler_sharded(self._scaled, memory, memory, observation[quantity])
            memory = measured() if due is True else jax.lax.cond(due, measured, lambda: memory)
        return super().update(memory, blocks, observation, damping, count)

    def _scaled(self, memory: Memory, moments: Any) -> Memory:
        new = dict(memory)
        for name, each in memory.items():
            if not isinstance(each, EigenMemory):
                continue
            moment = joined([moments[path].rotated for path, _ in each.parts])
            moment = moment.astype(each.scales.dtype)
            past = weight_of_past(self.decay, each.updates, each.scales.dtype)[:, None, None]
            scales = past * each.scales + (1 - past) * moment
            ready = finite_each(scales) & (each.input.updates > 0)
            new[name] = each.with_(
                scales=pick(ready, scales, each.scales),
                updates=each.updates + ready.astype(jnp.int32),
            )
        return new

    def _inverse(self, each: EigenMemory, damping: Scalar) -> Rotated:
        scales = each.scales
        shift = jax.vmap(lambda s: jnp.asarray(self.split.diagonal(damping, s), s.dtype))(scales)
        inverse = pick(each.input.updates > 0, 1 / (scales + shift[:, None, None]), 1.0)
        return Rotated(each.output_basis, each.input_basis, inverse)


def _form(block: Block, leaves: list[Any]) -> Hashable:
    """What blocks have in common that are kept, refreshed and applied in one stack."""
    dtypes = tuple(leaves[leaf].dtype for leaf in block.leaves)
    if isinstance(block, DiagonalBlock):
        return leaves[block.leaf].shape, block.loops, dtypes
    return block.input, block.output, block.flipped, dtypes


def _measured(each: Any, moments: Mapping[str, Any], side: str) -> Moment:
    """One side of the moments of all blocks of a memory, in the dtype of its factor: a model may
    compute in another one than that of its parameters.
    """
    own = [getattr(moments[path], side) for path, _ in each.parts]
    dtype = jax.tree.leaves(getattr(each, side).factor)[0].dtype
    return jax.tree.map(lambda *stacks: joined(stacks).astype(dtype), *own)


def _at(tree: Mapping[str, Any], places: list[Place]) -> list[Any]:
    """What a state has at some places."""
    return [getattr(tree[name], side) for name, side in places]


def _replaced(memory: Memory, places: list[Place], factors: list[FactorMemory]) -> Memory:
    """The state with other factors at those places."""
    new = dict(memory)
    for (name, side), factor in zip(places, factors, strict=True):
        new[name] = new[name].with_(**{side: factor})
    return new
