"""Biases: what is added to the result of a product, entry by entry of its outputs."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from curvax._jaxpr import is_literal
from curvax.taps.arrangement import Arrangement, Convolution, Dense
from curvax.taps.layout import View, follow, on_host
from curvax.taps.uses import Use


class Trails:
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
        added = on_host(shift.view.inside, numbers)
        source = np.arange(math.prod(trail.base), dtype=np.int32).reshape(trail.base)
        if added.shape != trail.shape:
            return None
        seen = np.empty(source.size, np.int32)
        seen[on_host(trail, source).ravel()] = added.ravel()
        rows = _rows(arrangement, seen.reshape(trail.base))
        first = rows[:, 0, :]
        wanted = np.arange(first.size).reshape(first.shape)
        if not (rows == first[:, None]).all() or not (first == wanted).all():
            return None
        view = shift.view.outside
        shape = first.shape
        operations = (*view.operations, ("reshape", view.depth, shape))
        return weight, dataclasses.replace(view, operations=operations, shape=shape)


def _rows(arrangement: Arrangement, y: np.ndarray) -> np.ndarray:
    """The output of a product as (stack, position, out), as `output_rows` has it."""
    if isinstance(arrangement, Convolution):
        batch, feature, *spatial = arrangement.numbers.out_spec
        y = y.transpose((batch, *spatial, feature))
        return np.moveaxis(y.reshape(-1, arrangement.stack, arrangement.outputs), 1, 0)
    assert isinstance(arrangement, Dense)
    stack, free, out = arrangement.y_axes
    shape = (arrangement.stack, arrangement.positions, arrangement.outputs)
    return y.transpose((*stack, *free, *out)).reshape(shape)
