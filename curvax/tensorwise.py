"""Transformations of gradients alone, tensor by tensor: Shampoo, SOAP, Muon and their like.

What is done with a tensor is a [`AbstractTensorRule`][curvax.AbstractTensorRule]; which tensors a
leaf consists of, a [`Layouts`][curvax.tensors.Layouts]. No extra argument is needed in an Optax
loop.
"""

import abc
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, ScalarLike

from curvax import _tree
from curvax.objective import Params
from curvax.tensors import Layout, Layouts


class AbstractTensorRule(eqx.Module):
    """What is made of a gradient, as stacks of tensors of equal shape, and what is kept of it.

    It gets the stacks of all leaves at once, so that it can do for several together what takes
    long for each, such as a factorisation. A state keeps its structure, shapes and dtypes.
    """

    @abc.abstractmethod
    def init(self, stack: Array) -> Any:
        """The state of one stack, from zeros of its shape (stack, *dimensions) and dtype."""

    @abc.abstractmethod
    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        """The direction of each stack, with the gradient's sign, and its new state; `count` is the
        number of steps taken so far, without those skipped. Stacks of low precision come as
        float32. What is not finite in a gradient never gets into a state, but what fails on finite
        numbers (a factorisation) is for the rule to look after.
        """

    # What is done at a cadence, before `update`. Nothing, unless a rule says otherwise.

    def observe(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> Sequence[Any]:
        """The states after what a refresh in the same step is to have seen of the gradient."""
        del stacks, count
        return states

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""] | None:
        """Whether this step has a refresh; None for a rule that has none."""
        del count
        return None

    def refresh(self, states: Sequence[Any], count: Int[Array, ""]) -> Sequence[Any]:
        """The states with what takes long done anew, for all leaves in one branch."""
        del count
        return states


class Chained(AbstractTensorRule):
    """One rule after the other: what one makes of a gradient is the gradient of the next.

    **Arguments:** `rules`. The state of a stack is a tuple of theirs.
    """

    rules: tuple[AbstractTensorRule, ...]

    def __init__(self, *rules: AbstractTensorRule):
        self.rules = rules
        for rule in rules[1:]:
            if type(rule).observe is not AbstractTensorRule.observe:
                raise ValueError(
                    f"rules: got {type(rule).__name__} behind another, wanted it first: it "
                    "observes the gradient before anything is made of it."
                )

    def init(self, stack: Array) -> tuple[Any, ...]:
        return tuple(rule.init(stack) for rule in self.rules)

    def update(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> tuple[Sequence[Array], Sequence[Any]]:
        kept: list[Sequence[Any]] = []
        for i, rule in enumerate(self.rules):
            stacks, new = rule.update(stacks, [state[i] for state in states], count)
            kept.append(new)
        return stacks, [tuple(each[i] for each in kept) for i in range(len(stacks))]

    def observe(
        self, stacks: Sequence[Array], states: Sequence[Any], count: Int[Array, ""]
    ) -> Sequence[Any]:
        first = self.rules[0].observe(stacks, [state[0] for state in states], count)
        return [(new, *state[1:]) for new, state in zip(first, states, strict=True)]

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""] | None:
        dues = [due for rule in self.rules if (due := rule.due(count)) is not None]
        return functools.reduce(operator.or_, dues) if dues else None

    def refresh(self, states: Sequence[Any], count: Int[Array, ""]) -> Sequence[Any]:
        columns = [list(column) for column in zip(*states, strict=True)]
        for i, rule in enumerate(self.rules):
            due = rule.due(count)
            if due is not None:
                fresh = lambda states, rule=rule: list(rule.refresh(states, count))
                columns[i] = jax.lax.cond(due, fresh, lambda states: states, columns[i])
        return list(zip(*columns, strict=True))


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
        if isinstance(self.decay, int | float) and not 0 <= self.decay < 1:
            raise ValueError(f"momentum: got {self.decay}, wanted a number in [0, 1).")

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


class TensorwiseState(NamedTuple):
    """State of a tensorwise transformation.

    `tensors` has the states of a leaf's stacks under its path; `magnitude` and `rest` are those of
    other transformations, which see an `optax.MaskedNode()` for what is not theirs. `skipped`
    counts the steps that were not taken, as the square norm of the gradient was not finite.
    """

    count: Int[Array, ""]
    skipped: Int[Array, ""]
    tensors: dict[str, tuple[Any, ...]]
    magnitude: Any
    rest: Any


def tensorwise(
    rule: AbstractTensorRule,
    layouts: Layouts,
    *,
    rest: optax.GradientTransformation | None = None,
    magnitude: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies a rule to the tensors of each leaf.

    **Arguments:**

    - `rule`: what is made of a tensor.
    - `layouts`: which tensors a leaf has.
    - `rest`: for leaves that are no tensors, such as `optax.scale_by_adam()`; None leaves them as
      they are.
    - `magnitude`: grafting (Agarwal et al. 2020): each tensor, before it is cut into blocks, gets
      the norm that it has after this transformation of the gradient.

    Where the square norm of the gradient is not finite, an update gives zeros, leaves the state as
    it was, and is counted in `skipped`. `init` **raises** `ValueError` for names of axes that do
    not fit.
    """
    others = optax.with_extra_args_support(optax.identity() if rest is None else rest)
    like = None if magnitude is None else optax.with_extra_args_support(magnitude)

    def init(params: Params) -> TensorwiseState:
        found, seen, unseen = _apart(layouts, params)

        def first(layout: Layout, leaf: Any) -> tuple[Any, ...]:
            dtype = _tree.accumulation_dtype(leaf.dtype)
            return tuple(rule.init(jnp.zeros(shape, dtype)) for shape in layout.blocks)

        pairs = zip(found, jax.tree.leaves(seen), strict=True)
        tensors: Any = {layout.path: first(layout, leaf) for layout, leaf in pairs}
        if not jax.tree.leaves(params):
            # What stands for all in `optax.tree_map_params`: no stack has a parameter's shape.
            tensors = jnp.zeros(())
        return TensorwiseState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            tensors=tensors,
            magnitude=() if like is None else like.init(seen),
            rest=others.init(unseen),
        )

    def update(
        updates: Params, state: TensorwiseState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, TensorwiseState]:
        given = updates
        if params is not None:  # a gradient of another dtype must not change that of the state
            updates = _tree.cast(updates, _tree.widened(_tree.structure(params)))
        found, seen, unseen = _apart(layouts, updates)
        at = (None, None) if params is None else _apart(layouts, params)[1:]
        # No entry of a product of the gradient with itself is larger than its square norm, so that
        # this keeps second moments finite, too. Known early: to look at the results would be one
        # more pass over all of them.
        finite = jnp.isfinite(_tree.dot(updates, updates))
        steps, tensors = _directions(rule, found, jax.tree.leaves(seen), state, finite)
        magnitude = state.magnitude
        # Optax divides counts of steps by floats.
        with jax.numpy_dtype_promotion("standard"):
            if like is not None:
                wanted, magnitude = like.update(seen, magnitude, at[0], **extra)
                steps = list(map(_with_norms_of, found, steps, jax.tree.leaves(wanted)))
            others_steps, rest = others.update(unseen, state.rest, at[1], **extra)
        # Theirs may grow wider, by a gradient or by a hyperparameter that is traced.
        magnitude, rest = _tree.cast((magnitude, rest), (state.magnitude, state.rest))
        ahead = {layout.path: step for layout, step in zip(found, steps, strict=True)}
        ahead |= zip(_tree.paths(others_steps), jax.tree.leaves(others_steps), strict=True)
        leaves = [ahead[path] for path in _tree.paths(updates)]
        direction = jax.tree.unflatten(jax.tree.structure(updates), leaves)

        new = _tree.where(finite, (magnitude, rest), (state.magnitude, state.rest))
        direction = _tree.where(finite, direction, _tree.zeros_like(direction))
        skipped = state.skipped + (~finite).astype(jnp.int32)
        direction = _tree.cast(direction, given if params is None else params)
        return direction, TensorwiseState(state.count + 1, skipped, tensors, *new)

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _apart(layouts: Layouts, tree: Params) -> tuple[list[Layout], Any, Any]:
    """The layouts of those leaves that are tensors; the tree of these, and of the others."""
    found = layouts(tree)
    leaves, treedef = jax.tree.flatten(tree)
    pairs = list(zip(found, leaves, strict=True))
    nothing = optax.MaskedNode()
    seen = [nothing if layout is None else leaf for layout, leaf in pairs]
    unseen = [leaf if layout is None else nothing for layout, leaf in pairs]
    trees = (jax.tree.unflatten(treedef, each) for each in (seen, unseen))
    return [layout for layout in found if layout is not None], *trees


def _directions(
    rule: AbstractTensorRule,
    found: list[Layout],
    leaves: list[Array],
    state: TensorwiseState,
    finite: Bool[Array, ""],
) -> tuple[list[Array], Any]:
    """Of each leaf the direction, and the states of its stacks: as they were unless `finite`."""
    if not found:
        return [], state.tensors
    stacks: list[Array] = []
    for layout, leaf in zip(found, leaves, strict=True):
        stacks.extend(layout.split(leaf.astype(_tree.accumulation_dtype(leaf.dtype))))
    states = [each for layout in found for each in state.tensors[layout.path]]
    taken = state.count - state.skipped
    states = _tree.where(finite, list(rule.observe(stacks, states, taken)), states)
    due = rule.due(taken)
    if due is not None and states:
        # What is kept goes through the branch in place: nothing reads the old states any more.
        fresh = lambda states: list(rule.refresh(states, taken))
        states = jax.lax.cond(finite & due, fresh, lambda states: states, states)
    directions, new = rule.update(stacks, states, taken)
    states = _tree.where(finite, list(new), states)
    ahead, kept = iter(directions), iter(states)
    steps = [layout.join([next(ahead) for _ in layout.blocks]) for layout in found]
    tensors = {layout.path: tuple(next(kept) for _ in layout.blocks) for layout in found}
    return steps, tensors


def _with_norms_of(layout: Layout, step: Array, like: Array) -> Array:
    length, target = layout.norms(step), layout.norms(like)
    factor = jnp.where(length > 0, target / jnp.where(length > 0, length, 1), 0)
    return step * factor.astype(step.dtype)
