"""Sums, scalings, compositions: operators built of operators."""

import functools
import operator as op

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree, Scalar, ScalarLike

from curvax import _tree
from curvax.operators.base import AbstractOperator, AbstractSymmetricOperator, check_structure


class Sum(AbstractOperator):
    """A + B + …"""

    operators: tuple[lx.AbstractLinearOperator, ...]

    def __check_init__(self):
        for other in self.operators[1:]:
            check_structure("sum", other.in_structure(), self.in_structure())
            check_structure("sum", other.out_structure(), self.out_structure())

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        return functools.reduce(_tree.add, [each.mv(vector) for each in self.operators])

    def quadratic_form(self, vector: PyTree[Array]) -> Scalar:
        return functools.reduce(op.add, [quadratic_form(each, vector) for each in self.operators])

    def as_matrix(self) -> Array:
        return functools.reduce(op.add, [each.as_matrix() for each in self.operators])

    def diagonal(self) -> PyTree[Array]:
        return functools.reduce(_tree.add, [diagonal(each) for each in self.operators])

    def transpose(self) -> "Sum":
        return Sum(tuple(each.T for each in self.operators))

    def linearise(self) -> "Sum":
        return Sum(tuple(lx.linearise(each) for each in self.operators))

    @property
    def symmetric(self) -> bool:
        return all(lx.is_symmetric(each) for each in self.operators)

    @property
    def positive_semidefinite(self) -> bool:
        return all(lx.is_positive_semidefinite(each) for each in self.operators)

    @property
    def is_diagonal(self) -> bool:
        return all(lx.is_diagonal(each) for each in self.operators)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operators[0].in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operators[0].out_structure()


class Scaled(AbstractOperator):
    """c·A. Keeps positive-semidefiniteness only for a c that is known now to be ≥ 0.

    A traced scalar has no known sign; where it is non-negative by construction (a share of a
    mean, a damping), pass `nonnegative=True`.
    """

    operator: lx.AbstractLinearOperator
    scalar: Scalar
    nonnegative: bool = eqx.field(static=True)

    def __init__(
        self,
        operator: lx.AbstractLinearOperator,
        scalar: ScalarLike,
        *,
        nonnegative: bool | None = None,
    ):
        if jnp.shape(scalar) != ():
            raise ValueError(f"scalar: got shape {jnp.shape(scalar)}, wanted ().")
        self.operator = operator
        dtype = _tree.accumulation_dtype(_tree.common_dtype(operator.in_structure()))
        self.scalar = jnp.asarray(scalar, dtype)
        if nonnegative is None:
            known = _known(scalar)
            nonnegative = known is not None and bool(known >= 0)
        self.nonnegative = nonnegative

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        return _tree.scale(self.scalar, self.operator.mv(vector))

    def quadratic_form(self, vector: PyTree[Array]) -> Scalar:
        return self.scalar * quadratic_form(self.operator, vector)

    def as_matrix(self) -> Array:
        matrix = self.operator.as_matrix()
        return self.scalar.astype(matrix.dtype) * matrix

    def diagonal(self) -> PyTree[Array]:
        return _tree.scale(self.scalar, diagonal(self.operator))

    def transpose(self) -> "Scaled":
        return Scaled(self.operator.T, self.scalar, nonnegative=self.nonnegative)

    def linearise(self) -> "Scaled":
        return Scaled(lx.linearise(self.operator), self.scalar, nonnegative=self.nonnegative)

    @property
    def symmetric(self) -> bool:
        return lx.is_symmetric(self.operator)

    @property
    def positive_semidefinite(self) -> bool:
        return self.nonnegative and lx.is_positive_semidefinite(self.operator)

    @property
    def is_diagonal(self) -> bool:
        return lx.is_diagonal(self.operator)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.out_structure()


class Composed(AbstractOperator):
    """A B: first B, then A."""

    first: lx.AbstractLinearOperator
    second: lx.AbstractLinearOperator

    def __init__(self, second: lx.AbstractLinearOperator, first: lx.AbstractLinearOperator):
        check_structure("composition", first.out_structure(), second.in_structure())
        self.second = second
        self.first = first

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        return self.second.mv(self.first.mv(vector))

    def transpose(self) -> "Composed":
        return Composed(self.first.T, self.second.T)

    def linearise(self) -> "Composed":
        return Composed(lx.linearise(self.second), lx.linearise(self.first))

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.first.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.second.out_structure()


class Damped(AbstractSymmetricOperator):
    """A + λI, for a symmetric A and λ ≥ 0. Positive semidefinite whenever A is.

    **Raises** `ValueError` for an A that is not symmetric, or a concrete λ < 0.
    """

    operator: lx.AbstractLinearOperator
    damping: Scalar

    def __init__(self, operator: lx.AbstractLinearOperator, damping: ScalarLike):
        if not lx.is_symmetric(operator):
            raise ValueError(
                f"operator: got a {type(operator).__name__} that is not marked symmetric, wanted a "
                "symmetric operator."
            )
        if jnp.shape(damping) != ():
            raise ValueError(f"damping: got shape {jnp.shape(damping)}, wanted ().")
        known = _known(damping)
        if known is not None and known < 0:
            raise ValueError(f"damping: got {damping}, wanted a number ≥ 0.")
        self.operator = operator
        dtype = _tree.accumulation_dtype(_tree.common_dtype(operator.in_structure()))
        self.damping = jnp.asarray(damping, dtype)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        return _tree.add_scaled(self.operator.mv(vector), self.damping, vector)

    def quadratic_form(self, vector: PyTree[Array]) -> Scalar:
        return quadratic_form(self.operator, vector) + self.damping * _tree.dot(vector, vector)

    def as_matrix(self) -> Array:
        matrix = self.operator.as_matrix()
        return matrix + self.damping.astype(matrix.dtype) * jnp.eye(len(matrix), dtype=matrix.dtype)

    def diagonal(self) -> PyTree[Array]:
        inner = diagonal(self.operator)
        return _tree.add_scaled(inner, self.damping, jax.tree.map(jnp.ones_like, inner))

    def linearise(self) -> "Damped":
        return Damped(lx.linearise(self.operator), self.damping)

    @property
    def positive_semidefinite(self) -> bool:
        return lx.is_positive_semidefinite(self.operator)

    @property
    def is_diagonal(self) -> bool:
        return lx.is_diagonal(self.operator)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.in_structure()


def diagonal(operator: lx.AbstractLinearOperator) -> PyTree[Array]:
    """The diagonal of any lineax operator, in the structure of its input."""
    if isinstance(operator, AbstractOperator):
        return operator.diagonal()
    return _tree.unravel(operator.in_structure(), lx.diagonal(operator))


def _known(scalar: ScalarLike) -> np.ndarray | None:
    """The value of a scalar, if it can be read now: outside of jnp, which jit would trace."""
    return None if isinstance(scalar, Tracer) else np.asarray(scalar)


def quadratic_form(operator: lx.AbstractLinearOperator, vector: PyTree[Array]) -> Scalar:
    """vᵀA v for any lineax operator, by the operator's own short cut if it has one."""
    if isinstance(operator, AbstractOperator):
        return operator.quadratic_form(vector)
    return _tree.dot(vector, operator.mv(vector))
