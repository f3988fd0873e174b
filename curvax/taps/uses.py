"""What a parameter and an activation that meet are to each other: the use of a parameter, read off
the dimension numbers of the operation.
"""

import dataclasses
import math
from typing import Any

from jax.lax import GatherScatterMode

from curvax.taps.arrangement import Arrangement, Convolution, Dense, Elementwise, Lookup
from curvax.taps.layout import View, spread

# An equation's place: its index, the number of the jaxpr inside it, the index there, …
Path = tuple[int, ...]

SUMS = ("add", "add_any", "sub")


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `scan` around a use: its length, and whether the leaf is scanned over."""

    length: int
    stacked: bool


@dataclasses.dataclass(frozen=True)
class Use:
    """One meeting of one leaf with an activation.

    `x` and `y` are the positions of the activation among the inputs, and of the result among the
    outputs, of the equation at `path`. `bias` is the view of a leaf that is added right
    afterwards, in the frame (stack, out), and `shift` that leaf's own use there. `choices` are the
    places of each `cond` around it of which every example chooses its own branch.
    """

    kind: str
    view: View
    arrangement: Arrangement
    path: Path
    loops: tuple[Loop, ...]
    x: int
    y: int = 0
    bias: View | None = None
    shift: "Use | None" = None
    choices: tuple[Path, ...] = ()

    def chosen_at(self, place: Path) -> "Use":
        shift = None if self.shift is None else self.shift.chosen_at(place)
        return dataclasses.replace(self, shift=shift, choices=(*self.choices, place))

    @property
    def repeats(self) -> int:
        """How often the use is executed with the same weights in one example."""
        return math.prod(loop.length for loop in self.loops if not loop.stacked)

    @property
    def stack(self) -> int:
        """How many matrices the leaf holds for this use."""
        return self.arrangement.stack * math.prod(
            loop.length for loop in self.loops if loop.stacked
        )


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A meeting that nothing is known about."""

    leaf: int
    reason: str


def use_of(
    eqn: Any, position: int, view: View, place: Path, loops: tuple[Loop, ...]
) -> Use | Unknown:
    """What an equation makes of the leaf that it has at a position among its inputs."""
    name = eqn.primitive.name
    use = None
    if name in ("mul", *SUMS):
        use = _elementwise(eqn, position, view, place, loops)
    elif view.repeats:
        return Unknown(view.leaf, f"it is broadcast before `{name}`")
    elif name == "dot_general":
        use = _dense(eqn, position, view, place, loops)
    elif name == "conv_general_dilated" and position == 1:
        use = _convolution(eqn, view, place, loops)
    elif name in ("gather", "dynamic_slice") and position == 0 and view.shape:
        use = _lookup(eqn, view, place, loops)
    return use or Unknown(view.leaf, f"`{name}` is no known use of a parameter")


def _dense(eqn: Any, position: int, view: View, place: Path, loops: tuple[Loop, ...]) -> Use | None:
    contracted, batched = eqn.params["dimension_numbers"]
    other = 1 - position
    w_in, w_stack = tuple(contracted[position]), tuple(batched[position])
    x_in, x_stack = tuple(contracted[other]), tuple(batched[other])
    w_out = _rest(len(view.shape), w_in + w_stack)
    x_shape = eqn.invars[other].aval.shape
    x_free = _rest(len(x_shape), x_in + x_stack)
    # The output has the batch axes first, then what is free on the left, then on the right.
    start = len(x_stack)
    widths = (len(w_out), len(x_free)) if position == 0 else (len(x_free), len(w_out))
    first, second = range(start, start + widths[0]), range(start + widths[0], start + sum(widths))
    y_out, y_free = (first, second) if position == 0 else (second, first)
    arrangement = Dense(
        math.prod(view.shape[a] for a in w_stack),
        math.prod(view.shape[a] for a in w_in),
        math.prod(view.shape[a] for a in w_out),
        math.prod(x_shape[a] for a in x_free),
        (x_stack, x_free, x_in),
        (tuple(range(start)), tuple(y_free), tuple(y_out)),
    )
    view = view.arranged(w_stack, w_out, w_in)
    return Use("dense", view, arrangement, place, loops, other)


def _convolution(eqn: Any, view: View, place: Path, loops: tuple[Loop, ...]) -> Use | None:
    p = eqn.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    if p["batch_group_count"] != 1:
        return None
    out_axis, in_axis, *spatial = numbers.rhs_spec
    x_shape, y_shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    kernel = tuple(view.shape[a] for a in spatial)
    outputs = view.shape[out_axis] // groups
    places = numbers.out_spec[2:]
    arrangement = Convolution(
        groups,
        view.shape[in_axis] * math.prod(kernel),
        outputs,
        x_shape[numbers.lhs_spec[0]] * math.prod(y_shape[a] for a in places),
        numbers,
        kernel,
        tuple(p["window_strides"]),
        tuple(tuple(pair) for pair in p["padding"]),
        tuple(p["lhs_dilation"]),
        tuple(p["rhs_dilation"]),
    )
    ordered = view.arranged((out_axis,), (in_axis, *spatial))
    shape = (groups, outputs, arrangement.inputs)
    return Use("conv", ordered.then("reshape", shape, shape), arrangement, place, loops, 0)


def _lookup(eqn: Any, view: View, place: Path, loops: tuple[Loop, ...]) -> Use | None:
    sizes = tuple(eqn.params["slice_sizes"])
    picked = [a for a, (size, n) in enumerate(zip(sizes, view.shape, strict=True)) if size != n]
    if len(picked) != 1 or sizes[picked[0]] != 1 or len(sizes) != 2:
        return None
    (axis,) = picked
    kept = _rest(len(view.shape), (axis,))
    y_shape = eqn.outvars[0].aval.shape
    column, columns, clipped = 0, 1, True
    if eqn.primitive.name == "dynamic_slice":
        x, y_out = 1 + axis, kept
    else:
        numbers = eqn.params["dimension_numbers"]
        if numbers.operand_batching_dims or axis not in numbers.start_index_map:
            return None
        x, column = 1, numbers.start_index_map.index(axis)
        columns = len(numbers.start_index_map)
        clipped = eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP
        left = [a for a in range(len(sizes)) if a not in numbers.collapsed_slice_dims]
        axes = dict(zip(left, numbers.offset_dims, strict=True))
        if any(a not in axes for a in kept):
            return None
        y_out = tuple(axes[a] for a in kept)
    free = _rest(len(y_shape), y_out)
    arrangement = Lookup(
        1,
        view.shape[axis],
        math.prod(view.shape[a] for a in kept),
        math.prod(y_shape[a] for a in free),
        ((), free, y_out),
        column,
        columns,
        clipped,
    )
    return Use("embedding", view.arranged((), kept, (axis,)), arrangement, place, loops, x)


def _elementwise(
    eqn: Any, position: int, view: View, place: Path, loops: tuple[Loop, ...]
) -> Use | None:
    view = spread(eqn, view)
    if any(kind == "broadcast" for kind, _, _ in view.outside.operations):
        return None
    scale = eqn.primitive.name == "mul"
    size = math.prod(view.base)
    arrangement = Elementwise(1, 1, size, math.prod(view.shape) // max(size, 1), view, scale)
    kind = "scale" if scale else "shift"
    return Use(kind, view, arrangement, place, loops, 1 - position)


def _rest(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)
