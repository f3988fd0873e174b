"""Where the parameters of a model meet its activations, read off the jaxpr of one example.

Nothing is matched against known layers: each parameter leaf is followed through the operations that
only move its entries, and into every primitive that carries a jaxpr, until it meets something that
is no parameter. What that meeting is (a contraction, a convolution, a lookup, a product or sum) and
which axes are inputs and outputs is taken from the operation's own dimension numbers.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from curvax._jaxpr import is_literal, scan_sizes, sub_jaxprs
from curvax.taps.arrangement import Convolution, Dense
from curvax.taps.biases import Trails
from curvax.taps.layout import View, follow, spread
from curvax.taps.uses import SUMS, Loop, Path, Unknown, Use, use_of

# What a variable is made of: constants alone, parameters too, or (also) the example.
_PARAMETERS, _EXAMPLE = 1, 2
Origins = dict[Any, int]

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
    trails = Trails(jaxpr)
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
        if eqn.primitive.name in SUMS and other == 0:
            # A constant added to a parameter changes no gradient.
            moved = spread(eqn, view) if position == 0 or eqn.primitive.name != "sub" else None
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
        use = use_of(eqn, position, view, place, loops)
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
    return f"it meets a constant in `{name}`" if name == "mul" or name in SUMS else ""


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
