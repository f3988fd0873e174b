"""Leaves as stacks of tensors, by their shapes and the names of their axes.

Methods that see nothing but a gradient (Shampoo, SOAP, Muon, PSGD) cannot know which axes of a leaf
are a layer's inputs or its outputs, and which only count layers, heads or experts. Here that is
said once, by path, and a leaf becomes stacks of tensors of the order and size that a method wants.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax import _tree
from curvax._masked import is_masked_tree
from curvax.taps.wishes import ByPath

# The names of the axes of leaves, by a part of their path; None for a leaf that is no tensor.
Axes = Mapping[str, str | None]

_INPUT, _OUTPUT, _OTHERS = "in", "out", "..."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one leaf is seen: as one stack of tensors for each shape that its blocks have.

    Attributes:
        path: Of the leaf.
        shape: Of the leaf.
        stack: The axes of the leaf that only count tensors.
        dims: For each dimension of a tensor, the axes of the leaf that are merged into it.
        block: The longest that a dimension of a block may be; None for no limit.
        longest: Dimensions longer than this are not cut; None cuts all.
        outputs: Which dimension of a matrix has its outputs; None where tensors are not matrices.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    block: int | None = None
    longest: int | None = None
    outputs: int | None = None

    @property
    def count(self) -> int:
        """Tensors in the leaf."""
        return math.prod(self.shape[axis] for axis in self.stack)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the dimensions of a tensor, before it is cut into blocks."""
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.dims)

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that `split` returns: (stack, *dimensions)."""
        shapes = []
        for region in self._regions:
            count = math.prod(number for _, _, number in region)
            shapes.append((self.count * count, *(size for _, size, _ in region)))
        return tuple(shapes)

    @property
    def _regions(self) -> list[tuple[tuple[int, int, int], ...]]:
        """For each shape of blocks, of each dimension: where it starts, the size of a block, and
        how many there are. Only the last block of a dimension may be shorter than the others.
        """
        parts = []
        for size in self.sizes:
            long = self.longest is not None and size > self.longest
            block = size if long else min(size, self.block or size)
            whole, rest = divmod(size, block) if block else (1, 0)
            part = [(0, block, whole)]
            parts.append([*part, (whole * block, rest, 1)] if rest else part)
        return list(itertools.product(*parts))

    def tensors(self, leaf: Array) -> Array:
        """(count, *sizes), not cut into blocks."""
        order = (*self.stack, *itertools.chain(*self.dims))
        moved = leaf if order == tuple(range(leaf.ndim)) else jnp.transpose(leaf, order)
        return moved.reshape(self.count, *self.sizes)

    def leaf(self, tensors: Array) -> Array:
        """The inverse of `tensors`."""
        order = (*self.stack, *itertools.chain(*self.dims))
        moved = tensors.reshape([self.shape[axis] for axis in order])
        if order == tuple(range(len(order))):
            return moved
        inverse = [order.index(axis) for axis in range(len(order))]
        return jnp.transpose(moved, inverse)

    def split(self, leaf: Array) -> list[Array]:
        """The blocks of a leaf, in one stack for each shape that they have."""
        tensors, stacks = self.tensors(leaf), []
        for region, shape in zip(self._regions, self.blocks, strict=True):
            part = tensors
            for axis, (start, size, number) in enumerate(region, 1):
                part = jax.lax.slice_in_dim(part, start, start + size * number, axis=axis)
            cut = [extent for _, size, number in region for extent in (number, size)]
            part = part.reshape(self.count, *cut)
            numbers, sizes = range(1, part.ndim, 2), range(2, part.ndim, 2)
            stacks.append(jnp.transpose(part, (0, *numbers, *sizes)).reshape(shape))
        return stacks

    def join(self, stacks: Sequence[Array]) -> Array:
        """The inverse of `split`."""
        regions = self._regions
        if len(regions) == 1:
            return self.leaf(self._uncut(stacks[0], regions[0]))
        tensors = jnp.zeros((self.count, *self.sizes), stacks[0].dtype)
        for stack, region in zip(stacks, regions, strict=True):
            starts = (0, *(start for start, _, _ in region))
            tensors = jax.lax.dynamic_update_slice(tensors, self._uncut(stack, region), starts)
        return self.leaf(tensors)

    def _uncut(self, stack: Array, region: tuple[tuple[int, int, int], ...]) -> Array:
        order = len(region)
        cut = stack.reshape(self.count, *(n for _, _, n in region), *(s for _, s, _ in region))
        pairs = itertools.chain(*((1 + i, 1 + order + i) for i in range(order)))
        return jnp.transpose(cut, (0, *pairs)).reshape(self.count, *(s * n for _, s, n in region))

    def spec(self, leaf: tuple[Any, ...]) -> tuple[Any, ...]:
        """How the stack of a leaf that is not cut is sharded, from how the leaf is: a dimension of
        several axes as the first of them, and not at all if another of them is sharded.
        """

        def merged(axes: tuple[int, ...]) -> Any:
            first, *others = [leaf[axis] for axis in axes if self.shape[axis] > 1] or [None]
            return None if any(others) else first

        return tuple(merged(axes) for axes in (self.stack, *self.dims))

    def norms(self, leaf: Array) -> Array:
        """The norm of each tensor, with the leaf's number of axes."""
        axes = tuple(itertools.chain(*self.dims))
        wide = leaf.astype(_tree.accumulation_dtype(leaf.dtype))
        return jnp.sqrt(jnp.sum(jnp.square(wide), axes, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Layouts:
    """The layouts of all leaves of a tree.

    `axes` names the axes of leaves, by a part of their path (the longest that a path has decides),
    one word for each axis:

    - `in` and `out` are a matrix's inputs and outputs, several of each are merged: a convolution's
      `"out in in in"`, a projection to heads `"in out out"`;
    - any other word, such as `layers`, `heads` or `experts`, counts: each index has a tensor of its
      own;
    - `...` are the axes that are left, which are seen as if there were no others: `"layers ..."`
      is right for weights and biases of layers that are scanned over;
    - None says that a leaf is no tensor.

    Without names every axis of a leaf is a dimension of its own, but for matrices, which are
    `"in out"`. With `matrices` only leaves that are two-dimensional, or named so, are tensors.

    Attributes:
        axes: As above.
        block: Dimensions longer than this are cut.
        merge: Neighbouring dimensions are merged as long as the product is at most this.
        matrices: Tensors are of order 2, inputs and outputs in the order that they have in memory:
            to turn them would be one more pass over all of a state.
        longest: Dimensions longer than this are not cut; None cuts all.
        order: Tensors have so many dimensions at the least: leaves with fewer that are longer
            than 1 are no tensors, and merging stops there.
    """

    axes: ByPath
    block: int | None = None
    merge: int = 0
    matrices: bool = False
    longest: int | None = None
    order: int = 1

    @staticmethod
    def of(
        axes: Axes | None = None,
        *,
        block: int | None = None,
        merge: int = 0,
        matrices: bool = False,
        longest: int | None = None,
        order: int = 1,
    ) -> "Layouts":
        """**Raises** `ValueError` for names that make no tensor, and for sizes below 1."""
        named = dict(axes or {})
        for path, text in named.items():
            if text is not None and text.split().count(_OTHERS) > 1:
                raise ValueError(f"axes: got {text!r} for {path!r}, wanted '...' at most once.")
        if block is not None and block < 1:
            raise ValueError(f"block_size: got {block}, wanted a size ≥ 1, or None for no limit.")
        return Layouts(ByPath.of("axes", named), block, merge, matrices, longest, order)

    def __call__(self, tree: PyTree[Any]) -> list[Layout | None]:
        """That of each leaf; None for one that is no tensor.

        **Raises** `ValueError` for names that do not fit a leaf, or any.
        """
        paths = _tree.paths(tree)
        # Under a mask the leaf that is meant may be one of those hidden.
        if paths and not is_masked_tree(tree):
            self.axes.check(paths)
        return [
            self._layout(path, leaf.shape)
            for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True)
        ]

    def _layout(self, path: str, shape: tuple[int, ...]) -> Layout | None:
        text = self.axes.get(path, _OTHERS)
        if text is None or 0 in shape:
            return None
        words = self._words(path, shape, text)
        axes = [axis for axis, word in enumerate(words) if word == _OTHERS]
        stack = [axis for axis, word in enumerate(words) if word not in (_OTHERS, _INPUT, _OUTPUT)]
        groups = [[i for i, word in enumerate(words) if word == side] for side in (_OUTPUT, _INPUT)]
        dims = [tuple(group) for group in groups if group]
        if self.matrices:
            if len(axes) == 2 and not dims:
                dims = [(axes[1],), (axes[0],)]  # "in out"
            if len(dims) < 2:
                return None
            outputs = int(dims[0] > dims[1])
            order = tuple(sorted(dims))
            return Layout(path, shape, tuple(stack), order, self.block, outputs=outputs)
        dims = dims or self._merged(shape, axes)
        long = sum(math.prod(shape[axis] for axis in dim) > 1 for dim in dims)
        if not dims or (self.order > 1 and long < self.order):
            return None
        return Layout(path, shape, tuple(stack), tuple(dims), self.block, self.longest)

    def _words(self, path: str, shape: tuple[int, ...], text: str) -> list[str]:
        words = text.split()
        if _OTHERS in words:
            at, left = words.index(_OTHERS), len(shape) - len(words) + 1
            words[at : at + 1] = [_OTHERS] * left if left >= 0 else [_OTHERS]
            if left > 0 and (_INPUT in words or _OUTPUT in words):
                raise ValueError(
                    f"axes: got {text!r} for {path}, wanted a name for each axis where one is "
                    f"{_INPUT!r} or {_OUTPUT!r}."
                )
        if len(words) != len(shape):
            raise ValueError(
                f"axes: got {text!r} for {path}, whose shape is {shape}: wanted {len(shape)} names."
            )
        return words

    def _merged(self, shape: tuple[int, ...], axes: list[int]) -> list[tuple[int, ...]]:
        dims: list[tuple[int, ...]] = []
        for place, axis in enumerate(axes, 1):
            size = math.prod(shape[i] for i in dims[-1]) if dims else 0
            spare = len(dims) + sum(shape[i] > 1 for i in axes[place:]) >= self.order
            # An axis of length 1 is no dimension of its own.
            if dims and ((spare and size * shape[axis] <= self.merge) or 1 in (size, shape[axis])):
                dims[-1] = (*dims[-1], axis)
            else:
                dims.append((axis,))
        return dims
