"""The two sides of a use of a parameter, as matrices.

An arrangement brings the input x and the cotangent g of the output of one use into the axes
(stack, batch, position, feature), where the gradient of the weight is Σ over batch and position of
g xᵀ. `lead` leading axes of both are batch axes. Axes are taken from the dimension numbers of the
operation itself, never guessed.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from curvax.taps.layout import Axes, View

Rows = Float[Array, "stack batch position feature"]


@dataclasses.dataclass(frozen=True)
class AbstractArrangement(abc.ABC):
    """See the module. `stack` independent matrices of `inputs` × `outputs`."""

    stack: int
    inputs: int
    outputs: int
    positions: int


@dataclasses.dataclass(frozen=True)
class AbstractProduct(AbstractArrangement):
    """A use in a product, which has two sides."""

    @abc.abstractmethod
    def input_rows(self, x: Array, lead: int, every: int = 1) -> Rows:
        """x, so that the weight's gradient is a product of these rows and the output's; of the
        positions about one in `every`, evenly, the same as in `output_rows`.
        """

    @abc.abstractmethod
    def output_rows(self, g: Array, lead: int, every: int = 1) -> Rows: ...


@dataclasses.dataclass(frozen=True)
class Dense(AbstractProduct):
    """A contraction: x axes (stack, position, in), output axes (stack, position, out)."""

    x_axes: tuple[Axes, Axes, Axes]
    y_axes: tuple[Axes, Axes, Axes]

    def input_rows(self, x: Array, lead: int, every: int = 1) -> Rows:
        return _grouped(x, self.x_axes, lead)[:, :, ::every]

    def output_rows(self, g: Array, lead: int, every: int = 1) -> Rows:
        return _grouped(g, self.y_axes, lead)[:, :, ::every]


@dataclasses.dataclass(frozen=True)
class Convolution(AbstractProduct):
    """A convolution in any number of dimensions; a position is one place of its output."""

    numbers: lax.ConvDimensionNumbers
    kernel: Axes
    strides: Axes
    padding: tuple[tuple[int, int], ...]
    input_dilation: Axes
    kernel_dilation: Axes

    def input_rows(self, x: Array, lead: int, every: int = 1) -> Rows:
        """Patches (im2col), by one strided slice for each place of the kernel."""
        batch, feature, *spatial = self.numbers.lhs_spec
        examples = math.prod(x.shape[:lead])
        x = _lead_merged(x, lead, (batch, *spatial, feature))
        paddings = zip(self.padding, self.input_dilation, strict=True)
        config = [(low, high, d - 1) for (low, high), d in paddings]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])
        strides = [stride * self._step(every) for stride in self.strides]
        places = [
            (size - ((k - 1) * d + 1)) // stride + 1
            for size, k, d, stride in zip(
                x.shape[1:-1], self.kernel, self.kernel_dilation, strides, strict=True
            )
        ]
        patches = []
        for offset in _offsets(self.kernel):
            starts = [o * d for o, d in zip(offset, self.kernel_dilation, strict=True)]
            stops = [
                start + (count - 1) * stride + 1
                for start, count, stride in zip(starts, places, strides, strict=True)
            ]
            window = (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *strides, 1)
            patches.append(lax.slice(x, *window))
        rows = jnp.stack(patches, axis=-1)
        images, channels = x.shape[0], x.shape[-1]
        rows = rows.reshape(images, math.prod(places), self.stack, channels // self.stack, -1)
        rows = jnp.moveaxis(rows, 2, 0)
        return _split_batch(rows.reshape(*rows.shape[:3], self.inputs), examples)

    def output_rows(self, g: Array, lead: int, every: int = 1) -> Rows:
        batch, feature, *spatial = self.numbers.out_spec
        examples = math.prod(g.shape[:lead])
        g = _lead_merged(g, lead, (batch, *spatial, feature))
        step = self._step(every)
        g = g[(slice(None), *(slice(None, None, step) for _ in spatial))]
        g = g.reshape(g.shape[0], -1, self.stack, self.outputs)
        return _split_batch(jnp.moveaxis(g, 2, 0), examples)

    def _step(self, every: int) -> int:
        """Along each dimension, so that one place in `every` at most is left."""
        return int(every ** (1 / len(self.kernel)) + 1e-9)


@dataclasses.dataclass(frozen=True)
class Lookup(AbstractProduct):
    """Rows of a table, picked by index: a dense layer with one-hot inputs, which are not formed.

    x holds the indices, in one of its `columns`; `inputs` is the length of the table. Indices out
    of bounds are `clipped`, or count nothing.
    """

    y_axes: tuple[Axes, Axes, Axes]
    column: int = 0
    columns: int = 1
    clipped: bool = True

    def indices(self, x: Array, lead: int) -> Array:
        x = x.reshape(math.prod(x.shape[:lead]), self.positions, self.columns)[..., self.column]
        return jnp.clip(x, 0, self.inputs - 1) if self.clipped else x

    def input_rows(self, x: Array, lead: int, every: int = 1) -> Rows:
        dtype = jnp.result_type(float)
        indices = self.indices(x, lead)[:, ::every]
        return jax.nn.one_hot(indices, self.inputs, dtype=dtype)[None]

    def output_rows(self, g: Array, lead: int, every: int = 1) -> Rows:
        return _grouped(g, self.y_axes, lead)[:, :, ::every]


@dataclasses.dataclass(frozen=True)
class Fused(AbstractProduct):
    """A product whose outputs are several `parts`, each of which is a matrix of its own. All have
    the inputs of the `whole`.
    """

    whole: AbstractProduct
    parts: int

    @staticmethod
    def of(whole: AbstractProduct, parts: int) -> "Fused":
        stack, outputs = whole.stack * parts, whole.outputs // parts
        return Fused(stack, whole.inputs, outputs, whole.positions, whole, parts)

    def input_rows(self, x: Array, lead: int, every: int = 1) -> Rows:
        return jnp.repeat(self.whole.input_rows(x, lead, every), self.parts, axis=0)

    def output_rows(self, g: Array, lead: int, every: int = 1) -> Rows:
        rows = self.whole.output_rows(g, lead, every)
        rows = rows.reshape(*rows.shape[:3], self.parts, self.outputs)
        return jnp.moveaxis(rows, 3, 1).reshape(self.stack, *rows.shape[1:3], self.outputs)


@dataclasses.dataclass(frozen=True)
class Elementwise(AbstractArrangement):
    """A product with the parameter (`scale`) or a sum. The gradient of an example is formed:
    it is small.
    """

    view: View
    scale: bool

    def gradients(self, x: Array, g: Array, lead: int) -> Array:
        """The gradient of each example, (batch, *leaf), without loop axes."""
        dtype = accumulator(g)
        h = g.astype(dtype)
        if self.scale:
            # A scalar of an example meets an array.
            ones = (1,) * (g.ndim - x.ndim)
            h = h * x.astype(dtype).reshape(*x.shape[:lead], *ones, *x.shape[lead:])
        h = h.reshape(-1, *h.shape[lead:])
        base = jax.ShapeDtypeStruct(self.view.base, dtype)
        return jax.vmap(lambda one: self.view.inside.transposed(one, base))(h)


Arrangement = AbstractProduct | Elementwise


def product(equation: str, *operands: Array) -> Array:
    """An einsum that accumulates in float32 at least, exact for what its operands hold."""
    dtype = accumulator(*operands)
    low = all(operand.dtype == operands[0].dtype for operand in operands)
    if not low:
        operands = tuple(operand.astype(dtype) for operand in operands)
    return jnp.einsum(
        equation,
        *operands,
        precision=precision(*operands),
        preferred_element_type=dtype,
    )


def precision(*operands: Array) -> lax.Precision:
    """Full precision (TF32 ruins small eigenvalues), which 16-bit products have by themselves."""
    wide = any(operand.dtype.itemsize > 2 for operand in operands)
    return lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT


def accumulator(*operands: Array) -> Any:
    """The dtype that sums are carried in."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *(operand.dtype for operand in operands))


def _grouped(array: Array, axes: tuple[Axes, Axes, Axes], lead: int) -> Rows:
    """(lead…, …) as (stack, batch, position, feature)."""
    stack, position, feature = (tuple(lead + axis for axis in group) for group in axes)
    moved = jnp.transpose(array, (*stack, *range(lead), *position, *feature))
    sizes = [math.prod(array.shape[axis] for axis in group) for group in (stack, position, feature)]
    return moved.reshape(sizes[0], math.prod(array.shape[:lead]), sizes[1], sizes[2])


def _split_batch(rows: Float[Array, "stack images place feature"], examples: int) -> Rows:
    """An image that the model put into a batch of its own counts as more positions."""
    stack, _, _, features = rows.shape
    return rows.reshape(stack, examples, -1, features)


def _lead_merged(array: Array, lead: int, order: Axes) -> Array:
    """The axes in `order`, the leading ones merged with the first of them."""
    moved = jnp.transpose(array, (*range(lead), *(lead + axis for axis in order)))
    return moved.reshape(-1, *moved.shape[lead + 1 :])


def _offsets(kernel: Axes) -> list[Axes]:
    offsets: list[Axes] = [()]
    for size in kernel:
        offsets = [(*offset, place) for offset in offsets for place in range(size)]
    return offsets
