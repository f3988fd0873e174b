"""Solving in the space of the rows: for fewer rows than parameters, and exact.

With JᵀCJ = U Uᵀ (one column of U for each row: an output of an example, or a score), the
push-through identity gives

    (U Uᵀ + λI)⁻¹ U r = U (Uᵀ U + λI)⁻¹ r,

and the Woodbury identity, for a right-hand side outside of the span of U,

    (U Uᵀ + λI)⁻¹ g = (g − U (Uᵀ U + λI)⁻¹ Uᵀ g) / λ.

The system that is solved has the size of the Gram matrix Uᵀ U: rows × rows.
"""

import abc
import functools
from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax import _tree
from curvax._sharding import whole
from curvax.objective import Params
from curvax.operators.accumulated import Scanned
from curvax.operators.algebra import Damped
from curvax.operators.base import AbstractSymmetricOperator
from curvax.operators.curvature import AbstractOutputCurvature


class AbstractRowFactor(eqx.Module):
    """U with A = U Uᵀ + shift·I."""

    @abc.abstractmethod
    def mv(self, rows: Array) -> Params:
        """U r."""

    @abc.abstractmethod
    def transpose_mv(self, vector: Params) -> Array:
        """Uᵀ v."""

    @abc.abstractmethod
    def gram(self) -> lx.AbstractLinearOperator:
        """Uᵀ U, over arrays of the shape of the row coordinates."""

    @abc.abstractmethod
    def gradient_rows(self) -> Array | None:
        """r with U r = the gradient of the loss (without l2), or None if there is none."""

    @abc.abstractmethod
    def shift(self) -> float:
        """The multiple of the identity in A: the objective's l2 term."""


@functools.singledispatch
def row_factor(operator: lx.AbstractLinearOperator) -> AbstractRowFactor:
    """The row factor of a linearised operator. Register your own operators here.

    **Raises** `ValueError` for an operator that has none.
    """
    raise ValueError(
        f"operator: got a {type(operator).__name__}, which has no row factor; wanted GaussNewton "
        "or Fisher, or a class registered with curvax.solvers.row_factor."
    )


class OutputRowFactor(AbstractRowFactor):
    """The rows of a curvature that passes through the model's outputs."""

    curvature: AbstractOutputCurvature

    def mv(self, rows: Array) -> Params:
        linearisation, metric = self.curvature.linearised()
        return linearisation.vjp(metric.sqrt(rows))

    def transpose_mv(self, vector: Params) -> Array:
        linearisation, metric = self.curvature.linearised()
        return metric.sqrt_transpose(linearisation.jvp(_tree.cast(vector, self.curvature.params)))

    def gram(self) -> "RowGram":
        return RowGram(self)

    def gradient_rows(self) -> Array | None:
        return self.curvature.linearised()[1].gradient_rows()

    def shift(self) -> float:
        return self.curvature.objective.l2


@row_factor.register
def _(operator: AbstractOutputCurvature) -> AbstractRowFactor:
    return OutputRowFactor(operator.linearise())


@row_factor.register
def _(operator: Scanned) -> AbstractRowFactor:
    return operator.linearised()


class RowGram(AbstractSymmetricOperator):
    """Uᵀ U. A product costs one with U and one with Uᵀ; the matrix is built from the rows' own
    gradients (see `row_gram` of the curvature), not by one product a row.
    """

    factor: OutputRowFactor

    def mv(self, rows: Array) -> Array:
        return self.factor.transpose_mv(self.factor.mv(rows))

    def as_matrix(self) -> Float[Array, "rows rows"]:
        return self.factor.curvature.row_gram().astype(self.in_structure().dtype)

    @property
    def positive_semidefinite(self) -> bool:
        return True

    def in_structure(self) -> jax.ShapeDtypeStruct:
        struct = self.factor.curvature.linearised()[1].rows_structure()
        return jax.ShapeDtypeStruct(struct.shape, _tree.accumulation_dtype(struct.dtype))


class RowSpaceState(eqx.Module):
    """What `RowSpace.init` keeps: the operator, its rows, and the factorised Gram matrix."""

    operator: lx.AbstractLinearOperator
    factor: AbstractRowFactor
    damping: Scalar
    inner: PyTree[Any]


class RowSpace(lx.AbstractLinearSolver):
    """Solves (A + λI) x = b for a Gauss-Newton or Fisher matrix A through its rows.

    **Arguments:**

    - `inner`: the lineax solver for the rows × rows system: `lineax.Cholesky()` builds the Gram
      matrix, [`CG`][curvax.CG] needs only products with it.
    - `refinements`: steps of iterative refinement for a right-hand side that is not given in row
      coordinates. The Woodbury identity loses the digits of ‖A‖/λ in float32; each step costs one
      product with A and wins them back.

    The operator must be `Damped(A, λ)` with λ > 0 and A registered with `row_factor`.

    **Options:** `rows`: r with b = U r, if known (`row_factor(A).gradient_rows()` for the
    gradient). Then x = U (UᵀU + λI)⁻¹ r exactly, and `b` is not used.

    **Raises** `ValueError` for an operator that is not `Damped`, or has no row factor.
    """

    inner: lx.AbstractLinearSolver = lx.Cholesky()
    refinements: int = eqx.field(static=True, default=1)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> RowSpaceState:
        if not isinstance(operator, Damped):
            raise ValueError(
                f"operator: got a {type(operator).__name__}, wanted Damped(operator, damping): the "
                "row-space solve divides by the damping."
            )
        operator = operator.linearise()
        factor = row_factor(operator.operator)
        damping = operator.damping + factor.shift()
        return RowSpaceState(
            operator, factor, damping, self.inner.init(Damped(factor.gram(), damping), {})
        )

    def compute(
        self, state: RowSpaceState, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        rows = options.get("rows")
        if rows is not None:
            inner, result, stats = self._solve_rows(state, rows)
            return _tree.cast(state.factor.mv(inner), vector), result, stats
        solution, result, stats = self._woodbury(state, vector)
        for _ in range(self.refinements):
            residual = _tree.sub(vector, state.operator.mv(solution))
            correction, _, _ = self._woodbury(state, residual)
            solution = _tree.add(solution, correction)
        return solution, result, stats

    def _solve_rows(
        self, state: RowSpaceState, rows: Array
    ) -> tuple[Array, lx.RESULTS, dict[str, Any]]:
        dtype = state.factor.gram().in_structure().dtype
        vector = rows.astype(dtype)
        vector = whole(vector)
        solution, result, stats = self.inner.compute(state.inner, vector, {})
        return solution.astype(rows.dtype), result, stats

    def _woodbury(
        self, state: RowSpaceState, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        inner, result, stats = self._solve_rows(state, state.factor.transpose_mv(vector))
        inside = _tree.cast(state.factor.mv(inner), vector)
        return _tree.scale(1 / state.damping, _tree.sub(vector, inside)), result, stats

    def transpose(
        self, state: RowSpaceState, options: dict[str, Any]
    ) -> tuple[RowSpaceState, dict[str, Any]]:
        return state, options

    def conj(
        self, state: RowSpaceState, options: dict[str, Any]
    ) -> tuple[RowSpaceState, dict[str, Any]]:
        return state, options

    def assume_full_rank(self) -> bool:
        return True
