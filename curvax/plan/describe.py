"""A plan in words and numbers, like a database's EXPLAIN: before the first step, nothing run."""

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from curvax import _tree
from curvax._jaxpr import cost
from curvax._tables import table
from curvax.objective import Batch, Objective, Params
from curvax.plan.plan import Entry
from curvax.plan.quantities import (
    AbstractCurvatureQuantity,
    AbstractQuantity,
    GainRatio,
    HessianCurvature,
    Scope,
)

if TYPE_CHECKING:
    from curvax.transform import Method


def describe(
    method: "Method", model: PyTree[Any], batch: Batch, key: PRNGKeyArray | None = None
) -> str:
    """The table behind [`Method.describe`][curvax.Method]."""
    params, objective = method.objective.bind(model)
    objective.check(params, batch, key)
    key = jax.random.key(0) if key is None else key
    gradient = _cost(lambda p, k: jax.value_and_grad(objective.value)(p, batch, k), params, key)
    rows: list[tuple[str, ...]] = [
        ("quantity", "wanted by", "every", "FLOPs / gradient", "bytes / gradient"),
        ("value and gradient", "step", "1", "1.00", "1.00"),
    ]
    for entry in method.plan.entries:
        rows.extend(_entry_rows(entry, objective, params, batch, key, gradient))
    lines = [
        f"one gradient: {gradient[0] / 1e6:.3g} MFLOP, {gradient[1] / 1e6:.3g} MB moved "
        "(before fusion)",
        f"solver: {_solver_line(method)}",
        f"damping: {type(method.damping).__name__}",
        "",
        *table(rows),
        "",
        *_state_lines(method, params),
    ]
    return "\n".join(lines)


def _entry_rows(
    entry: Entry,
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
    gradient: tuple[float, float],
) -> list[tuple[str, ...]]:
    quantity = entry.quantity
    every = ", ".join(
        f"{every}" + (f" (+{offset})" if offset else "") for every, offset in entry.cadences
    )
    who = ", ".join(entry.wanted_by)

    def row(label: str, how_often: str, cost: tuple[float, float]) -> tuple[str, ...]:
        ratios = [f"{cost[i] / gradient[i]:.2f}" if gradient[i] else "not known" for i in range(2)]
        return (label, who, how_often, *ratios)

    if isinstance(quantity, GainRatio):
        trial = _cost(lambda p, k: objective.value(p, batch, k), params, key)
        return [row(quantity.label + ", besides one product with J", every, trial)]
    extra = _cost(lambda p, k: _with_gradient(quantity, objective, p, batch, k), params, key)
    alone = _cost(lambda p, k: _with_gradient(None, objective, p, batch, k), params, key)
    more = (max(extra[0] - alone[0], 0.0), max(extra[1] - alone[1], 0.0))
    rows = [row(quantity.label, every, more)]
    if isinstance(quantity, AbstractCurvatureQuantity):
        operator = lambda p, k: quantity.compute(Scope(objective, p, batch, k))
        both = _cost(lambda p, k: (lambda a: (a, a.mv(p)))(operator(p, k)), params, key)
        one = _cost(operator, params, key)
        rows.append(row("  each product with it", "solve", (both[0] - one[0], both[1] - one[1])))
    return rows


def _with_gradient(
    quantity: AbstractQuantity | None,
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray,
) -> Any:
    from_hessian = isinstance(quantity, HessianCurvature)
    scope = Scope(objective, params, batch, key, gradient_from_hessian=from_hessian)
    value = None if quantity is None else quantity.compute(scope)
    return scope.value, scope.gradient, value


def _cost(function: Any, *args: Any) -> tuple[float, float]:
    """FLOPs and bytes of a function of arrays, by its jaxpr: the same on every backend."""
    # What is no array in the results is left out.
    arrays = lambda *args: eqx.filter(function(*args), eqx.is_array)
    return cost(jax.make_jaxpr(arrays)(*args).jaxpr)


def _solver_line(method: "Method") -> str:
    steps = getattr(method.solver, "max_steps", None)
    limit = f", at most {steps} products" if steps else ""
    return f"{type(method.solver).__name__}{limit}"


def _state_lines(method: "Method", params: Params) -> list[str]:
    state = jax.eval_shape(method.init, params)
    param_paths = _tree.paths(params)
    per_leaf: dict[str, int] = dict.fromkeys(param_paths, 0)
    shared = 0
    for path, leaf in zip(_tree.paths(state), jax.tree.leaves(state), strict=True):
        # The longest: ['z']['w'] ends with ['w'], too.
        owners = [p for p in param_paths if p != "<root>" and path.endswith(p)]
        owner = max(owners, key=len, default=None)
        if owner is None:
            shared += _tree.nbytes(leaf)
        else:
            per_leaf[owner] += _tree.nbytes(leaf)
    rows = [("parameter", "shape", "bytes", "state bytes", "handled by")]
    for path, leaf in zip(param_paths, jax.tree.leaves(params), strict=True):
        rows.append(
            (
                path,
                f"{leaf.dtype}{list(leaf.shape)}",
                f"{_tree.nbytes(leaf):,}",
                f"{per_leaf[path]:,}",
                method.curvature.label,
            )
        )
    total = sum(per_leaf.values()) + shared
    return [
        *table(rows),
        "",
        f"state in all: {total:,} bytes ({total / max(_tree.nbytes(params), 1):.2f} × the "
        f"parameters; Adam: 2.00 ×), {shared:,} of them not of any one parameter",
    ]
