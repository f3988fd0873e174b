"""Averages of a diagonal over entries that are expected to be alike."""

import math
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from curvax import _tree
from curvax.objective import Params
from curvax.plan.plan import Observation
from curvax.taps.arrangement import Convolution
from curvax.taps.blocks import find_blocks
from curvax.taps.layout import on_host
from curvax.taps.uses import Use
from curvax.taps.wishes import ByPath

Axes = tuple[int, ...]
# What is averaged over in a leaf: axes, or blocks of so many neighbours along the last axis.
Averages = Mapping[str, Axes | int]


class SpatialAverage(eqx.Module):
    """The mean of the absolute values of a diagonal over entries that belong together, as an
    estimate of it is noisy (Yao et al. 2021, AdaHessian, section 3.2).

    Kernels of convolutions are averaged over their spatial axes, whatever their layout; other
    leaves are left as they are. So does the authors' code for images, which takes absolute values
    first, too; the paper writes the mean of the diagonal itself.

    **Arguments:** `by_path`: for some leaves something else, by a part of their path; the longest
    part that a path has decides, and `""` is for the rest. A tuple of axes, `()` for no average; or
    an integer b, for blocks of b neighbours along the last axis, of which b must be a divisor (the
    authors' `block_length` for transformers).

    The kernels are found by tracing the model, when a step is traced. One whose use is not
    understood, or that several convolutions use with other axes, is left as it is.
    """

    by_path: ByPath = eqx.field(static=True)

    def __init__(self, by_path: Averages | None = None):
        self.by_path = ByPath.of("average", by_path or {})
        for part, where in self.by_path.items:
            if isinstance(where, int) and where < 1:
                raise ValueError(f"average: got {where} for {part!r}, wanted a block of ≥ 1.")

    def apply(self, diagonal: Params, observation: Observation) -> Params:
        """The averages: an axis that was averaged over has length 1, a leaf in blocks its shape.

        **Raises** `ValueError` for a path that no leaf has, and for axes or blocks that do not fit.
        """
        paths = _tree.paths(diagonal)
        self.by_path.check(paths)
        leaves, treedef = jax.tree.flatten(diagonal)
        asked = [self.by_path.get(path, None) for path in paths]
        if any(a is None and leaf.ndim > 2 for a, leaf in zip(asked, leaves, strict=True)):
            kernels = _spatial_axes(observation)
            asked = [kernels.get(i, ()) if a is None else a for i, a in enumerate(asked)]
        means = (_mean(*each) for each in zip(leaves, asked, paths, strict=True))
        return treedef.unflatten(list(means))


def _mean(leaf: Array, where: Axes | int | None, path: str) -> Array:
    if where is None or where == ():
        return leaf
    if isinstance(where, int):
        if leaf.ndim == 0 or leaf.shape[-1] % where:
            raise ValueError(
                f"average: got blocks of {where} for {path} of shape {leaf.shape}, wanted a "
                "divisor of the length of its last axis."
            )
        blocks = jnp.abs(leaf).reshape(*leaf.shape[:-1], -1, where)
        means = jnp.mean(blocks, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, blocks.shape).reshape(leaf.shape)
    if not all(-leaf.ndim <= axis < leaf.ndim for axis in where):
        raise ValueError(
            f"average: got axes {where} for {path} of shape {leaf.shape}, which has only "
            f"{leaf.ndim}."
        )
    return jnp.mean(jnp.abs(leaf), axis=where, keepdims=True)


def _spatial_axes(observation: Observation) -> dict[int, Axes]:
    """Of the leaves that are kernels, by their place."""
    objective = observation.objective
    inputs = objective.example(observation.batch).x
    _, blocks = find_blocks(objective, observation.params, inputs)
    found: dict[int, set[Axes]] = {}
    for use in (use for block in blocks for use in block.uses):
        found.setdefault(use.view.leaf, set()).add(_axes_of(use))
    return {leaf: axes.pop() for leaf, axes in found.items() if len(axes) == 1}


def _axes_of(use: Use) -> Axes:
    """Those axes along which a leaf holds one kernel, from one input channel to one output."""
    view = use.view
    if not isinstance(use.arrangement, Convolution) or (view.outside.operations and view.depth):
        return ()
    places = np.arange(math.prod(view.base)).reshape(view.base)
    kernel = math.prod(use.arrangement.kernel)
    one = on_host(view.inside, places).reshape(-1, kernel)[0]
    along = [np.ptp(indices) > 0 for indices in np.unravel_index(one, view.base)]
    whole = math.prod(size for size, moves in zip(view.base, along, strict=True) if moves)
    axes = tuple(view.depth + axis for axis, moves in enumerate(along) if moves)
    return axes if whole == kernel else ()
