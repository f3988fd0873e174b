"""What planning saves: a fused step against the same parts composed without a plan.

    python -m experiments.bench_plan

Unplanned means what a user writes who combines correct parts: `jax.value_and_grad` for the
gradient, an operator that linearises for itself, a loss of its own for the gain ratio, and a
forward pass of its own for the diagonal, all in one jitted step. XLA's own elimination of common
subexpressions works for both.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optax

import curvax as cx
from experiments.tables import Row, write_results
from experiments.timing import interleave, provenance
from experiments.workloads import Workload, convnet, mlp

Run = Callable[[], Any]
LEARNING_RATE = 1e-3


def planned(method: cx.Method, workload: Workload, batch: Any, key: Any) -> Run:
    """The fused step."""
    step = cx.make_step(optax.chain(method, optax.scale_by_learning_rate(LEARNING_RATE)), method)
    state = step.init(workload.params)
    return lambda: step(workload.params, state, batch, key)[0]


def unplanned(
    objective: cx.Objective, workload: Workload, batch: Any, key: Any, steps: int, parts: set[str]
) -> Run:
    """The same step, each part by itself and compiled by itself."""
    solver = cx.CG(rtol=0.0, atol=0.0, max_steps=steps)
    gradient_of = jax.jit(jax.value_and_grad(objective.value))
    value_of = jax.jit(objective.value)

    @jax.jit
    def solve(params: Any, gradient: Any, diagonal: Any) -> Any:
        operator = cx.Damped(cx.GaussNewton(objective, params, batch), 1.0)
        options = {}
        if diagonal is not None:
            inverse = jax.tree.map(lambda d: (jnp.abs(d) + 1.0) ** -0.75, diagonal)
            options["preconditioner"] = cx.Diagonal(inverse)
        return solver.compute(solver.init(operator, options), gradient, options)[0]

    @jax.jit
    def diagonal_of(params: Any, key: Any) -> Any:
        linearisation = objective.linearise(params, batch)
        return cx.gauss_newton_bartlett(objective, linearisation, key)

    @jax.jit
    def predicted(params: Any, gradient: Any, step: Any) -> Any:
        operator = cx.GaussNewton(objective, params, batch)
        dot = lambda a, b: sum(
            jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        return dot(gradient, step) + 0.5 * dot(step, operator.mv(step))

    def run() -> Any:
        params = workload.params
        value, gradient = gradient_of(params, batch)
        diagonal = diagonal_of(params, key) if "diagonal" in parts else None
        direction = solve(params, gradient, diagonal)
        step = jax.tree.map(lambda d: -LEARNING_RATE * d, direction)
        after = optax.apply_updates(params, step)
        if "gain" in parts:
            ratio = (value - value_of(after, batch)) / -predicted(params, gradient, step)
            return after, ratio
        return after

    return run


def plan_section(seconds: float) -> list[Row]:
    """Planned over unplanned, and what each saving comes from."""
    key = jax.random.key(0)
    small, large = mlp(), mlp(batch=512)
    cases: list[tuple[str, int, set[str], str, Workload]] = [
        ("1 CG iteration", 1, set(), "the linearised forward pass", small),
        ("3 CG iterations", 3, set(), "the same, beside more products", small),
        ("10 CG iterations", 10, set(), "the same, beside more products", small),
        ("1 iteration, gain ratio", 1, {"gain"}, "and value, linearisation; no Jᵀ", small),
        ("3 iterations, gain ratio", 3, {"gain"}, "the same", small),
        ("1 iteration, Bartlett diagonal", 1, {"diagonal"}, "and the diagonal's forward", small),
        ("1 iteration, both", 1, {"gain", "diagonal"}, "all of these", small),
        ("1 CG iteration", 1, set(), "as above", large),
        ("1 iteration, gain ratio", 1, {"gain"}, "as above", large),
        ("1 iteration, both", 1, {"gain", "diagonal"}, "as above", large),
    ]
    rows: list[Row] = []
    for name, steps, parts, source, workload in cases:
        objective = cx.Objective(workload.predict, cx.SoftmaxCrossEntropy())
        batch = (workload.x, workload.labels)
        measured = cx.LevenbergMarquardt(1.0, increase=1.0, decrease=1.0)
        damping = measured if "gain" in parts else cx.Constant(1.0)
        preconditioner = cx.DiagonalPreconditioner(every=1) if "diagonal" in parts else None
        method = cx.methods.ggn_cg(
            objective,
            damping=damping,
            solver=cx.CG(rtol=0.0, atol=0.0, max_steps=steps),
            preconditioner=preconditioner,
        )
        times = interleave(
            {
                "planned": planned(method, workload, batch, key),
                "unplanned": unplanned(objective, workload, batch, key, steps, parts),
            },
            seconds=seconds / len(cases),
        )
        rows.append(
            {
                "model": workload.name,
                "batch": len(workload.x),
                "step": name,
                "planned ms": 1e3 * times["planned"].median,
                "unplanned ms": 1e3 * times["unplanned"].median,
                "planned / unplanned": times["planned"].median / times["unplanned"].median,
                "spread": times["planned"].spread,
                "rounds": len(times["planned"].seconds),
                "what is shared": source,
            }
        )
    return rows


def product_section(workloads: list[Workload], seconds: float) -> list[Row]:
    """Products with the Gauss-Newton matrix and the Hessian, in gradients.

    A product is the slope over repeated products with a linearised operator (its forward pass is
    made once, as in a solve); "alone" is one product with its own forward pass.
    """
    return [
        _product_row(operator, workload, seconds / (2 * len(workloads)))
        for workload in workloads
        for operator in (cx.GaussNewton, cx.Hessian)
    ]


def _product_row(operator: Any, workload: Workload, seconds: float, repeats: int = 5) -> Row:
    objective = cx.Objective(workload.predict, cx.SoftmaxCrossEntropy())
    params, batch = workload.params, (workload.x, workload.labels)

    def products(count: int) -> Run:
        def run(params: Any) -> Any:
            linear = lx.linearise(operator(objective, params, batch))
            vector = params
            for _ in range(count):
                vector = jax.tree.map(lambda v: 1e-2 * v, linear.mv(vector))
            return vector

        compiled = jax.jit(run)
        return lambda: compiled(params)

    gradient = jax.jit(jax.value_and_grad(lambda p: objective.value(p, batch)))
    alone = jax.jit(lambda p: operator(objective, p, batch).mv(p))
    times = interleave(
        {
            "gradient": lambda: gradient(params),
            "one": products(1),
            "many": products(1 + repeats),
            "alone": lambda: alone(params),
        },
        seconds=seconds,
    )
    product = (times["many"].median - times["one"].median) / repeats
    return {
        "model": workload.name,
        "product with": operator.__name__,
        "gradient ms": 1e3 * times["gradient"].median,
        "product / gradient": product / times["gradient"].median,
        "alone / gradient": times["alone"].median / times["gradient"].median,
        "spread": times["many"].spread,
        "rounds": len(times["many"].seconds),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs both sections, prints tables, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="per table, twice that for the first (default: 20)",
    )
    parser.add_argument("--out", type=Path, default=Path("results/bench_plan.json"))
    args = parser.parse_args(argv)
    sections = {
        "plan": lambda: plan_section(2 * args.seconds),
        "products": lambda: product_section([mlp(), convnet()], args.seconds),
    }
    write_results(sections, args.out, provenance(), echo=print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
