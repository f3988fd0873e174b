"""Evaluating a model's jaxpr with taps in it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from curvax._jaxpr import bind, scan_sizes, sub_jaxprs
from curvax.taps.primitive import Rule, tap
from curvax.taps.uses import Path, Use

# What the tap of a use is given: probes and bases, with the loop axes of the use first.
Payload = tuple[tuple[Array, ...], tuple[Array, ...]]


class Tapped:
    """A jaxpr of one example, with a tap at each of the given uses.

    **Arguments:** the (closed) jaxpr; for each use, by any hashable name, the use and its rule.
    """

    def __init__(self, closed: Any, taps: Mapping[Any, tuple[Use, Rule]]):
        self._closed = closed
        self._taps = dict(taps)
        self._at: dict[Path, list[Any]] = {}
        self._choices = {place for use, _ in taps.values() for place in use.choices}
        for name, (use, _) in self._taps.items():
            self._at.setdefault(use.path, []).append(name)

    def __call__(
        self, args: Sequence[Any], payloads: Mapping[Any, Payload], weight: Array
    ) -> list[Array]:
        """The outputs; `weight` of the example, a scalar."""
        closed = self._closed
        return self._run(closed.jaxpr, closed.consts, args, (), dict(payloads), weight, 0)

    def _run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Any],
        path: Path,
        payloads: dict[Any, Payload],
        weight: Array,
        depth: int,
    ) -> list[Array]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            place = (*path, index)
            inputs = [read(atom) for atom in eqn.invars]
            names = [name for name in payloads if self._taps[name][0].path[: len(place)] == place]
            if any(len(self._taps[name][0].path) > len(place) for name in names):
                inside = {name: payloads[name] for name in names}
                outputs = self._enter(eqn, inputs, place, inside, weight, depth)
            else:
                outputs = bind(eqn, inputs)
            for name in self._at.get(place, ()):
                if name in payloads:
                    use, rule = self._taps[name]
                    probes, bases = payloads[name]
                    data = (jnp.asarray(inputs[use.x]), weight)
                    outputs[use.y] = tap(outputs[use.y], probes, data, bases, rule)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _enter(
        self,
        eqn: Any,
        inputs: list[Any],
        place: Path,
        payloads: dict[Any, Payload],
        weight: Array,
        depth: int,
    ) -> list[Array]:
        """An equation that carries jaxprs, with the taps in them."""
        name, params = eqn.primitive.name, eqn.params
        bodies = [_closed(inner) for inner in sub_jaxprs_closed(eqn)]

        def run(branch: int, args: Sequence[Any], given: Any, weight: Array, deeper: int) -> Any:
            jaxpr, consts = bodies[branch]
            return self._run(jaxpr, consts, args, (*place, branch), given, weight, deeper)

        if name == "scan":
            sizes = scan_sizes(eqn, bodies[0][0])
            return self._scan(params, sizes, inputs, payloads, weight, depth, run)
        if name == "cond":
            index, *operands = inputs
            if place in self._choices:
                branch = lambda b, args: run(b, args, payloads, weight, depth)
                return _select(index, operands, branch, len(bodies))
            branches = [
                lambda args, given, w, b=branch: run(b, args, given, w, depth)
                for branch in range(len(bodies))
            ]
            return lax.switch(index, branches, operands, payloads, weight)
        if "policy" in params and "prevent_cse" in params:  # jax.checkpoint
            again = jax.checkpoint(
                lambda args, given, w: run(0, args, given, w, depth),
                prevent_cse=params["prevent_cse"],
                policy=params["policy"],
            )
            return again(inputs, payloads, weight)
        return run(0, inputs, payloads, weight, depth)

    def _scan(
        self,
        params: Any,
        sizes: tuple[int, int],
        inputs: list[Any],
        payloads: dict[Any, Payload],
        weight: Array,
        depth: int,
        run: Any,
    ) -> list[Array]:
        start, end = sizes[0], sum(sizes)
        stacked = {
            name: given
            for name, given in payloads.items()
            if self._taps[name][0].loops[depth].stacked
        }
        common = {name: given for name, given in payloads.items() if name not in stacked}

        def body(carry: list[Any], each: Any) -> Any:
            xs, given = each
            args = [*inputs[:start], *carry, *xs]
            outputs = run(0, args, common | given, weight, depth + 1)
            return outputs[: end - start], outputs[end - start :]

        carry, ys = lax.scan(
            body,
            inputs[start:end],
            (inputs[end:], stacked),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]


def _select(index: Array, operands: list[Any], branch: Any, count: int) -> list[Array]:
    """What `vmap` makes of a `cond` if examples choose their own branch: all branches, selected.

    `vmap` itself would select among the probes too, and hold a statistic for each example.
    """
    results = []
    for b in range(count):
        # No derivative from a branch not taken, where there might be none.
        taken = [lax.select(index == b, x, lax.stop_gradient(x)) for x in operands]
        results.append(branch(b, taken))
    return [lax.select_n(index, *outputs) for outputs in zip(*results, strict=True)]


def sub_jaxprs_closed(eqn: Any) -> list[Any]:
    """The jaxprs of an equation, as the equation holds them (with their constants)."""
    found = []
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(each, "jaxpr", each), "eqns"):
                found.append(each)
    assert len(found) == len(sub_jaxprs(eqn))
    return found


def _closed(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
