"""Reading and rewriting jaxprs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex_core
from jaxtyping import Array

# Primitives that only wrap a jaxpr, by the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr"}

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

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = None if rule is None else rule(eqn, inputs)
        if outputs is None and eqn.primitive.name in _CALLS:
            inner = eqn.params[_CALLS[eqn.primitive.name]]
            inner, inner_consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            outputs = evaluate(inner, inner_consts, inputs, rule)
        if outputs is None:
            outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in (jaxpr.outvars if wanted is None else wanted)]


def is_literal(atom: Any) -> bool:
    """Whether an atom of a jaxpr is a constant written in place."""
    return isinstance(atom, jex_core.Literal)
