"""Where the parameters of a model meet its activations, read off the jaxpr of one example.

Nothing is matched against known layers: each parameter leaf is followed through the operations that
only move its entries, and into every primitive that carries a jaxpr, until it meets something that
is no parameter. What that meeting is (a contraction, a convolution, a lookup, a product or sum) and
which axes are inputs and outputs is taken from the operation's own dimension numbers.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from curvax._jaxpr import is_literal, scan_sizes, sub_jaxprs
from curvax.taps.arrangement import Arrangement, Convolution, Dense, Elementwise, Lookup
from curvax.taps.layout import View, follow

# An equation's place: its index, the number of the jaxpr inside it, the index there, …
Path = tuple[int, ...]

_SUMS = ("add", "add_any", "sub")

# What a variable is made of: constants alone, parameters too, or (also) the example.
_PARAMETERS, _EXAMPLE = 1, 2
Origins = dict[Any, int]


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


Found = list[Use | Unknown]


def find_uses(jaxpr: Any, leaves: Mapping[Any, int]) -> Found:
    """Every use of the given input variables of a jaxpr."""
    env = {var: View(leaf, var.aval.shape, var.aval.shape) for var, leaf in leaves.items()}
    origins = {var: _PARAMETERS if var in env else _EXAMPLE for var in jaxpr.invars}
    found: Found = []
    for var in _walk(jaxpr, env, origins, (), (), found):
        if var is not None:
            found.append(Unknown(var.leaf, "it is an output of the model"))
    return found


def _walk(
    jaxpr: Any,
    env: dict[Any, View],
    origins: Origins,
    path: Path,
    loops: tuple[Loop, ...],
    found: Found,
) -> list[View | None]:
    """Adds the uses in a jaxpr; returns which of its outputs are views of a leaf.

    `origins` of its inputs: what is not in there is a constant.
    """
    env, origins = dict(env), dict(origins)
    trails = _Trails(jaxpr)
    for index, eqn in enumerate(jaxpr.eqns):
        place = (*path, index)
        trails.follow(eqn)
        made_of = [0 if is_literal(atom) else origins.get(atom, 0) for atom in eqn.invars]
        origins.update(dict.fromkeys(eqn.outvars, max(made_of, default=0)))
        views = {
            i: env[atom]
            for i, atom in enumerate(eqn.invars)
            if not is_literal(atom) and atom in env
        }
        if not views or eqn.primitive.name == "stop_gradient":
            continue
        if sub_jaxprs(eqn):
            seen = len(found)
            entered = _enter(eqn, views, made_of, place, loops, found)
            for var, view in zip(eqn.outvars, entered, strict=True):
                if view is not None:
                    env[var] = view
            for use in found[seen:]:
                if isinstance(use, Use) and use.path == place:
                    trails.start(eqn, use)
            continue
        (position, view), *others = views.items()
        other = max((made for i, made in enumerate(made_of) if i != position), default=0)
        moved = follow(eqn, view) if len(eqn.invars) == 1 else None
        if eqn.primitive.name in _SUMS and other == 0:
            # A constant added to a parameter changes no gradient.
            moved = _spread(view, eqn) if position == 0 or eqn.primitive.name != "sub" else None
        if moved is not None:
            env[eqn.outvars[0]] = moved
            continue
        refused = _refused(eqn, other)
        if refused:
            found.extend(Unknown(view.leaf, refused) for view in views.values())
            continue
        for _, other_view in others:
            # Two parameters that meet: the second is the other's activation.
            found.append(Unknown(other_view.leaf, f"it meets a parameter in `{eqn.primitive}`"))
        use = _use(eqn, position, view, place, loops)
        if isinstance(use, Use) and use.kind == "shift":
            joined = trails.join(eqn, position, use)
            if joined is not None:
                weight, bias = joined
                joint = dataclasses.replace(weight, bias=bias, shift=use)
                found[found.index(weight)] = joint
                continue
        found.append(use)
        if isinstance(use, Use) and isinstance(use.arrangement, Dense | Convolution):
            trails.start(eqn, use)
    return [None if is_literal(var) else env.get(var) for var in jaxpr.outvars]


def _refused(eqn: Any, other: int) -> str:
    """Why a tap has no place at a meeting with something that is the same for all examples.

    The result is no activation then but a weight, or a part of one: its cotangents would be kept
    for each example. Vectors are small enough.
    """
    name = eqn.primitive.name
    if other == _EXAMPLE or sum(size > 1 for size in eqn.outvars[0].aval.shape) <= 1:
        return ""
    if other == _PARAMETERS:
        return f"it meets a parameter in `{name}`"
    return f"it meets a constant in `{name}`" if name == "mul" or name in _SUMS else ""


def _spread(view: View, eqn: Any) -> View:
    """The view as an elementwise operation sees it: scalars and axes of size 1 are broadcast."""
    shape = eqn.outvars[0].aval.shape
    if shape == view.shape:
        return view
    axes = tuple(range(len(shape) - len(view.shape), len(shape))) if view.shape else ()
    return view.then("broadcast", (shape, axes), shape)


# -- primitives that carry a jaxpr -----------------------------------------------------------------


def _enter(
    eqn: Any,
    views: dict[int, View],
    made_of: Sequence[int],
    place: Path,
    loops: tuple[Loop, ...],
    found: Found,
) -> Sequence[View | None]:
    nothing: list[View | None] = [None] * len(eqn.outvars)
    name, inner = eqn.primitive.name, sub_jaxprs(eqn)
    if name == "scan":
        _enter_scan(eqn, inner[0], views, made_of, place, loops, found)
        return nothing
    if name == "cond":
        seen = len(found)
        for branch, body in enumerate(inner):
            env = {body.invars[i - 1]: view for i, view in views.items()}
            origins = dict(zip(body.invars, made_of[1:], strict=True))
            _passed_on(_walk(body, env, origins, (*place, branch), loops, found), name, found)
        if made_of[0] == _EXAMPLE:
            chosen = (u.chosen_at(place) if isinstance(u, Use) else u for u in found[seen:])
            found[seen:] = list(chosen)
        return nothing
    if name.startswith(("custom_jvp", "custom_vjp")):
        _wrap(eqn, inner[0], views, made_of, place, loops, found)
        return nothing
    if _is_call(eqn):
        env = {inner[0].invars[i]: view for i, view in views.items()}
        origins = dict(zip(inner[0].invars, made_of, strict=True))
        return _walk(inner[0], env, origins, (*place, 0), loops, found)
    for view in views.values():
        found.append(Unknown(view.leaf, f"`{name}` cannot be entered"))
    return nothing


def _is_call(eqn: Any) -> bool:
    """Whether an equation evaluates one jaxpr on just its inputs: jit, checkpoint, closed_call,
    whatever its name is. (`shard_map` sees other shapes inside.)
    """
    shapes = lambda atoms: [getattr(atom.aval, "shape", None) for atom in atoms]
    bodies = sub_jaxprs(eqn)
    return (
        len(bodies) == 1
        and eqn.primitive.name not in ("scan", "while", "shard_map")
        and shapes(bodies[0].invars) == shapes(eqn.invars)
        and shapes(bodies[0].outvars) == shapes(eqn.outvars)
    )


def _passed_on(views: Sequence[View | None], name: str, found: Found) -> None:
    """What leaves a body as it is would be lost from sight."""
    for view in views:
        if view is not None:
            found.append(Unknown(view.leaf, f"it is an output of `{name}`"))


def _enter_scan(
    eqn: Any,
    body: Any,
    views: dict[int, View],
    made_of: Sequence[int],
    place: Path,
    loops: tuple[Loop, ...],
    found: Found,
) -> None:
    length = eqn.params["length"]
    consts, carry = scan_sizes(eqn, body)
    origins = dict(zip(body.invars, made_of, strict=True))
    origins.update(dict.fromkeys(body.invars[consts : consts + carry], max(made_of)))
    for stacked in (False, True):
        env = {}
        for i, view in views.items():
            if i < consts and not stacked:
                env[body.invars[i]] = view
            elif i >= consts + carry and stacked:
                env[body.invars[i]] = view.entered()
            elif consts <= i < consts + carry and not stacked:
                found.append(Unknown(view.leaf, "it is carried through a `scan`"))
        if env:
            inside = (*loops, Loop(length, stacked))
            _passed_on(_walk(body, env, origins, (*place, 0), inside, found), "scan", found)


def _wrap(
    eqn: Any,
    body: Any,
    views: dict[int, View],
    made_of: Sequence[int],
    place: Path,
    loops: tuple[Loop, ...],
    found: Found,
) -> None:
    """A custom derivative rule stays as it is: its one use inside is seen from outside."""
    inner: Found = []
    env = {body.invars[i]: view for i, view in views.items()}
    origins = dict(zip(body.invars, made_of, strict=True))
    passed = _walk(body, env, origins, (), loops, inner)
    _passed_on(passed, eqn.primitive.name, inner)
    outside = [_from_outside(body, use, place, loops) for use in inner]
    if len(outside) == 1 and outside[0] is not None:
        found.append(outside[0])
        return
    for use in inner:
        if isinstance(use, Unknown):
            found.append(use)
            continue
        for each in (use,) if use.shift is None else (use, use.shift):
            reason = f"`{eqn.primitive}` does more than one product"
            found.append(Unknown(each.view.leaf, reason))


def _from_outside(
    body: Any, use: Use | Unknown, place: Path, loops: tuple[Loop, ...]
) -> Use | None:
    if isinstance(use, Unknown) or use.bias is not None or use.loops != loops:
        return None
    while len(use.path) > 1:  # calls inside, as long as they only pass everything on
        call = body.eqns[use.path[0]]
        inner = sub_jaxprs(call)[use.path[1]]
        passes = list(call.invars) == list(body.invars) and list(call.outvars) == body.outvars
        if len(body.eqns) != 1 or not passes or not _is_call(call):
            return None
        body, use = inner, dataclasses.replace(use, path=use.path[2:])
    eqn = body.eqns[max(use.path)]  # which has one entry left
    x, y = eqn.invars[use.x], eqn.outvars[use.y]
    if x not in body.invars or y not in body.outvars:
        return None
    return dataclasses.replace(use, path=place, x=body.invars.index(x), y=body.outvars.index(y))


# -- meetings --------------------------------------------------------------------------------------


def _use(
    eqn: Any, position: int, view: View, place: Path, loops: tuple[Loop, ...]
) -> Use | Unknown:
    name = eqn.primitive.name
    use = None
    if name in ("mul", *_SUMS):
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
    view = _spread(view, eqn)
    if any(kind == "broadcast" for kind, _, _ in view.outside.operations):
        return None
    scale = eqn.primitive.name == "mul"
    size = math.prod(view.base)
    arrangement = Elementwise(1, 1, size, math.prod(view.shape) // max(size, 1), view, scale)
    kind = "scale" if scale else "shift"
    return Use(kind, view, arrangement, place, loops, 1 - position)


def _rest(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


# -- biases ----------------------------------------------------------------------------------------


class _Trails:
    """The results of products in one jaxpr, followed until something is added to them."""

    def __init__(self, jaxpr: Any):
        self._counts: dict[Any, int] = {}
        atoms: Iterator[Any] = (a for eqn in jaxpr.eqns for a in eqn.invars)
        for atom in (*atoms, *jaxpr.outvars):
            if not is_literal(atom):
                self._counts[atom] = self._counts.get(atom, 0) + 1
        self._trails: dict[Any, tuple[Use, View]] = {}

    def start(self, eqn: Any, use: Use) -> None:
        y = eqn.outvars[use.y]
        self._trails[y] = use, View(-1, y.aval.shape, y.aval.shape)

    def follow(self, eqn: Any) -> None:
        if len(eqn.invars) != 1 or is_literal(eqn.invars[0]) or eqn.invars[0] not in self._trails:
            return
        use, view = self._trails[eqn.invars[0]]
        moved = follow(eqn, view)
        kept = moved is not None and not moved.repeats and not moved.partial
        if moved is not None and kept and self._counts.get(eqn.invars[0]) == 1:
            self._trails[eqn.outvars[0]] = use, moved

    def join(self, eqn: Any, position: int, shift: Use) -> tuple[Use, View] | None:
        """The product that a shift is added to, and the bias as a view (stack, out), if each
        output of the product has its own entry of the shift.
        """
        other = eqn.invars[1 - position]
        if eqn.primitive.name == "sub" or self._counts.get(other) != 1:
            return None
        weight, trail = self._trails.get(other, (None, None))
        if weight is None or trail is None or shift.loops != weight.loops:
            return None
        arrangement = weight.arrangement
        if math.prod(shift.view.base) != arrangement.stack * arrangement.outputs:
            return None
        if weight.view.depth != shift.view.depth:
            return None
        # Number the entries of the bias, bring the numbers to the product's output, and look.
        numbers = np.arange(math.prod(shift.view.base), dtype=np.int32).reshape(shift.view.base)
        added = np.asarray(on_host(shift.view.inside, numbers))
        source = np.arange(math.prod(trail.base), dtype=np.int32).reshape(trail.base)
        if added.shape != trail.shape:
            return None
        seen = np.empty(source.size, np.int32)
        seen[np.asarray(on_host(trail, source)).ravel()] = added.ravel()
        rows = _on_host_rows(arrangement, seen.reshape(trail.base))
        first = rows[:, 0, :]
        wanted = np.arange(first.size).reshape(first.shape)
        if not (rows == first[:, None]).all() or not (first == wanted).all():
            return None
        view = shift.view.outside
        shape = first.shape
        operations = (*view.operations, ("reshape", view.depth, shape))
        return weight, dataclasses.replace(view, operations=operations, shape=shape)


def on_host(view: View, array: np.ndarray) -> np.ndarray:
    for kind, _, argument in view.operations:
        if kind == "transpose":
            array = array.transpose(argument)
        elif kind == "reshape":
            array = array.reshape(argument)
        elif kind == "reverse":
            array = np.flip(array, argument)
        elif kind == "broadcast":
            shape, axes = argument
            kept = [1] * len(shape)
            for source, axis in enumerate(axes):
                kept[axis] = array.shape[source]
            array = np.broadcast_to(array.reshape(kept), shape)
        else:
            array = array[tuple(slice(*bounds) for bounds in zip(*argument, strict=True))]
    return array


def _on_host_rows(arrangement: Arrangement, y: np.ndarray) -> np.ndarray:
    """The output of a product as (stack, position, out), as `output_rows` has it."""
    if isinstance(arrangement, Convolution):
        batch, feature, *spatial = arrangement.numbers.out_spec
        y = y.transpose((batch, *spatial, feature))
        return np.moveaxis(y.reshape(-1, arrangement.stack, arrangement.outputs), 1, 0)
    assert isinstance(arrangement, Dense)
    stack, free, out = arrangement.y_axes
    shape = (arrangement.stack, arrangement.positions, arrangement.outputs)
    return y.transpose((*stack, *free, *out)).reshape(shape)
