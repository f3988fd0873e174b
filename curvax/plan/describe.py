"""A plan in words and numbers, like a database's EXPLAIN: before the first step, nothing run."""

from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from curvax import _tree
from curvax._binding import binding
from curvax._jaxpr import cost
from curvax._tables import table
from curvax.batch import Batch
from curvax.objective import Objective, Params
from curvax.plan.phases import Rates, lines, phases
from curvax.plan.plan import Entry
from curvax.plan.quantities import (
    AbstractCurvatureQuantity,
    AbstractQuantity,
    GainRatio,
    Scope,
)

if TYPE_CHECKING:
    from curvax.step import Step
    from curvax.transform import Method


def describe_on_mesh(
    step: "Step",
    model: PyTree[Any],
    batch: Batch,
    key: PRNGKeyArray | None,
    mesh: Mesh | None,
    rates: Rates | None,
    state_sharding: PyTree[Any],
) -> str:
    """The table behind [`Step.describe`][curvax.Step]; with the kinds of steps on a mesh."""
    text = describe(step.method, model, batch, key)
    if mesh is None:
        if rates is not None or state_sharding is not None:
            raise ValueError(
                "mesh: got None with rates= or state_sharding=, wanted the mesh that they are for."
            )
        return text
    key = jax.random.key(0) if key is None else key
    found = phases(step, model, batch, key, mesh, state_sharding)
    return "\n".join([text, "", *lines(found, mesh, rates)])


def describe(
    method: "Method", model: PyTree[Any], batch: Batch, key: PRNGKeyArray | None = None
) -> str:
    """What a step of a method computes, and what its state holds."""
    params, objective = method.objective.bind(model)
    objective.check(params, batch, key)
    key = jax.random.key(0) if key is None else key
    with binding(objective, params):
        state = jax.eval_shape(method.init, params)
    gradient = _cost(jax.value_and_grad(objective.value), params, batch, key)
    rows: list[tuple[str, ...]] = [
        ("quantity", "wanted by", "every", "FLOPs / gradient", "bytes / gradient"),
        ("value and gradient", "step", "1", "1.00", "1.00"),
    ]
    for entry in method.plan.entries:
        case = _Case(method, objective, params, batch, key, state, gradient)
        rows.extend(_entry_rows(entry, case))
    lines = [
        f"one gradient: {gradient[0] / 1e6:.3g} MFLOP, {gradient[1] / 1e6:.3g} MB moved "
        "(before fusion)",
        f"solver: {_solver_line(method)}",
        f"damping: {type(method.damping).__name__}",
        "",
        *table(rows),
        "",
        *_state_lines(method, objective, params, state),
    ]
    return "\n".join(lines)


class _Case(NamedTuple):
    """What costs are counted for."""

    method: "Method"
    objective: Objective
    params: Params
    batch: Batch
    key: PRNGKeyArray
    state: Any
    gradient: tuple[float, float]

    def cost(self, quantity: AbstractQuantity | None, then: Any = None) -> tuple[float, float]:
        """FLOPs and bytes of the gradient with a quantity, and of a function of the latter."""

        def compute(params: Params, batch: Batch, key: PRNGKeyArray, state: Any) -> Any:
            scope = Scope(
                self.objective,
                params,
                batch,
                key,
                gradient_from_hessian=quantity is not None and quantity.from_hessian,
                taps=(quantity,) if quantity is not None and quantity.tapped else (),
                bases=None if self.method.bases is None else self.method.bases(state),
            )
            value = None if quantity is None else quantity.compute(scope)
            result = value if then is None else then(value, params)
            return scope.value, scope.gradient, result

        return _cost(compute, self.params, self.batch, self.key, self.state)


def _entry_rows(entry: Entry, case: _Case) -> list[tuple[str, ...]]:
    quantity, gradient = entry.quantity, case.gradient
    every = ", ".join(
        f"{every}" + (f" (+{offset})" if offset else "") for every, offset in entry.cadences
    )
    who = ", ".join(entry.wanted_by)

    def row(label: str, how_often: str, cost: tuple[float, float]) -> tuple[str, ...]:
        ratios = [f"{cost[i] / gradient[i]:.2f}" if gradient[i] else "not known" for i in range(2)]
        return (label, who, how_often, *ratios)

    if isinstance(quantity, GainRatio):
        trial = _cost(case.objective.value, case.params, case.batch, case.key)
        return [row(quantity.label + ", besides one product with J", every, trial)]
    extra, alone = case.cost(quantity), case.cost(None)
    more = (max(extra[0] - alone[0], 0.0), max(extra[1] - alone[1], 0.0))
    rows = [row(quantity.label, every, more)]
    if isinstance(quantity, AbstractCurvatureQuantity):
        operator = lambda p, b, k: quantity.compute(Scope(case.objective, p, b, k))
        product = lambda p, b, k: (lambda a: (a, a.mv(p)))(operator(p, b, k))
        at = (case.params, case.batch, case.key)
        both, one = (_cost(f, *at) for f in (product, operator))
        rows.append(row("  each product with it", "solve", (both[0] - one[0], both[1] - one[1])))
    return rows


def _cost(function: Any, *args: Any) -> tuple[float, float]:
    """FLOPs and bytes of a function of arrays, by its jaxpr: the same on every backend."""
    # What is no array in the results is left out.
    arrays = lambda *args: eqx.filter(function(*args), eqx.is_array)
    return cost(jax.make_jaxpr(arrays)(*args).jaxpr)


def _solver_line(method: "Method") -> str:
    if method.solver is None:
        kept = "the damped inverse of each block is kept"
        return f"none: {kept if method.blocks is not None else 'a preconditioner is applied'}"
    steps = getattr(method.solver, "max_steps", None)
    limit = f", at most {steps} products" if steps else ""
    return f"{type(method.solver).__name__}{limit}"


def _state_lines(method: "Method", objective: Objective, params: Params, state: Any) -> list[str]:
    param_paths = _tree.paths(params)
    per_leaf: dict[str, int] = dict.fromkeys(param_paths, 0)
    own = "preconditioner" if method.solver is None else method.curvature.label
    handled = dict.fromkeys(param_paths, own)
    shared = 0
    memory: dict[str, Any] = {}
    if method.blocks is not None:
        memory = state.preconditioner
        state = state._replace(preconditioner=None)
        for block in method.blocks(params, objective):
            owner = param_paths[block.leaf]
            per_leaf[owner] += _tree.nbytes(memory[block.path])
            handled.update({param_paths[leaf]: _handled(block, owner) for leaf in block.leaves})
            handled[owner] = _handled(block, None)
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
                handled[path],
            )
        )
    total = sum(per_leaf.values()) + shared
    return [
        *table(rows),
        "",
        f"state in all: {total:,} bytes ({total / max(_tree.nbytes(params), 1):.2f} × the "
        f"parameters; Adam: 2.00 ×), {shared:,} of them not of any one parameter",
    ]


def _handled(block: Any, owner: str | None) -> str:
    """The block of a leaf, in words."""
    if owner is not None:
        return f"the block of {owner}"
    if hasattr(block, "reason"):
        fallback = f", FALLBACK: {block.reason}" if block.reason else ""
        return f"diagonal block ({block.kind}){fallback}"
    return f"Kronecker block ({block.kind}), {block.input} ⊗ {block.output}"
