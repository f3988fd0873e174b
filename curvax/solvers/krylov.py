"""The absolute value of an indefinite operator, in a Krylov subspace."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax import _basis, _tree
from curvax._checks import check_count, check_positive
from curvax._convolution import loop_safe
from curvax.operators.algebra import Damped


class KrylovState(eqx.Module):
    """What `AbsoluteKrylov.init` keeps: A, linearised, and λ."""

    operator: lx.AbstractLinearOperator
    damping: Scalar


class _Lanczos(NamedTuple):
    basis: PyTree[Array]  # columns that have not been reached are zero
    diagonal: Float[Array, " k"]  # of T
    beside: Float[Array, " k"]  # of T, next to it; the last entry counts for nothing
    column: PyTree[Array]  # the next one
    scale: Scalar  # the largest entry of T
    steps: Int[Array, ""]
    alive: Bool[Array, ""]


class AbsoluteKrylov(lx.AbstractLinearSolver[KrylovState]):
    """x = V (|T| + λI)⁻¹ Vᵀb, with V an orthonormal basis of span(b, A b, …, Aᵏ⁻¹b) and T = VᵀA V
    (Dauphin et al. 2014, Algorithm 1): eigenvalues count by their absolute values.

    Of `Damped(A, λ)` it takes A and λ; of any other symmetric operator the absolute value alone.
    x is a descent direction for the gradient b, also where A is indefinite. b lies in the subspace,
    so nothing of it is lost, and what is orthogonal to the subspace gets nothing. The basis is
    Lanczos', made orthogonal to all before at each step. Where k reaches the number of unknowns, or
    the subspace is invariant under A (then the iteration ends), x is (|A| + λI)⁻¹b.

    **Arguments:**

    - `max_steps`: k, products with A.
    - `floor`: values of |T| + λ are raised to this times the largest, as with
      [`Eigh`][curvax.Eigh].

    **Cost:** k products, and about 4k² operations for each unknown. **Memory:** k vectors, in
    float32 at least.

    **Stats:** `num_steps`, `max_steps`, and `smallest_eigenvalue`, that of T.

    x is no linear function of b, so gradients through `lx.linear_solve` are not those of x; reverse
    mode **raises** `ValueError`, and so does an operator that is not symmetric.
    """

    max_steps: int = eqx.field(static=True, default=20)
    floor: float = eqx.field(static=True, default=1e-6)

    def __check_init__(self):
        check_count("max_steps", self.max_steps)
        check_positive("floor", self.floor, zero=True)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> KrylovState:
        del options
        if not lx.is_symmetric(operator):
            raise ValueError(
                f"operator: got a {type(operator).__name__} that is not marked symmetric."
            )
        if isinstance(operator, Damped):
            return KrylovState(lx.linearise(operator.operator), operator.damping)
        dtype = _tree.accumulation_dtype(_tree.common_dtype(operator.in_structure()))
        return KrylovState(lx.linearise(operator), jnp.zeros((), dtype))

    def compute(
        self, state: KrylovState, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Solve; see the class for the stats."""
        del options
        structure = state.operator.in_structure()
        b = _tree.cast(vector, _tree.widened(structure))
        length = _tree.norm(b)
        done = self._lanczos(state.operator, structure, b, length)

        between = done.beside[:-1]
        # A block of its own for what was not reached, with an eigenvalue that is among the others.
        reached = jnp.arange(len(done.diagonal), dtype=jnp.int32) < done.steps
        matrix = jnp.diag(jnp.where(reached, done.diagonal, done.diagonal[0]))
        matrix = matrix + jnp.diag(between, 1) + jnp.diag(between, -1)
        finite = jnp.all(jnp.isfinite(matrix)) & jnp.isfinite(length)
        ritz, vectors = _basis.eigh_of(jnp.where(finite, matrix, 0))
        values = jnp.abs(ritz) + state.damping.astype(ritz.dtype)
        values = jnp.maximum(values, self.floor * jnp.max(values))
        inner = vectors[0] * length / jnp.where(values > 0, values, jnp.inf)
        weights = jnp.sum(vectors * inner[None], axis=1)
        weights = jnp.where(finite, weights, jnp.nan)
        solution = _tree.cast(_basis.combined(done.basis, weights), structure)
        result = lx.RESULTS.where(finite, lx.RESULTS.successful, lx.RESULTS.breakdown)
        stats = {
            "num_steps": done.steps,
            "max_steps": jnp.asarray(len(ritz), jnp.int32),
            "smallest_eigenvalue": jnp.where(finite, ritz[0], jnp.nan),
        }
        return solution, result, stats

    def _lanczos(
        self,
        operator: lx.AbstractLinearOperator,
        structure: PyTree[jax.ShapeDtypeStruct],
        b: PyTree[Array],
        length: Scalar,
    ) -> _Lanczos:
        steps = min(self.max_steps, max(_tree.size(structure), 1))
        dtype = length.dtype
        zero = jnp.zeros((steps,), dtype)
        # What is this small of T is rounding, and what comes after it has no direction.
        negligible = 10 * steps * jnp.finfo(dtype).eps

        def step(carry: _Lanczos) -> _Lanczos:
            i = carry.steps
            basis = jax.tree.map(
                lambda columns, v: jax.lax.dynamic_update_index_in_dim(columns, v, i, 0),
                carry.basis,
                carry.column,
            )
            image = _tree.cast(operator.mv(_tree.cast(carry.column, structure)), b)
            along = _basis.products(basis, image)
            image = _tree.sub(image, _basis.combined(basis, along))
            # Twice is enough.
            again = _basis.products(basis, image)
            image = _tree.sub(image, _basis.combined(basis, again))
            left = _tree.norm(image)
            scale = jnp.maximum(carry.scale, jnp.maximum(jnp.abs(along[i]), left))
            alive = jnp.isfinite(scale) & (left > negligible * scale)
            return _Lanczos(
                basis,
                carry.diagonal.at[i].set(along[i] + again[i]),
                carry.beside.at[i].set(jnp.where(alive | ~jnp.isfinite(left), left, 0)),
                _tree.scale(1 / jnp.where(alive, left, 1), image),
                scale,
                i + 1,
                alive,
            )

        begin = _Lanczos(
            _basis.zeros(b, steps),
            zero,
            zero,
            _tree.scale(1 / jnp.where(length > 0, length, 1), b),
            jnp.zeros((), dtype),
            jnp.zeros((), jnp.int32),
            jnp.isfinite(length) & (length > 0),
        )
        more = lambda carry: carry.alive & (carry.steps < steps)
        return jax.lax.while_loop(more, loop_safe(step), begin)

    def transpose(self, state: KrylovState, options: dict[str, Any]):
        """Raises, as there is no linear map to transpose."""
        raise ValueError(
            "AbsoluteKrylov: the solution is not a linear function of the vector and cannot be "
            "transposed. Stop gradients at its inputs with `jax.lax.stop_gradient`."
        )

    def conj(self, state: KrylovState, options: dict[str, Any]):
        return state, options

    def assume_full_rank(self) -> bool:
        return True
