"""A low-rank sketch of the curvature as a preconditioner."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from curvax import _basis, _tree
from curvax._checks import check_count
from curvax._convolution import loop_safe
from curvax._masked import is_masked_tree, seen_by
from curvax.objective import Params
from curvax.operators.low_rank import LowRank
from curvax.plan.plan import Observation, Requirement
from curvax.plan.quantities import AbstractCurvatureQuantity, GaussNewtonCurvature, Scope
from curvax.plan.sketches import NystromSketch
from curvax.preconditioners import AbstractPreconditioner
from curvax.scalings import AbstractScaling, Context
from curvax.taps.wishes import StateBudget


class NystromState(NamedTuple):
    """The eigenvectors and eigenvalues of the last sketch, the largest first.

    `basis` is like the parameters, with one more axis in front for the columns; `updates` counts
    the sketches taken over, `failures` those that were not finite, after which the old one stays.
    """

    basis: PyTree[Float[Array, "k ..."]]
    values: Float[Array, " k"]
    updates: Int[Array, ""]
    failures: Int[Array, ""]


class NystromPreconditioner(AbstractPreconditioner):
    """U (S + λI)⁻¹ Uᵀ + (τ + λ)⁻¹ (I − U Uᵀ), from a randomised Nyström approximation U S Uᵀ of the
    curvature (Frangella, Tropp & Udell 2023, eq. 5.3, divided by τ + λ).

    **Arguments:**

    - `sketch`: the quantity that gives U and S, with its rank.
    - `every`: steps from one sketch to the next.
    - `tail`: what τ is. `"smallest"` is the smallest eigenvalue in S, as in the paper, for solving
      by CG; `"zero"`, as in SketchySGD (Frangella et al. 2024), is the inverse of U S Uᵀ + λI
      itself.

    Needs λ > 0. Before the first sketch it is the identity.

    **State:** the basis, rank times the parameters, in float32 at least. **Cost:** at a refresh
    `rank` products with the curvature; an application costs 4 rank operations for each parameter.
    """

    sketch: NystromSketch = NystromSketch(GaussNewtonCurvature())
    every: int = eqx.field(static=True, default=10)
    tail: Literal["smallest", "zero"] = eqx.field(static=True, default="smallest")

    def __check_init__(self):
        if self.tail not in ("smallest", "zero"):
            raise ValueError(f"tail: got {self.tail!r}, wanted 'smallest' or 'zero'.")

    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement(self.sketch, "preconditioner", self.every),)

    def init(self, params: Params) -> NystromState:
        columns = min(self.sketch.rank, max(_tree.size(params), 1))
        basis = _basis.zeros(params, columns)
        dtype = _tree.accumulation_dtype(_tree.common_dtype(basis))
        count = lambda: jnp.zeros((), jnp.int32)
        return NystromState(basis, jnp.zeros((columns,), dtype), count(), count())

    def update(self, state: NystromState, observation: Observation) -> NystromState:
        due = observation.due(self.sketch)
        if due is False:
            return state
        refreshed = lambda: self._refreshed(state, observation[self.sketch])
        return refreshed() if due is True else jax.lax.cond(due, refreshed, lambda: state)

    def _refreshed(self, state: NystromState, sketch: LowRank) -> NystromState:
        if is_masked_tree(state.basis):
            sketch = sketch.restrict(state.basis)
        columns = len(state.values)  # those that parameters under a mask can have
        basis = jax.tree.map(lambda b: b[:columns], sketch.basis)
        fresh = _tree.cast((basis, sketch.values[:columns]), (state.basis, state.values))
        ok = _tree.all_finite(fresh)
        basis, values = _tree.where(ok, fresh, (state.basis, state.values))
        count = ok.astype(jnp.int32)
        return NystromState(basis, values, state.updates + count, state.failures + 1 - count)

    def operator(self, state: NystromState, damping: Scalar) -> LowRank:
        tail = state.values[-1] if self.tail == "smallest" else 0.0
        inverse = LowRank(state.basis, state.values, tail).inverse(damping)
        known = state.updates > 0
        values, tail = (jnp.where(known, x, 1) for x in (inverse.values, inverse.tail))
        return LowRank(state.basis, values, tail)


class SharpnessState(NamedTuple):
    """λ₁ as it was last measured; 0 before it was."""

    sharpness: Float[Array, ""]


class InverseSharpness(AbstractScaling):
    """The direction divided by λ₁, the largest eigenvalue of P A, for a direction P g of
    [`preconditioned`][curvax.preconditioned]: with a learning rate α behind it the rate is α/λ₁
    (Frangella et al. 2024, SketchySGD, with α = 1/2).

    Steps with α < 2 are stable on the quadratic model of A. λ₁ is measured by power iteration where
    P is refreshed, with A on the batch of the gradient: where P comes from a curvature batch, this
    is another one, as it is there. Until it was first measured the direction is the gradient.

    **Arguments:**

    - `refresh`: the quantity that P is refreshed by.
    - `curvature`: A.
    - `steps`: products with A and with P in a measurement; λ₁ is approached from below.
    """

    refresh: NystromSketch = NystromSketch(GaussNewtonCurvature())
    curvature: AbstractCurvatureQuantity = GaussNewtonCurvature()
    steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        check_count("steps", self.steps)

    def requirements(self) -> tuple[Requirement, ...]:
        return ()

    def init(self, params: Params) -> SharpnessState:
        dtype = _tree.accumulation_dtype(_tree.common_dtype(params))
        return SharpnessState(jnp.zeros((), dtype))

    def apply(
        self, state: SharpnessState, direction: Params, context: Context
    ) -> tuple[Params, SharpnessState]:
        due = context.observation.due(self.refresh)
        if due is not False:
            measure = lambda: self._measured(state, context)
            state = measure() if due is True else jax.lax.cond(due, measure, lambda: state)
        known = state.sharpness > 0
        scaled = _tree.scale(1 / jnp.where(known, state.sharpness, 1), direction)
        return _tree.where(known, scaled, _tree.cast(context.gradient, scaled)), state

    def _measured(self, state: SharpnessState, context: Context) -> SharpnessState:
        seen, inverse = context.observation, context.inverse
        if inverse is None or seen.key is None:
            raise ValueError(
                "scaling: got InverseSharpness where no preconditioner with a key is, wanted it in "
                "curvax.preconditioned(objective, NystromPreconditioner(...), scaling=...)."
            )
        scope = Scope(seen.objective, seen.params, seen.batch, seen.key)
        operator = lx.linearise(seen_by(self.curvature.compute(scope), context.gradient))
        start = self.start(seen.key, operator.in_structure())
        fresh = sharpness(operator, inverse, start, self.steps).astype(state.sharpness.dtype)
        ok = jnp.isfinite(fresh) & (fresh > 0)
        return SharpnessState(jnp.where(ok, fresh, state.sharpness))

    def start(self, key: PRNGKeyArray, params: Params) -> Params:
        """The random vector that power iteration starts from in a step with this key."""
        wide = _basis.gaussian(jax.random.fold_in(key, 4), params, 1)
        return jax.tree.map(lambda x: x[0], wide)


def sharpness(
    operator: lx.AbstractLinearOperator,
    inverse: lx.AbstractLinearOperator,
    start: Params,
    steps: int,
) -> Scalar:
    """The largest eigenvalue of P^½ A P^½, from below, by some steps of power iteration on A P.

    With z = P y, zᵀA z / zᵀy is the Rayleigh quotient of P^½ y: no root of P is needed.
    """
    times = lambda of, v: _tree.cast(of.mv(_tree.cast(v, of.in_structure())), v)

    def step(_: Any, carry: tuple[Params, Scalar]) -> tuple[Params, Scalar]:
        y, _ = carry
        z = times(inverse, y)
        image = times(operator, z)
        quotient = _tree.dot(z, image) / _tree.dot(z, y)
        return _tree.scale(1 / _tree.norm(image), image), quotient

    begin = start, jnp.zeros_like(_tree.norm(start))
    return jax.lax.fori_loop(0, steps, loop_safe(step), begin)[1]


def sketch_rank(rank: int, state_budget: str | None) -> int:
    """The rank, or the largest with which the basis and one momentum fit into a budget such as
    "5.5x adam": n parameters are 2n numbers to Adam, and n for the momentum and for each column.

    **Raises** `ValueError` for a budget with no room for a column.
    """
    if state_budget is None:
        return rank
    columns = int(2 * StateBudget.parse(state_budget).of_adam - 1 + 1e-9)
    if columns < 1:
        raise ValueError(
            f"state_budget: got {state_budget!r}, wanted at least '1.0x adam': a momentum and a "
            "basis of one column need as much."
        )
    return columns
