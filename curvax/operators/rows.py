"""The Gram matrix of per-example gradients, without most of those gradients.

Row r of a curvature JᵀCJ = U Uᵀ is a gradient of one example. Where a weight takes part in a
matrix product, its share of that gradient is Σ_t a_rt b_rtᵀ, a sum of a few outer products of an
input and an output cotangent, and

    ⟨U_r, U_s⟩ = Σ_{t,t'} ⟨a_rt, a_st'⟩ ⟨b_rt, b_st'⟩

needs the two factors only. They are found in the jaxpr of one example's backward pass; a leaf for
which there are none is written out.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax._jaxpr import evaluate, is_literal
from curvax._linalg import einsum
from curvax._sharding import gathered, whole
from curvax.objective import Objective, Params

# These only move or negate the entries of a leaf, which leaves its inner products as they are.
_REARRANGING = ("transpose", "reshape", "squeeze", "neg", "copy", "reshard")


class _Product(NamedTuple):
    """Σ_t a_t b_tᵀ, for each of several groups: what to contract in the two factors."""

    lhs: Any
    rhs: Any
    dimension_numbers: Any

    def arrange(self, factor: Array, side: int, leading: int) -> Array:
        """A factor with the axes (leading…, groups, t, features)."""
        contracting, batch = self.dimension_numbers
        summed = tuple(leading + axis for axis in contracting[side])
        groups = tuple(leading + axis for axis in batch[side])
        free = tuple(a for a in range(leading, factor.ndim) if a not in summed + groups)
        lead = tuple(range(leading))
        sizes = [math.prod(factor.shape[a] for a in axes) for axes in (groups, summed, free)]
        moved = jnp.transpose(factor, lead + groups + summed + free)
        return moved.reshape(factor.shape[:leading] + tuple(sizes))


def row_gram(
    objective: Objective,
    params: Params,
    x: PyTree[Array],
    cotangents: Float[Array, "columns batch ..."],
    key: PRNGKeyArray | None = None,
) -> Float[Array, "rows rows"]:
    """UᵀU for the rows Jᵢᵀu of each example i and each column u of cotangents, examples first."""
    columns, batch = cotangents.shape[:2]
    params = gathered(params, (x, cotangents))
    keys = objective.example_keys(x, key)
    first = lambda tree: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree
    )
    one = lambda x, key, u: tuple(jax.tree.leaves(objective.pull_back_example(params, x, u, key)))
    arguments = (first(x), first(keys), first(first(cotangents)))
    closed = jax.make_jaxpr(one)(*arguments)
    inlined = lambda *leaves: evaluate(closed.jaxpr, closed.consts, leaves)
    flat = jax.make_jaxpr(inlined)(*jax.tree.leaves(arguments))
    producers = {var: eqn for eqn in flat.eqns for var in eqn.outvars}
    terms = [_find_product(var, producers) for var in flat.jaxpr.outvars]

    wanted = [part for term in terms for part in _parts(term)]
    depends = _depends_on(flat.jaxpr, flat.jaxpr.invars[-1:])
    along_columns = [0 if depends(var) else None for var in wanted]
    parts = lambda *args: evaluate(flat.jaxpr, flat.consts, jax.tree.leaves(args), wanted=wanted)
    computed = jax.vmap(
        jax.vmap(parts, in_axes=(None, None, 0), out_axes=along_columns),
        in_axes=(0, 0, 1),
    )(x, keys, cotangents)

    total = jnp.zeros((batch, columns, batch, columns), cotangents.dtype)
    # Whole on each device, as a factorisation needs the matrix: rows that are sharded over the
    # batch could not be so on both of its axes.
    values = iter(zip(map(whole, computed), along_columns, strict=True))
    for term in terms:
        if isinstance(term, _Product):
            total = total + _gram_of_product(term, next(values), next(values), total.dtype)
        else:
            leaf, axis = next(values)
            leaf = leaf.astype(total.dtype).reshape(batch, columns if axis == 0 else 1, -1)
            total = total + einsum("bik,cjk->bicj", leaf, leaf)
    return total.reshape(batch * columns, batch * columns)


def _gram_of_product(term: _Product, lhs: tuple, rhs: tuple, dtype: Any) -> Array:
    factors = []
    for side, (value, axis) in enumerate((lhs, rhs)):
        value = value if axis == 0 else value[:, None]
        factors.append(term.arrange(value.astype(dtype), side, leading=2))
    a, b = factors
    if a.shape[-2] == 1:
        a, b = a[..., 0, :], b[..., 0, :]
        if a.shape[2] == 1:
            a, b = a[:, :, 0], b[:, :, 0]
            return einsum("bik,cjk->bicj", a, a) * einsum("bik,cjk->bicj", b, b)
        return jnp.sum(einsum("bigk,cjgk->gbicj", a, a) * einsum("bigk,cjgk->gbicj", b, b), 0)
    return jnp.sum(
        einsum("bigtk,cjguk->gbictju", a, a) * einsum("bigtk,cjguk->gbictju", b, b), axis=(0, 4, 6)
    )


def _find_product(var: Any, producers: dict[Any, Any]) -> Any:
    """The matrix product behind a leaf, if its factors are the cheaper way to inner products."""
    leaf = var
    while not is_literal(var) and var in producers:
        eqn = producers[var]
        if eqn.primitive.name in _REARRANGING:
            var = eqn.invars[0]
            continue
        if eqn.primitive.name != "dot_general" or eqn.outvars[0].aval.dtype != leaf.aval.dtype:
            break
        lhs, rhs = eqn.invars
        if is_literal(lhs) or is_literal(rhs):
            break
        product = _Product(lhs, rhs, eqn.params["dimension_numbers"])
        (summed, _), (groups, _) = product.dimension_numbers
        terms = math.prod(lhs.aval.shape[axis] for axis in summed)
        count = math.prod(lhs.aval.shape[axis] for axis in groups)
        sizes = sum(side.aval.size // max(terms * count, 1) for side in (lhs, rhs))
        return product if terms**2 * count * sizes < leaf.aval.size else leaf
    return leaf


def _parts(term: Any) -> tuple[Any, ...]:
    return (term.lhs, term.rhs) if isinstance(term, _Product) else (term,)


def _depends_on(jaxpr: Any, sources: Any) -> Any:
    reached = set(sources)
    for eqn in jaxpr.eqns:
        if any(not is_literal(atom) and atom in reached for atom in eqn.invars):
            reached.update(eqn.outvars)
    return lambda var: not is_literal(var) and var in reached
