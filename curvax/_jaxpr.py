"""Reading and rewriting jaxprs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex_core
import jax.numpy as jnp
from jaxtyping import Array

# Primitives that only wrap a jaxpr, by the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr"}

# FLOPs of factorisations of n × n matrices, in n³.
_CUBES = {
    "cholesky": 1 / 3,
    "lu": 2 / 3,
    "geqrf": 4 / 3,
    "householder_product": 4 / 3,
    "qr": 8 / 3,
    "eigh": 9.0,
    "svd": 20.0,
}

Rule = Callable[[Any, list[Any]], list[Any] | None]


def sub_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs that an equation carries, whatever its primitive is called."""
    found = []
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def scan_sizes(eqn: Any, body: Any) -> tuple[int, int]:
    """How many constants and carries a `scan` has, which come first among its inputs.

    Read off the shapes: a carry is as large outside of the body as inside, what is scanned over
    has one more axis outside. (How the primitive itself notes it differs between versions of JAX.)
    """
    alike = lambda outer, inner: outer.aval.ndim == inner.aval.ndim
    carry = sum(map(alike, eqn.outvars, body.outvars))
    same = sum(map(alike, eqn.invars, body.invars))
    return same - carry, carry


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of one equation, under the mesh (of Explicit or of Auto axes) that it was traced
    under.
    """
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def evaluate(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    rule: Rule | None = None,
    wanted: Sequence[Any] | None = None,
) -> list[Array]:
    """Evaluates a jaxpr with the calls in it inlined.

    `rule(eqn, inputs)` may give the outputs of an equation in place of the equation itself;
    `wanted` asks for other variables than the outputs.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    results = jaxpr.outvars if wanted is None else wanted
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = None if rule is None else rule(eqn, inputs)
        if outputs is None and eqn.primitive.name in _CALLS:
            inner = eqn.params[_CALLS[eqn.primitive.name]]
            inner, inner_consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            outputs = evaluate(inner, inner_consts, inputs, rule)
        if outputs is None:
            outputs = bind(eqn, inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    # A constant among the results would be no array.
    array = lambda atom: jnp.asarray(atom.val, atom.aval.dtype)
    return [array(atom) if is_literal(atom) else read(atom) for atom in results]


def cost(jaxpr: Any) -> tuple[float, float]:
    """FLOPs of a jaxpr, and the bytes that its equations read and write, one by one.

    Equations whose results nothing uses are left out. The body of a `scan` counts as often as it
    runs, that of a `while` once, of a `cond` the dearest branch; everything else as in
    `operations`. Fusion saves bytes that are counted here.
    """
    flops = moved = 0.0
    for eqn in used(jaxpr):
        inner = [cost(sub) for sub in sub_jaxprs(eqn)]
        if inner:
            combine = max if eqn.primitive.name == "cond" else sum
            repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            flops += repeats * combine(each[0] for each in inner)
            moved += repeats * combine(each[1] for each in inner)
        else:
            flops += operations(eqn)
            moved += sum(_bytes(atom.aval) for atom in (*eqn.invars, *eqn.outvars))
    return flops, moved


def used(jaxpr: Any) -> list[Any]:
    """The equations whose results are needed for the outputs."""
    needed = {atom for atom in jaxpr.outvars if not is_literal(atom)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
            found.append(eqn)
    return found[::-1]


def operations(eqn: Any) -> float:
    """FLOPs of one equation: for a matrix product or convolution two for each multiplication, for a
    factorisation the usual share of n³, for anything else one for each entry of its results.
    """
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name in _CUBES:
        *stack, rows, columns = eqn.invars[0].aval.shape
        return _CUBES[eqn.primitive.name] * math.prod(stack) * rows * columns * min(rows, columns)
    if eqn.primitive.name == "triangular_solve":
        return float(out * eqn.invars[0].aval.shape[-1])
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    return float(out)


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0))


def is_literal(atom: Any) -> bool:
    """Whether an atom of a jaxpr is a constant written in place."""
    return isinstance(atom, jex_core.Literal)
