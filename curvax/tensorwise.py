"""Transformations of gradients alone, tensor by tensor: Shampoo, SOAP, Muon and their like.

What is done with a tensor is a [`AbstractTensorRule`][curvax.AbstractTensorRule]; which tensors a
leaf consists of, a [`Layouts`][curvax.tensors.Layouts]. No extra argument is needed in an Optax
loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, ScalarLike

from curvax import _tree
from curvax._sharding import compiler_sharded, explicit
from curvax.objective import Params
from curvax.rules.base import AbstractTensorRule
from curvax.rules.budget import TensorBudget
from curvax.tensors import Layout, Layouts


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
    scale: Callable[[Layout], ScalarLike] | None = None,
    budget: TensorBudget | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation that applies a rule to the tensors of each leaf.

    **Arguments:**

    - `rule`: what is made of a tensor.
    - `layouts`: which tensors a leaf has.
    - `rest`: for leaves that are no tensors, such as `optax.scale_by_adam()`; None leaves them as
      they are.
    - `magnitude`: grafting (Agarwal et al. 2020): each tensor, before it is cut into blocks, gets
      the norm that it has after this transformation of the gradient.
    - `scale`: what the directions of a leaf's tensors are multiplied by.
    - `budget`: of the state; which factors a tensor has is decided in `init` then.

    Where the square norm of the gradient is not finite, an update gives zeros, leaves the state as
    it was, and is counted in `skipped`. `init` **raises** `ValueError` for names of axes that do
    not fit, and for a budget that no factor fits into.
    """
    others = optax.with_extra_args_support(optax.identity() if rest is None else rest)
    like = None if magnitude is None else optax.with_extra_args_support(magnitude)

    def init(params: Params) -> TensorwiseState:
        found, seen, unseen = _apart(layouts, params)
        beside = () if like is None else like.init(seen), others.init(unseen)
        dtypes = [_tree.accumulation_dtype(leaf.dtype) for leaf in jax.tree.leaves(seen)]
        stacks = [
            [jax.ShapeDtypeStruct(shape, dtype) for shape in layout.blocks]
            for layout, dtype in zip(found, dtypes, strict=True)
        ]
        rules = [rule] * len(found)
        if budget is not None and found:
            rules = budget.rules(rule, stacks, params, beside)
        tensors: Any = {
            layout.path: tuple(map(own.init, _zeros(layout, leaf)))
            for layout, own, leaf in zip(found, rules, jax.tree.leaves(seen), strict=True)
        }
        if not jax.tree.leaves(params):
            # What stands for all in `optax.tree_map_params`: no stack has a parameter's shape.
            tensors = jnp.zeros(())
        return TensorwiseState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            tensors=tensors,
            magnitude=beside[0],
            rest=beside[1],
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
        arrays, static = eqx.partition(rule, eqx.is_array)
        leaves, taken = jax.tree.leaves(seen), state.count - state.skipped
        steps, tensors = compiler_sharded(
            lambda arrays, *args: _directions(eqx.combine(arrays, static), found, *args),
            (leaves, state.tensors),
            *(arrays, leaves, state.tensors, taken, finite),
        )
        if scale is not None:
            scales = [
                jnp.asarray(scale(layout), step.dtype)
                for layout, step in zip(found, steps, strict=True)
            ]
            steps = [step * each for step, each in zip(steps, scales, strict=True)]
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


def _zeros(layout: Layout, leaf: Any) -> list[Array]:
    """The stacks of a leaf of zeros, sharded as it is where that is part of its type."""
    dtype, sharding = _tree.accumulation_dtype(leaf.dtype), explicit(leaf)
    zeros = [jnp.zeros(shape, dtype) for shape in layout.blocks]
    uncut = layout.blocks == ((layout.count, *layout.sizes),)
    # JAX puts no constant on a mesh that is not set.
    if sharding is None or not uncut or jax.sharding.get_abstract_mesh().empty:
        return zeros
    spec = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
    found = jax.sharding.PartitionSpec(*layout.spec(spec))
    return [jax.sharding.reshard(zeros[0], jax.sharding.NamedSharding(sharding.mesh, found))]


def _directions(
    rule: AbstractTensorRule,
    found: list[Layout],
    leaves: list[Array],
    tensors: Any,
    taken: Int[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[list[Array], Any]:
    """Of each leaf the direction, and the states of its stacks: as they were unless `finite`."""
    if not found:
        return [], tensors
    stacks: list[Array] = []
    for layout, leaf in zip(found, leaves, strict=True):
        stacks.extend(layout.split(leaf.astype(_tree.accumulation_dtype(leaf.dtype))))
    states = [each for layout in found for each in tensors[layout.path]]
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
