"""The two ways from curvature that is observed anew to a direction: to solve with it, or to apply
the inverse of an approximation that a state keeps.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, Bool, Scalar, ScalarLike

from curvax import _tree
from curvax._binding import bound_or
from curvax._masked import fill_masked, keep_unmasked, seen_by
from curvax.damping import AbstractDamping, DampingState, as_damping
from curvax.objective import Objective, Params
from curvax.operators import AbstractCurvature, AbstractOutputCurvature, Damped
from curvax.plan import (
    AbstractCurvatureQuantity,
    GaussNewtonCurvature,
    Observation,
    Requirement,
)
from curvax.preconditioners import AbstractPreconditioner
from curvax.scalings import AbstractScaling, AsIs, Context
from curvax.searches import AbstractSearch
from curvax.solvers import CG, RowSpace, StopReason, row_factor
from curvax.transform import Directed, Method, SecondOrderState, compose


def second_order(
    objective: Objective,
    *,
    curvature: AbstractCurvatureQuantity,
    solver: lx.AbstractLinearSolver[Any],
    damping: AbstractDamping | ScalarLike,
    preconditioner: AbstractPreconditioner | None = None,
    warm_start: float | None = None,
    momentum: float | None = None,
    search: AbstractSearch | None = None,
) -> Method:
    """The transformation g ↦ (A + λI)⁻¹ g.

    Like `optax.scale_by_adam` it returns the direction with the sign of the gradient: chain it
    with `optax.scale_by_learning_rate`.

    **Arguments:**

    - `objective`: what is minimised.
    - `curvature`: which A, as a quantity of the plan.
    - `solver`: any lineax solver.
    - `damping`: a policy, or a number for a constant λ.
    - `preconditioner`: for solvers that take one.
    - `warm_start`: start the solver from the last solution times this factor (Martens 2010 decays
      it); None starts from zero.
    - `momentum`: μ of μx₋₁ + (A + λI)⁻¹(g − A μx₋₁), with x₋₁ the last direction: the damping then
      pulls towards μx₋₁ instead of zero (SPRING, Goldshlager et al. 2024, eq. 26). It has its
      effect whatever the solver, where a warm start saves steps of an iterative one.
    - `search`: what chooses the direction by the value of the objective after a whole step, among
      those that the solver came by. The warm start is the solver's own solution all the same
      (Martens 2010).

    Its `update(grads, state, params, *, observation=None, batch=None, key=None,
    curvature_batch=None)` needs an `observation` (see [`Method`][curvax.Method]) or a `batch`, and
    **raises** `ValueError` without either. A curvature batch, if given, is where A lives; the gain
    ratio is always measured on the batch of the gradient, for the full step −(A + λI)⁻¹g. (In a
    fused step it is measured for the update that the whole chain made.)
    """
    damping = as_damping(damping)
    if warm_start is not None and momentum is not None:
        raise ValueError(
            f"warm_start: got {warm_start} with momentum={momentum}, wanted one of them: the "
            "momentum solves for what is to be added to the last direction."
        )
    if search is not None and momentum is not None:
        raise ValueError(
            f"search: got one with momentum={momentum}, wanted one of them: what the solver came "
            "by is then only a part of the direction."
        )
    requirements = [Requirement(curvature, "solver")]
    if preconditioner is not None:
        requirements.extend(preconditioner.requirements())
    remembers = warm_start is not None or momentum is not None

    def init(params: Params) -> tuple[Any, Any]:
        solution = _tree.zeros_like(params) if remembers else None
        with bound_or(objective, params):
            return solution, None if preconditioner is None else preconditioner.init(params)

    def direct(
        updates: Params, state: SecondOrderState, observation: Observation, level: DampingState
    ) -> Directed:
        operator = seen_by(observation[curvature], updates)
        memory = state.preconditioner
        if preconditioner is not None:
            memory = preconditioner.update(memory, observation)
        damped = Damped(operator, level.damping)

        options: dict[str, Any] = {}
        if preconditioner is not None:
            options["preconditioner"] = preconditioner.operator(memory, level.damping)
        if warm_start is not None:
            options["y0"] = _tree.scale(warm_start, state.solution)
        if damping.bounded and isinstance(solver, CG):
            options["radius"] = level.radius
        right, ahead = updates, None
        if momentum is not None:
            ahead = _tree.scale(momentum, state.solution)
            right = _tree.sub(updates, operator.mv(_tree.cast(ahead, operator.in_structure())))
        if isinstance(solver, RowSpace):
            rows = _rows_of_gradient(operator, observation, updates)
            if rows is not None and ahead is not None:
                rows = rows - row_factor(operator).transpose_mv(ahead)
            if rows is not None:
                options["rows"] = rows
        # The solvers of lineax mix the dtypes of operator and vector.
        with jax.numpy_dtype_promotion("standard"):
            factorised: Any = solver.init(damped, options)
            solution, _, stats = solver.compute(factorised, right, options)
        if ahead is not None:
            solution = _tree.add(solution, ahead)
        if damping.bounded:
            solution = _shorten(solution, level.radius)
        direction = solution
        if search is not None:
            direction = search.choose(solution, stats, lambda x: _value_after(observation, x))
        return Directed(
            direction,
            _tree.cast(solution, state.solution) if remembers else None,
            memory,
            _tree.all_finite(memory) & ~_came_to_nothing(stats),
            stats.get("num_steps", -1),
            stats.get("residual_norm", math.nan),
        )

    return compose(
        objective,
        requirements,
        curvature=curvature,
        damping=damping,
        init=init,
        direct=direct,
        solver=solver,
    )


def preconditioned(
    objective: Objective,
    preconditioner: AbstractPreconditioner,
    *,
    damping: AbstractDamping | ScalarLike = 0.0,
    momentum: optax.GradientTransformation | None = None,
    scaling: AbstractScaling = AsIs(),
    curvature: AbstractCurvatureQuantity = GaussNewtonCurvature(),
) -> Method:
    """The transformation g ↦ scaling(P m(g)), with P ≈ (A + λI)⁻¹ as a preconditioner keeps it, and
    nothing solved.

    **Arguments:**

    - `objective`: what is minimised.
    - `preconditioner`: P, and what it wants observed.
    - `damping`: a policy, or a number for a constant λ. A policy that looks at the gain ratio gets
      it from the quadratic model of `curvature`.
    - `momentum`: m, such as `optax.ema(0.9)`, for methods that have it before P. It is a part of
      the state, in float32 at least; without it, momentum is what the chain has behind the method.
    - `scaling`: what is made of the preconditioned gradient.

    `update` **raises** `ValueError` without `observation` and `batch`.
    """
    before = optax.identity() if momentum is None else momentum

    def init(params: Params) -> tuple[Any, Any]:
        inner = before.init(_tree.widened(params))
        return (inner, scaling.init(params)), preconditioner.init(params)

    def direct(
        updates: Params, state: SecondOrderState, observation: Observation, level: DampingState
    ) -> Directed:
        inner, scaled = state.solution
        memory = preconditioner.update(state.preconditioner, observation)
        seen = keep_unmasked(updates, observation.params)
        # Hyperparameters may be arrays of another dtype.
        with jax.numpy_dtype_promotion("standard"):
            wide = _tree.cast(updates, _tree.widened(seen))
            average, moved = before.update(wide, inner, seen)
        inner = _tree.cast(moved, inner)
        operator = preconditioner.operator(memory, level.damping)
        direction = operator.mv(_tree.cast(average, operator.in_structure()))
        context = Context(updates, seen, observation, level.damping, (), operator)
        direction, scaled = scaling.apply(scaled, direction, context)
        # What was not refreshed was found finite when it was.
        finite = memory is state.preconditioner or _tree.all_finite(memory)
        return Directed(direction, (inner, scaled), memory, finite)

    return compose(
        objective,
        [*preconditioner.requirements(), *scaling.requirements()],
        curvature=curvature,
        damping=as_damping(damping),
        init=init,
        direct=direct,
    )


def _rows_of_gradient(
    operator: AbstractCurvature, observation: Observation, updates: Params
) -> Array | None:
    """Row coordinates of the gradient, if it is still the loss's own gradient on these rows.

    The identity check is made while tracing: anything that changed the gradient on the way (a
    clip, a mask, an l2 term) made a new tree.
    """
    own = updates is observation.gradient and observation.curvature_on_batch
    if not own or observation.objective.l2 or not isinstance(operator, AbstractOutputCurvature):
        return None
    return row_factor(operator).gradient_rows()


def _value_after(observation: Observation, direction: Params) -> Scalar:
    """The objective on the batch of the gradient, after a step of length 1 against a direction."""
    full = fill_masked(direction, _tree.structure(observation.params))
    moved = _tree.sub(observation.params, full)
    return observation.value_at(moved)


def _shorten(solution: Params, radius: Scalar) -> Params:
    length = _tree.norm(solution)
    radius = radius.astype(length.dtype)
    return _tree.scale(jnp.minimum(1.0, radius / jnp.maximum(length, 1e-30)), solution)


def _came_to_nothing(stats: dict[str, Any]) -> Bool[Array, ""]:
    """Whether CG met a value that is not finite before its first step: it then returns where it
    started, which is finite but no solution.
    """
    if "stop" not in stats:
        return jnp.asarray(False)
    return (stats["stop"] == StopReason.nonfinite.value) & (stats["num_steps"] == 0)
