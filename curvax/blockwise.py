"""Gradients preconditioned by blocks, composed into an Optax transformation.

Where `second_order` solves with curvature that is linearised anew in each step, the curvature here
is state: factors that are measured and refreshed every so many steps, and applied in all.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar, ScalarLike

from curvax import _tree
from curvax.damping import AbstractDamping, as_damping
from curvax.masking import first_blocks, hidden, later_blocks, visible
from curvax.objective import Batch, Objective, Params, bound_objective, keep_unmasked
from curvax.operators.factors import AbstractFactor, DiagonalFactor
from curvax.operators.kronecker import (
    AbstractBlockMatrix,
    Entries,
    Product,
    Rotated,
    apply_blocks,
    tikhonov,
)
from curvax.plan import (
    AbstractCurvatureQuantity,
    GainRatio,
    GaussNewtonCurvature,
    Observation,
    Plan,
    Requirement,
)
from curvax.plan.moments import BlockMoments, Recipe
from curvax.refresh import FactorMemory, first_factor, invert, refresh, weight_of_past
from curvax.scalings import AbstractScaling, AsIs, Context, seen_by
from curvax.taps.blocks import Block, DiagonalBlock, Form, KroneckerBlock
from curvax.transform import Method, SecondOrderState, first_state, measured, observe_in_update


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


Memory = dict[str, Any]


class AbstractBlockPreconditioner(eqx.Module):
    """Curvature by blocks, as state: what is observed, what is kept of it, and its inverse.

    `recipe` says which blocks there are. The state is a dict by the path of a block's leaf; its
    structure, shapes and dtypes must stay what `init` made them.
    """

    recipe: eqx.AbstractVar[Recipe]

    @abc.abstractmethod
    def requirements(self) -> tuple[Requirement, ...]:
        """The quantities it wants, and when."""

    @abc.abstractmethod
    def init(self, blocks: tuple[Block, ...], params: Params) -> Memory:
        """The state of each block, by the path of its leaf."""

    @abc.abstractmethod
    def update(
        self,
        memory: Memory,
        blocks: tuple[Block, ...],
        observation: Observation,
        damping: Scalar,
        count: Int[Array, ""],
    ) -> Memory:
        """The state after an observation."""

    @abc.abstractmethod
    def inverse(self, memory: Memory, block: Block, damping: Scalar) -> AbstractBlockMatrix:
        """The damped inverse of a block."""

    @abc.abstractmethod
    def bases(self, memory: Memory, rotated: bool) -> Mapping[str, Any]:
        """What the moments of the next step are measured in."""


class AbstractFactorDamping(eqx.Module):
    """How a damping λ of a Kronecker product is shared out between its factors.

    (G + γ_G I) ⊗ (A + γ_A I) stands in for G ⊗ A + λI. What a subclass returns must be positive,
    also for factors that are zero; factors are stacks, and shifts have one entry for each matrix.
    """

    @abc.abstractmethod
    def shifts(
        self, damping: Scalar, input: AbstractFactor, output: AbstractFactor
    ) -> tuple[Array, Array]:
        """What to add to the input and to the output factor of each matrix of a stack."""

    @abc.abstractmethod
    def diagonal(self, damping: Scalar, entries: Array) -> Array:
        """What to add to a diagonal block, or to the second moments of EK-FAC."""


class FactoredTikhonov(AbstractFactorDamping):
    """π√λ to A and √λ/π to G, with π² the ratio of their mean eigenvalues (Martens & Grosse 2015,
    section 6.3). λ has the units of the curvature, so that it scales with the loss.
    """

    def shifts(self, damping: Scalar, input: Any, output: Any) -> tuple[Array, Array]:
        return tikhonov(damping, input, output, pi=True)

    def diagonal(self, damping: Scalar, entries: Array) -> Array:
        del entries
        return damping


class RelativeTikhonov(AbstractFactorDamping):
    """√λ times the mean eigenvalue to each factor: the same rule, with λ as a share of the mean
    eigenvalue of each block, and so without units.
    """

    def shifts(self, damping: Scalar, input: Any, output: Any) -> tuple[Array, Array]:
        root = jnp.sqrt(damping)
        means = [factor.trace() / factor.size for factor in (input, output)]
        tiny = jnp.finfo(means[0].dtype).tiny
        floors = [jnp.maximum(root.astype(mean.dtype) * mean, tiny**0.5) for mean in means]
        return floors[0], floors[1]

    def diagonal(self, damping: Scalar, entries: Array) -> Array:
        mean = jnp.mean(entries)
        return jnp.maximum(damping.astype(mean.dtype) * mean, jnp.finfo(mean.dtype).tiny ** 0.5)


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
        kronecker = [b for b in blocks if isinstance(b, KroneckerBlock)]
        forward_only = self.recipe.fisher == "forward_only"
        sides = ["input"] if forward_only else ["input", "output"]
        old = [getattr(memory[b.path], side) for side in sides for b in kronecker]
        given = [getattr(moments[b.path], side) for side in sides for b in kronecker]
        updated = refresh(old, given, self.decay)
        new = dict(memory)
        for (side, block), each in zip(
            ((side, b) for side in sides for b in kronecker), updated, strict=True
        ):
            new[block.path] = new[block.path]._replace(**{side: each})
        new = self._finish(memory, new, kronecker, sides, damping)
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
        blocks: list[KroneckerBlock],
        sides: list[str],
        damping: Scalar,
    ) -> Memory:
        """Inverses or eigenbases of the factors that came anew."""

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
        entries = each.entries
        shifted = entries + jnp.asarray(self.split.diagonal(damping, entries), entries.dtype)
        return Entries(jnp.where(each.updates > 0, 1 / shifted, 1.0))

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
        blocks: list[KroneckerBlock],
        sides: list[str],
        damping: Scalar,
    ) -> Memory:
        del old
        shifts = {}
        for block in blocks:
            both = new[block.path].input.factor, new[block.path].output.factor
            shifts[block.path] = dict(
                zip(("input", "output"), self.split.shifts(damping, *both), strict=True)
            )
        pairs = [(side, block) for side in sides for block in blocks]
        inverted = invert(
            [getattr(new[b.path], side) for side, b in pairs],
            [shifts[b.path][side] for side, b in pairs],
        )
        for (side, block), each in zip(pairs, inverted, strict=True):
            new[block.path] = new[block.path]._replace(**{side: each})
        return new

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
        blocks: list[KroneckerBlock],
        sides: list[str],
        damping: Scalar,
    ) -> Memory:
        del sides, damping
        for block in blocks:
            was, now = old[block.path], new[block.path]
            bases, values, overlaps = [], [], []
            for side in ("input", "output"):
                factor = getattr(now, side).factor
                before = getattr(was, f"{side}_basis")
                if before is None:
                    bases.append(None)
                    values.append(factor.diagonal())
                    overlaps.append(None)
                    continue
                spectrum = factor.spectrum()
                ok = jnp.all(jnp.isfinite(spectrum.vectors))
                bases.append(jnp.where(ok, spectrum.vectors, before))
                values.append(jnp.where(ok, spectrum.values, 1))
                turn = jnp.swapaxes(bases[-1], 1, 2) @ before
                overlaps.append(jnp.square(turn))
            # The first time from the factors themselves, then the old moments in the new basis.
            fresh = jnp.einsum("sm,sn->smn", values[1], values[0])
            turned = was.scales if overlaps[1] is None else overlaps[1] @ was.scales
            if overlaps[0] is not None:
                turned = turned @ jnp.swapaxes(overlaps[0], 1, 2)
            scales = jnp.where(was.updates > 0, turned, fresh)
            new[block.path] = now._replace(
                input_basis=bases[0], output_basis=bases[1], scales=scales
            )
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


def precondition(
    objective: Objective,
    preconditioner: AbstractBlockPreconditioner,
    *,
    damping: AbstractDamping | ScalarLike,
    scaling: AbstractScaling = AsIs(),
    curvature: AbstractCurvatureQuantity = GaussNewtonCurvature(),
) -> Method:
    """The transformation g ↦ scaling(B⁻¹ g), with B⁻¹ the damped inverse of each block.

    **Arguments:**

    - `objective`: what is minimised, with an `example` of its batches.
    - `preconditioner`: which blocks, and how they are kept.
    - `damping`: a policy, or a number for a constant λ. A policy that looks at the gain ratio gets
      it from the quadratic model of `curvature`.
    - `scaling`: what is made of the preconditioned gradient.

    `init` **raises** `ValueError` without an example, `update` without `observation` and `batch`.
    """
    damping = as_damping(damping)
    requirements = [*preconditioner.requirements(), *scaling.requirements()]
    if damping.every is not None:
        requirements.append(Requirement(curvature, "damping"))
        requirements.append(Requirement(GainRatio(), "damping", damping.every))
    plan = Plan(requirements)

    def blocks_of(params: Params, bound: Objective) -> tuple[Block, ...]:
        return preconditioner.recipe.blocks(bound, params, bound.inputs)[1]

    def init(params: Params) -> SecondOrderState:
        bound = bound_objective() or objective
        blocks, marks = first_blocks(preconditioner.recipe, bound, params)
        memory = preconditioner.init(blocks, params)
        return first_state(damping, scaling.init(params), {**memory, **marks})

    def bases(state: SecondOrderState) -> Callable[[bool], Any]:
        held, marks = visible(state.preconditioner), hidden(state.preconditioner)
        return lambda rotated: {**preconditioner.bases(held, rotated), **marks}

    def update(
        updates: Params,
        state: SecondOrderState,
        params: Params | None = None,
        *,
        observation: Observation | None = None,
        batch: Batch | None = None,
        key: PRNGKeyArray | None = None,
        curvature_batch: Batch | None = None,
        **extra: Any,
    ) -> tuple[Params, SecondOrderState]:
        del extra
        if observation is None:
            observation = observe_in_update(
                plan,
                objective,
                updates,
                state.count,
                params,
                batch,
                key,
                curvature_batch,
                bases(state),
            )
        level = damping.at(state.level, state.count)
        held, marks = visible(state.preconditioner), hidden(state.preconditioner)
        blocks = later_blocks(preconditioner.recipe, observation, updates, frozenset(marks))
        _check_blocks(blocks, held)
        memory = preconditioner.update(held, blocks, observation, level.damping, state.count)
        inverses = tuple(preconditioner.inverse(memory, b, level.damping) for b in blocks)
        direction = apply_blocks(blocks, inverses, updates)
        seen = keep_unmasked(updates, observation.params) if marks else observation.params
        context = Context(updates, seen, observation, level.damping, blocks)
        direction, scaled = scaling.apply(state.solution, direction, context)
        length, gradient_norm = _tree.norm(direction), _tree.norm(updates)
        finite = (
            jnp.isfinite(observation.value) & jnp.isfinite(gradient_norm) & jnp.isfinite(length)
        )
        metrics = measured(observation, level, gradient_norm, length, finite)
        memory = {**memory, **marks}
        new = state._replace(level=level, solution=scaled, preconditioner=memory, metrics=metrics)
        operator = lambda: seen_by(observation[curvature], updates)
        new, take = method.conclude(observation, operator, updates, direction, new, state)
        taken = direction
        if not observation.judged_later:  # a fused step leaves out the whole update
            taken = _tree.where(take, direction, _tree.zeros_like(direction))
        return _tree.cast(taken, updates if params is None else params), new

    method = Method(cast(Any, init), cast(Any, update))
    method.objective, method.plan, method.curvature = objective, plan, curvature
    method.damping, method.solver = damping, None
    method.bases = bases
    method.blocks = blocks_of
    return method


def never() -> Int[Array, ""]:
    """The step of a refresh that has not been."""
    return jnp.full((), -1, jnp.int32)


def _check_blocks(blocks: tuple[Block, ...], memory: Memory) -> None:
    here, there = {block.path for block in blocks}, set(memory)
    if here != there:
        raise ValueError(
            f"batch: the model uses its parameters otherwise than on the objective's example: "
            f"blocks {sorted(here ^ there)} are in one but not in the other."
        )
