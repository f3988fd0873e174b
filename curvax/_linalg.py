"""Products and factorisations of stacks of matrices, at a precision that is chosen here and not by
the default of the device (TF32 ruins small eigenvalues).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

_HIGHEST = jax.lax.Precision.HIGHEST
# Below this size a triangular matrix is inverted by substitution.
_LEAF = 64
# Matrices are factorised together with larger ones of which they have this share of the size.
_NEAR = 0.8


def matmul(a: Array, b: Array) -> Array:
    """a @ b, in the dtype of `a`."""
    return jnp.matmul(a, b.astype(a.dtype), precision=_HIGHEST)


def einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, precision=_HIGHEST)


def applied(equation: str, a: Array, b: Array) -> Array:
    """An einsum over one axis for applying a factor: on a GPU in three passes of bfloat16.

    To invert a large eigenvalue is to leave almost nothing of it: with operands that are rounded
    once, to TF32 even, what rounding leaves of it is many times as much.
    """
    three = functools.partial(_three_passes, equation)
    return _on_gpu(three, functools.partial(einsum, equation), a, b)


def applied_to(v: Array, *products: tuple[str, Array]) -> list[Array]:
    """`applied(equation, v, b)` for several (equation, b), with v taken apart once."""
    equations = [equation for equation, _ in products]

    def passes(v: Array, *others: Array) -> list[Array]:
        high, low = _apart(v)
        results = []
        for equation, b in zip(equations, others, strict=True):
            b_high, b_low = _apart(b)
            product = lambda a, b, equation=equation: _accumulated(equation, a, b)
            results.append(product(high, b_high) + product(high, b_low) + product(low, b_high))
        return results

    def plain(v: Array, *others: Array) -> list[Array]:
        return [einsum(equation, v, b) for equation, b in zip(equations, others, strict=True)]

    return _on_gpu(passes, plain, v, *(b for _, b in products))


def _on_gpu(passes: Callable[..., Any], plain: Callable[..., Any], *operands: Array) -> Any:
    """`passes` for operands of float32 on a GPU, else `plain`."""
    if any(operand.dtype != jnp.float32 for operand in operands):
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, cuda=passes, default=plain)


def _three_passes(equation: str, a: Array, b: Array) -> Array:
    """As one product that is three times as deep, so that its result is written once."""
    inputs, result = equation.split("->")
    first, second = inputs.split(",")
    (axis,) = (set(first) & set(second)) - set(result)
    (a_high, a_low), (b_high, b_low) = _apart(a), _apart(b)
    a = jnp.concatenate([a_high, a_high, a_low], axis=first.index(axis))
    b = jnp.concatenate([b_high, b_low, b_high], axis=second.index(axis))
    return _accumulated(equation, a, b)


def _accumulated(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _apart(x: Array) -> tuple[Array, Array]:
    """Two bfloat16 numbers whose sum has 16 bits of x."""
    high = jax.lax.reduce_precision(x, 8, 7)  # a cast and back would be optimised away
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def transposed(a: Array) -> Array:
    """Each matrix transposed."""
    return jnp.swapaxes(a, -1, -2)


def shifted(matrices: Array, shift: Array) -> Array:
    """Each matrix plus its own multiple of the identity."""
    eye = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return matrices + shift[:, None, None].astype(matrices.dtype) * eye[None]


def cholesky(stacks: Sequence[Array]) -> list[tuple[Array, Array]]:
    """L with A = L Lᵀ, and L⁻¹, of stacks of positive definite matrices; NaN where one is not.

    Those of about equal size take one call together: on a GPU the time of a factorisation is
    latency. The inverse takes the place of substitutions, which a GPU does at a small part of its
    speed.
    """
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(stacks)), key=lambda i: -stacks[i].shape[-1]):
        size = stacks[i].shape[-1]
        near = next((largest for largest in groups if size >= _NEAR * largest), size)
        groups.setdefault(near, []).append(i)
    results: list[tuple[Array, Array]] = [(stack, stack) for stack in stacks]
    for size, members in groups.items():
        together = joined([_grown(stacks[i], size) for i in members])
        lower, inverse = jax.lax.platform_dependent(
            together, cpu=_one_by_one(_by_substitution), default=_by_halves
        )
        for i, span in zip(members, spans([stacks[i] for i in members]), strict=True):
            own = slice(stacks[i].shape[-1])
            results[i] = lower[span, own, own], inverse[span, own, own]
    return results


def _grown(stack: Array, size: int) -> Array:
    """Each matrix in the corner of a larger one, the identity in the other."""
    more = size - stack.shape[-1]
    if not more:
        return stack
    rest = jnp.concatenate([jnp.zeros(size - more), jnp.ones(more)]).astype(stack.dtype)
    return jnp.pad(stack, ((0, 0), (0, more), (0, more))) + jnp.diag(rest)[None]


def inverse(stacks: Sequence[Array]) -> list[Array]:
    """Of positive definite matrices: L⁻ᵀ L⁻¹."""
    return [matmul(transposed(half), half) for _, half in cholesky(stacks)]


def eigh(stacks: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Eigenvalues, smallest first, and eigenvectors of symmetric matrices; equal sizes together."""
    function = lambda stack: tuple(jnp.linalg.eigh(stack))
    groups: dict[int, list[int]] = {}
    for i, stack in enumerate(stacks):
        groups.setdefault(stack.shape[-1], []).append(i)
    results: list[tuple[Array, Array]] = [(stack, stack) for stack in stacks]
    for members in groups.values():
        together = [stacks[i] for i in members]
        values, vectors = jax.lax.platform_dependent(
            joined(together), cpu=_one_by_one(function), default=function
        )
        for i, span in zip(members, spans(together), strict=True):
            results[i] = values[span], vectors[span]
    return results


def joined(stacks: Sequence[Array]) -> Array:
    """The stacks one behind the other."""
    return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def spans(stacks: Sequence[Array]) -> list[slice]:
    """Where each stack is in the joined one."""
    ends = [0]
    for stack in stacks:
        ends.append(ends[-1] + stack.shape[0])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _one_by_one(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A function of a stack, called for each matrix by itself.

    For LAPACK: jaxlib 0.10.2 spreads a batch over the threads of the CPU and waits for them, and
    batches that run at the same time wait for each other, for ever.
    """

    def each(stack: Array) -> Any:
        if stack.shape[0] == 1:
            return function(stack)
        one = lambda matrix: jax.tree.map(lambda x: x[0], function(matrix[None]))
        return jax.lax.map(one, stack)

    return each


def _by_substitution(stack: Array) -> tuple[Array, Array]:
    lower = jnp.linalg.cholesky(stack)
    return lower, _substituted(lower)


def _by_halves(stack: Array) -> tuple[Array, Array]:
    lower = jnp.linalg.cholesky(stack)
    return lower, _triangular_inverse(lower)


def _triangular_inverse(lower: Array) -> Array:
    """By halves: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]], both halves in one stack."""
    size = lower.shape[-1]
    if size <= _LEAF:
        return _substituted(lower)
    if size % 2:
        return _triangular_inverse(_grown(lower, size + 1))[:, :-1, :-1]
    half = size // 2
    diagonal = [lower[:, :half, :half], lower[:, half:, half:]]
    first, second = jnp.split(_triangular_inverse(jnp.concatenate(diagonal)), 2)
    corner = -matmul(second, matmul(lower[:, half:, :half], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=2)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)


def _substituted(lower: Array) -> Array:
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
