"""The frame of a method: an Optax transformation that observes a batch."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar, ScalarLike

from curvax import _tree
from curvax._convolution import loop_safe
from curvax._masked import fill_masked, is_masked_tree, seen_by
from curvax.batch import Batch
from curvax.damping import AbstractDamping, DampingState, Gain
from curvax.objective import Objective, Params
from curvax.operators import AbstractCurvature
from curvax.operators.algebra import quadratic_form
from curvax.plan import AbstractCurvatureQuantity, GainRatio, Observation, Plan, Requirement
from curvax.plan.phases import Rates


class Metrics(NamedTuple):
    """Telemetry of one step: scalars, always the same ones; NaN (or −1) where not measured."""

    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    solution_norm: Float[Array, ""]
    damping_used: Float[Array, ""]
    radius_used: Float[Array, ""]
    gain_ratio: Float[Array, ""]
    solver_steps: Int[Array, ""]
    solver_residual: Float[Array, ""]
    accepted: Bool[Array, ""]
    finite: Bool[Array, ""]


class SecondOrderState(NamedTuple):
    """State of a method: everything people look at, by name (`optax.tree_utils.tree_get`).

    `level` holds the damping and the radius of the next step, `solution` the warm start of the
    solver (None without one); `skipped` counts the steps not taken because something was not
    finite, `rejected` those not taken because of their gain.
    """

    count: Int[Array, ""]
    level: DampingState
    solution: Any
    preconditioner: Any
    skipped: Int[Array, ""]
    rejected: Int[Array, ""]
    metrics: Metrics


class Method(optax.GradientTransformationExtraArgs):
    """An Optax transformation that also says what it needs.

    `objective` and `plan` are what a fused step is made from; `observe` makes an observation by
    hand; `judge` feeds the gain ratio of a finished step back into a state.
    """

    objective: Objective
    plan: Plan
    curvature: AbstractCurvatureQuantity
    damping: AbstractDamping
    solver: lx.AbstractLinearSolver | None
    bases: Callable[["SecondOrderState"], Callable[[bool], Any]] | None = None
    blocks: Callable[[Params, Objective], tuple[Any, ...]] | None = None

    def observe(
        self,
        model: PyTree[Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        state: "SecondOrderState | None" = None,
        **options: Any,
    ) -> Observation:
        """Value, gradient and what else the method needs of a batch, each computed once.

        Pass it on as `update(observation.gradient, state, params, observation=observation)`. A
        method with low-rank factors measures them in the bases that its `state` holds.
        """
        params, objective = self.objective.bind(model)
        if self.bases is not None and state is not None:
            options["bases"] = self.bases(state)
        return self.plan.observe(objective, params, batch, key, **options)

    def describe(
        self,
        model: PyTree[Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
        *,
        mesh: Mesh | None = None,
        rates: Rates | None = None,
        state_sharding: PyTree[Any] = None,
    ) -> str:
        """A table of what a step computes, for whom, how often and at what cost, and of what the
        state holds. Nothing is run, and arrays may be `jax.ShapeDtypeStruct`s.

        With a `mesh` every kind of step is compiled for it, and another table has, for one device,
        the collective operations and their bytes, what is sent in a ring (see
        [`traffic`][curvax.traffic]), arithmetic and memory, and with `rates` a predicted time.
        Leaves of model and batch that are sharded over the mesh stay so. Others are replicated,
        but for the examples of a batch: these are divided over its axis "data", or else its first.
        `state_sharding` has a sharding for each leaf of the state, by default that of
        [`state_sharding`][curvax.state_sharding].
        """
        from curvax.step import make_step  # which is made of methods

        step = make_step(self, self)
        return step.describe(
            model, batch, key, mesh=mesh, rates=rates, state_sharding=state_sharding
        )

    def judge(
        self, state: SecondOrderState, ratio: Scalar, due: bool | Bool[Array, ""]
    ) -> tuple[SecondOrderState, Bool[Array, ""]]:
        """The state after a step with this gain ratio, and whether to take the step."""
        gain = Gain(ratio, state.metrics.solution_norm)
        accepted = jnp.asarray(self.damping.accepts(gain)) | ~jnp.asarray(due)
        learned = self.damping.update(state.level, gain)
        level = _tree.where(jnp.asarray(due), learned, state.level)
        metrics = state.metrics._replace(
            gain_ratio=jnp.where(due, ratio, jnp.nan).astype(jnp.float32), accepted=accepted
        )
        rejected = state.rejected + (~accepted).astype(jnp.int32)
        return state._replace(level=level, metrics=metrics, rejected=rejected), accepted

    def conclude(
        self,
        observation: Observation,
        operator: Callable[[], AbstractCurvature],
        gradient: Params,
        direction: Params,
        new: SecondOrderState,
        old: SecondOrderState,
    ) -> tuple[SecondOrderState, Bool[Array, ""]]:
        """The state after an update, and whether to take it: judged by its gain unless the
        finished step is judged later, and skipped if its metrics are not finite.
        """
        metrics = new.metrics
        accepted = jnp.asarray(True)
        if self.damping.every is not None and not observation.judged_later:
            due = observation.due(GainRatio())
            step = _tree.scale(-1.0, direction)
            measure = lambda: gain_ratio(observation, operator(), gradient, step)
            new, accepted = self.judge(new, measure_when(due, measure), due)
        return skip(metrics.finite, new, old, metrics), metrics.finite & accepted


class Directed(NamedTuple):
    """What a method made of a gradient, and the parts of its state.

    `finite` is for what the norms of gradient and direction do not show; `steps` and `residual` are
    those of an inner solver.
    """

    direction: Params
    solution: Any
    preconditioner: Any
    finite: bool | Bool[Array, ""] = True
    steps: ScalarLike = -1
    residual: ScalarLike = math.nan


def compose(
    objective: Objective,
    requirements: Iterable[Requirement],
    *,
    curvature: AbstractCurvatureQuantity,
    damping: AbstractDamping,
    init: Callable[[Params], tuple[Any, Any]],
    direct: Callable[[Params, SecondOrderState, Observation, DampingState], Directed],
    solver: lx.AbstractLinearSolver[Any] | None = None,
    bases: Callable[[SecondOrderState], Callable[[bool], Any]] | None = None,
    blocks: Callable[[Params, Objective], tuple[Any, ...]] | None = None,
) -> Method:
    """The frame of every method that observes a batch: observation, damping, metrics, gain ratio,
    and the leaving out of a step that is not finite.

    **Arguments:**

    - `objective`: what is minimised.
    - `requirements`: what the parts want observed. A policy that looks at the gain ratio has that,
      and the `curvature` of its quadratic model, added.
    - `init`: from the parameters the first `solution` and `preconditioner` of the state.
    - `direct`: from gradient, state, observation and the level of damping the direction, with the
      sign of the gradient.
    - `solver`, `bases`, `blocks`: of [`Method`][curvax.Method].

    Its `update(grads, state, params, *, observation=None, batch=None, key=None,
    curvature_batch=None)` needs an `observation` (see [`Method`][curvax.Method]) or a `batch`, and
    **raises** `ValueError` without either.
    """
    wishes = list(requirements)
    if damping.every is not None:
        wishes.append(Requirement(curvature, "damping"))
        wishes.append(Requirement(GainRatio(), "damping", damping.every))
    plan = Plan(wishes)

    def first(params: Params) -> SecondOrderState:
        # One array each: a buffer that stands twice in a state cannot be donated.
        zero = lambda: jnp.zeros((), jnp.int32)
        solution, preconditioner = init(params)
        return SecondOrderState(
            count=zero(),
            level=damping.init(),
            solution=solution,
            preconditioner=preconditioner,
            skipped=zero(),
            rejected=zero(),
            metrics=no_metrics(),
        )

    def update(
        updates: Params,
        state: SecondOrderState,
        params: Params | None = None,
        *,
        observation: Observation | None = None,
        batch: Batch | None = None,
        key: PRNGKeyArray | None = None,
        curvature_batch: Batch | None = None,
        **extra: Any,
    ) -> tuple[Params, SecondOrderState]:
        del extra
        if observation is None:
            held = None if bases is None else bases(state)
            observation = observe_in_update(
                plan, objective, updates, state.count, params, batch, key, curvature_batch, held
            )
        level = damping.at(state.level, state.count)
        directed = direct(updates, state, observation, level)
        metrics = measured(observation, level, updates, directed.direction)
        metrics = metrics._replace(
            finite=metrics.finite & directed.finite,
            solver_steps=jnp.asarray(directed.steps, jnp.int32),
            solver_residual=_f32(directed.residual),
        )
        new = state._replace(
            level=level,
            solution=directed.solution,
            preconditioner=directed.preconditioner,
            metrics=metrics,
        )
        operator = lambda: seen_by(observation[curvature], updates)
        direction = directed.direction
        new, take = method.conclude(observation, operator, updates, direction, new, state)
        if not observation.judged_later:  # a fused step leaves out the whole update
            direction = _tree.where(take, direction, _tree.zeros_like(direction))
        return _tree.cast(direction, updates if params is None else params), new

    # Optax types states as pytrees of arrays, which a NamedTuple is without saying so.
    method = Method(cast(Any, first), cast(Any, update))
    method.objective, method.plan, method.curvature = objective, plan, curvature
    method.damping, method.solver = damping, solver
    method.bases, method.blocks = bases, blocks
    return method


def gain_ratio(
    observation: Observation, operator: AbstractCurvature, gradient: Params, step: Params
) -> Float[Array, ""]:
    """ρ of a step: actual over predicted decrease, on the batch of the observation.

    −∞ where the step leads to a value that is not finite, or where the model promises no decrease
    and there is none; NaN for a step along which the model is flat (one of length zero: a
    learning rate of zero, or what `optax.MultiSteps` only accumulates): nothing to judge.
    """
    full_step = fill_masked(step, _tree.structure(observation.params))
    moved = _tree.add(observation.params, full_step)
    trial = observation.value_at(moved)
    slope, curvature = _tree.dot(gradient, step), quadratic_form(operator, step)
    dtype = _tree.accumulation_dtype(trial.dtype, slope.dtype, curvature.dtype)
    actual = observation.value.astype(dtype) - trial.astype(dtype)
    predicted = -(slope.astype(dtype) + 0.5 * curvature.astype(dtype))
    ratio = actual / jnp.where(predicted > 0, predicted, jnp.inf)
    ratio = jnp.where((predicted > 0) | (actual > 0), ratio, -jnp.inf)
    ratio = jnp.where(jnp.isfinite(trial), ratio, -jnp.inf)
    return _f32(jnp.where((slope == 0) & (curvature == 0), jnp.nan, ratio))


def skip(
    finite: Bool[Array, ""], new: SecondOrderState, old: SecondOrderState, metrics: Metrics
) -> SecondOrderState:
    """`new`, or if something was not finite `old` with one more step skipped."""
    kept = _tree.where(finite, new, old)
    metrics = _tree.where(finite, new.metrics, metrics)
    skipped = old.skipped + (~finite).astype(jnp.int32)
    return kept._replace(count=old.count + 1, skipped=skipped, metrics=metrics)


def observe_in_update(
    plan: Plan,
    objective: Objective,
    updates: Params,
    count: Array,
    params: Params | None,
    batch: Batch | None,
    key: PRNGKeyArray | None,
    curvature_batch: Batch | None,
    bases: Callable[[bool], Any] | None = None,
) -> Observation:
    """The observation that `update` was given a batch for."""
    if batch is None:
        raise ValueError(
            "update: got neither `observation` nor `batch`, and this method needs one of them. In "
            "a loop of your own pass optimizer.update(grads, state, params, batch=batch); for a "
            "step that computes everything once, use curvax.make_step(optimizer, method)."
        )
    if params is None:
        raise ValueError("update: got params=None, wanted the parameters, to evaluate `batch` at.")
    if is_masked_tree(updates):
        raise ValueError(
            "update: under optax.masked or optax.partition the method sees only some of the "
            "parameters, and cannot evaluate `batch`. Pass observation=method.observe(model, "
            "batch, key) instead, for K-FAC with its own state, state=…."
        )
    bound, objective = objective.bind(params)
    return plan.observe(
        objective,
        bound,
        batch,
        key,
        phase=plan.phase(count),
        curvature_batch=curvature_batch,
        bases=bases,
    )


def measure_when(due: bool | Array, measure: Callable[[], Array]) -> Array:
    """A measurement where it is due, NaN where not."""
    if isinstance(due, bool):
        return measure() if due else _f32(jnp.nan)
    return jax.lax.cond(due, loop_safe(measure), lambda: _f32(jnp.nan))


def is_method_state(node: Any) -> bool:
    return isinstance(node, SecondOrderState)


def method_states(state: Any) -> list[SecondOrderState]:
    """Those of the methods inside of the state of an optimizer."""
    leaves = jax.tree.leaves(state, is_leaf=is_method_state)
    return [node for node in leaves if is_method_state(node)]


def measured(
    observation: Observation, level: DampingState, gradient: Params, solution: Params
) -> Metrics:
    """Metrics of a step: finite if its value, and the norms of gradient and solution, are."""
    gradient_norm, length = _tree.norm(gradient), _tree.norm(solution)
    finite = jnp.isfinite(observation.value) & jnp.isfinite(gradient_norm) & jnp.isfinite(length)
    return no_metrics()._replace(
        value=_f32(observation.value),
        gradient_norm=_f32(gradient_norm),
        solution_norm=_f32(length),
        damping_used=_f32(level.damping),
        radius_used=_f32(level.radius),
        finite=finite,
    )


def no_metrics() -> Metrics:
    """Metrics before anything was measured."""
    unmeasured: dict[str, Any] = {name: _f32(jnp.nan) for name in Metrics._fields}
    flags = {"accepted": jnp.asarray(True), "finite": jnp.asarray(True)}
    return Metrics(**(unmeasured | flags | {"solver_steps": jnp.asarray(-1, jnp.int32)}))


def _f32(x: Any) -> Float[Array, ""]:
    return jnp.asarray(x).astype(jnp.float32)
