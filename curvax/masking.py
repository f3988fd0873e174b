"""Blocks of those leaves alone that `optax.masked` or `optax.partition` let a method see.

A method under a mask gets trees with `optax.MaskedNode()` for what is hidden, in which no model can
be traced. Its blocks are found in the whole model instead, as if the hidden leaves were constants:
a weight whose bias is hidden has none, and a bias whose weight is hidden a diagonal block. Which
leaves those are is kept in the state, as a `MaskedNode()` under the path of each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from curvax import _tree
from curvax._binding import bound_params
from curvax._masked import is_masked, is_masked_tree
from curvax.objective import Objective, Params
from curvax.plan import Observation
from curvax.plan.moments import BlockMoments, Recipe
from curvax.taps.blocks import Block, DiagonalBlock, KroneckerBlock


def first_blocks(
    recipe: Recipe, objective: Objective, params: Params
) -> tuple[tuple[Block, ...], Mapping[str, Any]]:
    """The blocks of parameters, some of which may be masked, numbered as they are there; and marks
    for the state.

    **Raises** `ValueError` where leaves are masked and the whole model is not known.
    """
    whole = params
    if is_masked_tree(params):
        whole = bound_params()
        if whole is None:
            raise ValueError(
                "init: optax.masked or optax.partition hides leaves, without which the blocks of "
                "the others cannot be found. Make the state by "
                "curvax.make_step(optimizer, method).init(model); its field `optimizer` is the one "
                "for a loop of your own. Or freeze the other leaves by Objective(..., static=…), "
                "or mask what comes behind the method: optax.chain(method, optax.masked(…))."
            )
    absent = _hidden(params, whole)
    blocks = recipe.blocks(objective, whole, objective.inputs, absent)[1]
    return _numbered(blocks, whole, absent), {path: optax.MaskedNode() for path in absent}


def later_blocks(
    recipe: Recipe, observation: Observation, updates: Params, marked: frozenset[str]
) -> tuple[Block, ...]:
    """The same, at an update. **Raises** `ValueError` for another mask than that of the state, and
    for an observation that was made without it.
    """
    params, x = observation.params, observation.objective.example(observation.batch).x
    now = _hidden(updates, params)
    if now != marked:
        raise ValueError(
            "update: the mask hides other leaves than it did when the state was made: "
            f"{sorted(now ^ marked)} are hidden in one but not in the other."
        )
    blocks = recipe.blocks(observation.objective, params, x, marked)[1]
    if marked:
        _check_measured(blocks, observation)
    return _numbered(blocks, params, marked)


def hidden(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The marks in a state: the leaves that were hidden when it was made, by their paths."""
    return {path: each for path, each in memory.items() if is_masked(each)}


def visible(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The state without those marks."""
    return {path: each for path, each in memory.items() if not is_masked(each)}


def _hidden(template: Any, whole: Params) -> frozenset[str]:
    if not is_masked_tree(template):
        return frozenset()
    masked = jax.tree.map(
        lambda t, p: jax.tree.map(lambda _: is_masked(t), p), template, whole, is_leaf=is_masked
    )
    flags = zip(_tree.paths(whole), jax.tree.leaves(masked), strict=True)
    return frozenset(path for path, flag in flags if flag)


def _numbered(
    blocks: tuple[Block, ...], whole: Params, absent: frozenset[str]
) -> tuple[Block, ...]:
    """The blocks, with leaves counted as if there were no others."""
    if not absent:
        return blocks
    kept = [leaf for leaf, path in enumerate(_tree.paths(whole)) if path not in absent]
    place = {leaf: i for i, leaf in enumerate(kept)}

    def moved(block: Block) -> Block:
        if isinstance(block, DiagonalBlock):
            return dataclasses.replace(block, leaf=place[block.leaf])
        bias = None if block.bias is None else place[block.bias]
        return dataclasses.replace(block, leaf=place[block.leaf], bias=bias)

    return tuple(map(moved, blocks))


def _check_measured(blocks: tuple[Block, ...], observation: Observation) -> None:
    """That the moments are those of these blocks."""
    sizes = {b.path: b.input.size for b in blocks if isinstance(b, KroneckerBlock)}
    diagonal = {b.path for b in blocks if isinstance(b, DiagonalBlock)}
    for quantity in observation.quantities:
        if not isinstance(quantity, BlockMoments) or observation.due(quantity) is False:
            continue
        for path, moments in observation[quantity].items():
            input = getattr(moments, "input", None)
            measured = sizes.get(path) if input is None else input.product.shape[1]
            if path not in diagonal and (path not in sizes or measured != sizes[path]):
                raise ValueError(
                    f"observation: it measured {path} as if no leaf were masked. Make it with the "
                    "method's own state: method.observe(model, batch, key, state=…)."
                )
