"""Quantities that are low-rank sketches of a curvature."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax import _basis, _tree
from curvax._checks import check_count
from curvax.estimators.low_rank import nystrom
from curvax.objective import Params
from curvax.operators.low_rank import LowRank
from curvax.plan.quantities import AbstractCurvatureQuantity, AbstractQuantity, Scope


class NystromSketch(AbstractQuantity):
    """The [`nystrom`][curvax.nystrom] approximation of a curvature, on the curvature batch.

    **Arguments:** `curvature`: of what, as a quantity; `rank`; `at_once`: products computed side by
    side.
    """

    curvature: AbstractCurvatureQuantity
    rank: int = eqx.field(static=True, default=10)
    at_once: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("rank", self.rank)
        check_count("at_once", self.at_once)

    @property
    def label(self) -> str:
        return f"Nyström sketch of rank {self.rank} of the {self.curvature.label}"

    @property
    def random(self) -> bool:
        return True

    @property
    def from_hessian(self) -> bool:
        return self.curvature.from_hessian

    def test_matrix(self, key: PRNGKeyArray, params: Params) -> PyTree[Float[Array, "k ..."]]:
        """The random matrix Ω that a step with this key multiplies the curvature with."""
        columns = min(self.rank, _tree.size(params))
        return _basis.gaussian(jax.random.fold_in(key, 3), params, columns)

    def compute(self, scope: Scope) -> LowRank:
        assert scope.key is not None
        operator = self.curvature.compute(scope)
        start = self.test_matrix(scope.key, operator.in_structure())
        return nystrom(operator, start, at_once=self.at_once)
