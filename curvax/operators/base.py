"""What every operator of curvax is: an Equinox module, a lineax operator, an algebra.

lineax asks its questions through thirteen `singledispatch` functions. They are answered here,
once, by properties that a subclass may set; see `ANSWERS` at the end.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax import _tree


class AbstractOperator(lx.AbstractLinearOperator):
    """A linear map between pytrees of real arrays.

    Subclasses give `mv`, `transpose`, `in_structure`, `out_structure`, and override the
    properties below where they know better.
    """

    # -- what a subclass knows of itself -------------------------------------------------------

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def positive_semidefinite(self) -> bool:
        return False

    @property
    def is_diagonal(self) -> bool:
        return False

    def linearise(self) -> "AbstractOperator":
        """The same operator with everything computed that its products share."""
        return self

    # -- dense views ---------------------------------------------------------------------------

    def as_matrix(self) -> Float[Array, "out in"]:
        """The dense matrix, in the order of the leaves, rows ravelled in C order: in float32, or
        the dtype of the leaves if wider.

        Costs one product for each input dimension; meant for small operators and tests.
        """
        operator = self.linearise()
        structure = operator.in_structure()
        dtype = _tree.accumulation_dtype(_tree.common_dtype(structure, operator.out_structure()))

        def column(basis: Array) -> Array:
            return _tree.ravel(operator.mv(_tree.unravel(structure, basis)), dtype)

        basis = jnp.eye(operator.in_size(), dtype=dtype)
        if operator.in_size() == 0:
            return jnp.zeros((operator.out_size(), 0), dtype)
        return jax.lax.map(column, basis, batch_size=256).T

    def diagonal(self) -> PyTree[Array]:
        """The exact diagonal, in the structure of the input. Costs as much as `as_matrix`."""
        if self.in_size() != self.out_size():
            raise ValueError(
                f"diagonal: wanted a square operator, got {self.out_size()} × {self.in_size()}."
            )
        return _tree.unravel(self.in_structure(), jnp.diagonal(self.as_matrix()))

    def quadratic_form(self, vector: PyTree[Array]) -> Scalar:
        """vᵀA v."""
        return _tree.dot(vector, self.mv(vector))

    # -- algebra -------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        """Composition with an operator, or the product with a vector (a pytree)."""
        from curvax.operators.algebra import Composed

        if isinstance(other, lx.AbstractLinearOperator):
            return Composed(self, other)
        check_structure("vector", other, self.in_structure())
        return self.mv(other)

    def __add__(self, other: Any) -> "AbstractOperator":
        from curvax.operators.algebra import Sum

        if not isinstance(other, lx.AbstractLinearOperator):
            raise ValueError(f"operator + {type(other).__name__}: wanted a linear operator.")
        return Sum((self, other))

    def __radd__(self, other: Any) -> "AbstractOperator":
        return self + other

    def __sub__(self, other: Any) -> "AbstractOperator":
        return self + (-1.0) * other

    def __mul__(self, other: Any) -> "AbstractOperator":
        from curvax.operators.algebra import Scaled

        return Scaled(self, other)

    def __rmul__(self, other: Any) -> "AbstractOperator":
        return self * other

    def __truediv__(self, other: Any) -> "AbstractOperator":
        return self * (1 / other)

    def __neg__(self) -> "AbstractOperator":
        return self * -1.0


class AbstractSymmetricOperator(AbstractOperator):
    """An operator that is its own transpose; subclasses give `mv` and `in_structure`."""

    @property
    def symmetric(self) -> bool:
        return True

    def transpose(self) -> "AbstractSymmetricOperator":
        return self

    @abc.abstractmethod
    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]: ...

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.in_structure()


class Transpose(AbstractOperator):
    """Aᵀ of any operator, by transposing its product. Its transpose is A itself."""

    operator: AbstractOperator

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        operator = self.operator.linearise()
        return jax.linear_transpose(operator.mv, operator.in_structure())(vector)[0]

    def transpose(self) -> AbstractOperator:
        return self.operator

    def linearise(self) -> "Transpose":
        return Transpose(self.operator.linearise())

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.out_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.in_structure()


def check_structure(name: str, tree: PyTree[Any], wanted: PyTree[jax.ShapeDtypeStruct]) -> None:
    """Raises `ValueError` naming the first leaf of `tree` that does not fit `wanted`."""
    if jax.tree.structure(tree) != jax.tree.structure(wanted):
        seen, want = _tree.paths(tree), _tree.paths(wanted)
        missing = [path for path in want if path not in seen]
        extra = [path for path in seen if path not in want]
        raise ValueError(
            f"{name}: got structure {jax.tree.structure(tree)}, "
            f"wanted {jax.tree.structure(wanted)}."
            + (f" Missing leaves: {', '.join(missing[:5])}." if missing else "")
            + (f" Unexpected leaves: {', '.join(extra[:5])}." if extra else "")
        )
    leaves = zip(_tree.paths(wanted), jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    for path, leaf, want in leaves:
        if jnp.shape(leaf) != want.shape:
            raise ValueError(
                f"{name}{path}: got shape {jnp.shape(leaf)}, wanted {want.shape} ({want.dtype})."
            )


def _materialise(operator: AbstractOperator) -> lx.AbstractLinearOperator:
    tags = []
    if operator.positive_semidefinite:
        tags.append(lx.positive_semidefinite_tag)
    elif operator.symmetric:
        tags.append(lx.symmetric_tag)
    function = lx.FunctionLinearOperator(
        operator.linearise().mv, operator.in_structure(), tuple(tags)
    )
    return lx.materialise(function)


def _tridiagonal(operator: AbstractOperator) -> tuple[Array, Array, Array]:
    matrix = operator.as_matrix()
    return jnp.diagonal(matrix), jnp.diagonal(matrix, -1), jnp.diagonal(matrix, 1)


ANSWERS: dict[str, Callable[[AbstractOperator], Any]] = {
    "is_symmetric": lambda op: op.symmetric,
    "is_positive_semidefinite": lambda op: op.positive_semidefinite,
    "is_negative_semidefinite": lambda op: False,
    "is_diagonal": lambda op: op.is_diagonal,
    "is_tridiagonal": lambda op: op.is_diagonal,
    "is_lower_triangular": lambda op: op.is_diagonal,
    "is_upper_triangular": lambda op: op.is_diagonal,
    "has_unit_diagonal": lambda op: False,
    "linearise": lambda op: op.linearise(),
    "materialise": _materialise,
    "diagonal": lambda op: _tree.ravel(op.diagonal()),
    "tridiagonal": _tridiagonal,
    "conj": lambda op: op,  # real
}

for _name, _answer in ANSWERS.items():
    getattr(lx, _name).register(AbstractOperator, _answer)
