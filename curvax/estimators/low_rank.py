"""Low-rank approximations of an operator from products with a few random vectors."""

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax import _basis, _tree
from curvax._checks import check_count
from curvax.operators.low_rank import LowRank, from_root


def nystrom(
    operator: lx.AbstractLinearOperator,
    start: PRNGKeyArray | PyTree[Float[Array, "k ..."]],
    rank: int | None = None,
    *,
    at_once: int = 1,
) -> LowRank:
    """The randomised Nyström approximation (AΩ)(ΩᵀAΩ)⁻¹(AΩ)ᵀ of a positive semidefinite operator,
    as U diag(s) Uᵀ with the largest eigenvalue first (Frangella, Tropp & Udell 2023, Algorithm
    2.1).

    **Arguments:**

    - `operator`: any symmetric operator. The negative eigenvalues that an indefinite one shows on
      Ω are shifted to zero before, and the shift is taken off the result (Frangella et al. 2024,
      SketchySGD): what is left of its spectrum is the positive part.
    - `start`: a key, for a Gaussian Ω with `rank` columns; or without a `rank` Ω itself, a tree
      like the operator's input whose leaves have one more axis in front, such as the `basis` of
      an earlier approximation.
    - `at_once`: how many products are computed side by side. One is best on a CPU; more may use a
      GPU better on a small model, and each needs the memory of a product.

    **Cost:** `rank` products, about 10 rank² operations for each parameter, and eigendecompositions
    of rank × rank matrices. **Memory:** about five times rank × parameters while it runs; the
    result holds rank × parameters.

    **Raises** `ValueError` for an operator that is not symmetric, and a rank or `at_once` below 1.
    A rank above the number of parameters is cut to it.
    """
    if not lx.is_symmetric(operator):
        raise ValueError(f"operator: got a {type(operator).__name__} that is not marked symmetric.")
    check_count("rank", 1 if rank is None else rank)
    check_count("at_once", at_once)
    operator = lx.linearise(operator)
    structure = operator.in_structure()
    if rank is not None:
        start = _basis.gaussian(start, structure, min(rank, _tree.size(structure)))
    test, _ = _basis.orthonormal(start)
    sketch = _basis.applied(operator.mv, test, structure, at_once)

    core = _basis.gram(test, sketch)
    values, vectors = _basis.eigh_of(core)
    # Of the size of a rounding error of the sketch.
    size = jnp.sqrt(jnp.trace(_basis.gram(sketch, sketch)))
    unit = jnp.maximum(jnp.finfo(size.dtype).eps * size, jnp.finfo(size.dtype).tiny)
    shift = unit + jnp.maximum(-values[0], 0)
    sketch = jax.tree.map(lambda y, q: y + shift.astype(y.dtype) * q, sketch, test)
    # Where the paper divides by the Cholesky factor of the core: the same up to a rotation.
    roots = jnp.sqrt(jnp.maximum(values + shift, unit))
    return from_root(_basis.rotated(sketch, vectors / roots[None]), shift)
