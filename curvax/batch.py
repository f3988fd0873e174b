"""One batch: its inputs and targets, and the weights of its events."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from curvax import _tree

# Leaves are JAX arrays, NumPy's, or their shapes where nothing is computed.
Batch = PyTree[Any]


class Example(NamedTuple):
    """One batch, taken apart: inputs, targets, and optional weights (or a 0/1 mask)."""

    x: PyTree[Array]
    target: PyTree[Array]
    weight: Array | None = None


def taken_apart(batch: Batch, split: Callable[[Batch], tuple] | None) -> Example:
    """By the function `split`, or as [`Objective`][curvax.Objective] says without one. **Raises**
    `ValueError` if it cannot be.
    """
    if split is not None:
        parts = split(batch)
    elif isinstance(batch, Mapping) and {"x", "y"} <= set(batch):
        parts = (batch["x"], batch["y"], batch.get("weight"))
    elif isinstance(batch, tuple | list) and len(batch) in (2, 3):
        parts = tuple(batch)
    else:
        raise ValueError(
            f"batch: got a {type(batch).__name__} with leaves {_tree.described(batch)}, "
            "wanted (x, target), (x, target, weight), or a mapping with the keys 'x', 'y' and "
            "optionally 'weight'. For any other layout pass Objective(..., split=...)."
        )
    as_array = lambda leaf: leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)
    example = Example(*jax.tree.map(as_array, tuple(parts)))
    lengths = {
        path: (leaf.shape[0] if leaf.ndim else None)
        for path, leaf in zip(_tree.paths(example.x), jax.tree.leaves(example.x), strict=True)
    }
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(
            "batch: every leaf of x needs the same leading batch axis, got lengths "
            f"{lengths or 'of no leaf'}."
        )
    if 0 in lengths.values():
        raise ValueError("batch: got 0 examples, wanted at least 1.")
    return _without_masked(example)


def _without_masked(example: Example) -> Example:
    """The example with 0 for what would poison a derivative of masked events: 0·NaN is NaN.

    That is, entries of x that are not finite where a whole example is masked; targets that are
    not finite, and integer targets (an ignored label is often −100), where an event is masked.
    """
    weight = example.weight
    if weight is None or not _tree.is_array(weight):
        return example
    masked = weight == np.zeros((), weight.dtype)

    def silence(leaf: Any, mask: Any, integers: bool) -> Any:
        if not _tree.is_array(leaf) or leaf.shape[: mask.ndim] != mask.shape:
            return leaf
        on_host = isinstance(leaf, np.ndarray) and isinstance(mask, np.ndarray)
        xp = np if on_host else jnp
        mask = mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            mask = mask & ~xp.isfinite(leaf)
        elif not (integers and jnp.issubdtype(leaf.dtype, jnp.integer)):
            return leaf
        return xp.where(mask, xp.zeros((), leaf.dtype), leaf)

    whole = masked.all(axis=tuple(range(1, masked.ndim)))
    return Example(
        jax.tree.map(lambda leaf: silence(leaf, whole, integers=False), example.x),
        jax.tree.map(lambda leaf: silence(leaf, masked, integers=True), example.target),
        weight,
    )


def share(weight: Array, total: Array) -> Array:
    """weight / total, or 0 where everything is masked."""
    return jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)


def weigh(coefficients: Array, array: Array) -> Array:
    """`array` times the coefficient of each event, whose axes lead.

    Zero where an event has no weight, whatever the entry: 0·NaN must not reach a sum.
    """
    if coefficients.ndim == 0:
        return array * coefficients.astype(array.dtype)
    trailing = (1,) * (array.ndim - coefficients.ndim)
    coefficients = coefficients.reshape(coefficients.shape + trailing).astype(array.dtype)
    return jnp.where(coefficients > 0, coefficients * array, 0)
