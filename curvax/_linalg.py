"""Products and factorisations of stacks of matrices, at a precision that is chosen here and not by
the default of the device (TF32 ruins small eigenvalues).
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax._stacks import joined, spans

_HIGHEST = jax.lax.Precision.HIGHEST
_THREE_PASSES = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
# Entries of an array up to which a product with it is a small one.
_SMALL = 2**22
# Below this size a triangular matrix is inverted by substitution.
_LEAF = 64
# Matrices of this share of a size are factorised together with those of that size, and all small
# ones together.
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

    def passes(a: Array, b: Array) -> Array:
        # As one product that is three times as deep, so that its result is written once.
        inputs, result = equation.split("->")
        first, second = inputs.split(",")
        (axis,) = (set(first) & set(second)) - set(result)
        (a_high, a_low), (b_high, b_low) = _apart(a), _apart(b)
        a = jnp.concatenate([a_high, a_high, a_low], axis=first.index(axis))
        b = jnp.concatenate([b_high, b_low, b_high], axis=second.index(axis))
        return _accumulated(equation, a, b)

    return _by_device(lambda a, b, product: product(equation, a, b), passes, a, b)


def applied_to(v: Array, *products: tuple[str, Array]) -> list[Array]:
    """`applied(equation, v, b)` for several (equation, b), with v taken apart once."""
    equations = [equation for equation, _ in products]

    def each(v: Array, *others: Array, product: Callable[..., Array]) -> list[Array]:
        return [product(equation, v, b) for equation, b in zip(equations, others, strict=True)]

    def passes(v: Array, *others: Array) -> list[Array]:
        high, low = _apart(v)

        def product(equation: str, _: Array, b: Array) -> Array:
            b_high, b_low = _apart(b)
            pairs = (high, b_high), (high, b_low), (low, b_high)
            first, *rest = (_accumulated(equation, *pair) for pair in pairs)
            return sum(rest, first)

        return each(v, *others, product=product)

    return _by_device(each, passes, v, *(b for _, b in products))


def gram(equation: str, x: Array) -> Array:
    """The einsum of x with itself, a Gram matrix: on a GPU of a float32 x rounded to bfloat16.

    Rounded or not, it is the Gram matrix of something near x, and has no negative eigenvalues; at
    three passes or in float32 it would cost more than all else that is done with a gradient.
    """

    def rounded(x: Array) -> Array:
        x = x.astype(jnp.bfloat16)
        return _accumulated(equation, x, x)

    exact = lambda x: einsum(equation, x, x)
    if x.dtype != jnp.float32 or is_old_gpu():
        return exact(x)
    return jax.lax.platform_dependent(x, cuda=rounded, default=exact)


def _by_device(products: Callable[..., Any], passes: Callable[..., Any], *operands: Array) -> Any:
    """`products(*operands, product=…)` with exact ones, or for float32 on a GPU with three passes
    in one kernel where operands are small, and to launch it is most of the time; else `passes`,
    whose kernels are faster.
    """
    exact = functools.partial(products, product=einsum)
    if any(operand.dtype != jnp.float32 for operand in operands) or is_old_gpu():
        return exact(*operands)
    if max(operand.size for operand in operands) <= _SMALL:
        three = functools.partial(jnp.einsum, precision=_THREE_PASSES)
        passes = functools.partial(products, product=three)
    return jax.lax.platform_dependent(*operands, cuda=passes, default=exact)


def _accumulated(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _apart(x: Array) -> tuple[Array, Array]:
    """Two bfloat16 numbers whose sum has 16 bits of x."""
    high = jax.lax.reduce_precision(x, 8, 7)  # a cast and back would be optimised away
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


@functools.cache
def is_old_gpu() -> bool:
    """Whether a device is too old for bfloat16: XLA has no such product for it."""
    return any(float(getattr(device, "compute_capability", 8.0)) < 8 for device in jax.devices())


def transposed(a: Array) -> Array:
    """Each matrix transposed."""
    return jnp.swapaxes(a, -1, -2)


def shifted(matrices: Array, shift: Array) -> Array:
    """Each matrix plus its own multiple of the identity."""
    eye = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return matrices + shift[:, None, None].astype(matrices.dtype) * eye[None]


def frobenius_norm(matrices: Array) -> Float[Array, " stack"]:
    largest = largest_entry(matrices)
    return largest[:, 0, 0] * jnp.sqrt(jnp.sum(jnp.square(matrices / largest), axis=(1, 2)))


def largest_entry(matrices: Array) -> Float[Array, "stack 1 1"]:
    """Of each matrix: squares in units of it neither over- nor underflow. Never zero."""
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)
    return jnp.maximum(largest, jnp.finfo(matrices.dtype).tiny)


def cholesky(stacks: Sequence[Array]) -> list[tuple[Array, Array]]:
    """L with A = L Lᵀ, and L⁻¹, of stacks of positive definite matrices; NaN where one is not.

    The inverse takes the place of substitutions, which a GPU does at a small part of its speed.
    """

    def together(*group: Array) -> list[tuple[Array, Array]]:
        size = max(stack.shape[-1] for stack in group)
        large = joined([grown(stack, size) for stack in group])
        both = _factorised(large, _triangular_inverse)
        results = []
        for stack, span in zip(group, spans(group), strict=True):
            own = slice(stack.shape[-1])
            lower, inverse = (whole[span, own, own] for whole in both)
            results.append((lower, inverse))
        return results

    near = lambda size, largest: size >= _NEAR * largest or largest <= _LEAF
    return _in_groups(stacks, near, together, lambda stack: _factorised(stack, _substituted))


def eigh(stacks: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Eigenvalues, smallest first, and eigenvectors of stacks of symmetric matrices."""

    def together(*group: Array) -> list[tuple[Array, Array]]:
        values, vectors = jnp.linalg.eigh(joined(group))
        return [(values[span], vectors[span]) for span in spans(group)]

    return _in_groups(stacks, operator.eq, together, lambda stack: tuple(jnp.linalg.eigh(stack)))


def _in_groups(
    stacks: Sequence[Array],
    near: Callable[[int, int], bool],
    together: Callable[..., list[tuple[Array, Array]]],
    alone: Callable[[Array], tuple[Array, Array]],
) -> list[tuple[Array, Array]]:
    """`together(*group)` for stacks of matrices of one dtype whose size is `near` that of the
    largest: on a GPU the time of a factorisation is latency. On a CPU `alone` for each matrix.
    """
    groups: dict[tuple[Any, int], list[int]] = {}
    for i in sorted(range(len(stacks)), key=lambda i: -stacks[i].shape[-1]):
        size, dtype = stacks[i].shape[-1], stacks[i].dtype
        of_dtype = (largest for each, largest in groups if each == dtype)
        largest = next((largest for largest in of_dtype if near(size, largest)), size)
        groups.setdefault((dtype, largest), []).append(i)
    apart = lambda *group: [_one_by_one(alone)(stack) for stack in group]
    results: list[tuple[Array, Array]] = [(stack, stack) for stack in stacks]
    for members in groups.values():
        group = [stacks[i] for i in members]
        done = jax.lax.platform_dependent(*group, cpu=apart, default=together)
        for i, result in zip(members, done, strict=True):
            results[i] = result
    return results


def grown(stack: Array, size: int) -> Array:
    """Each matrix in the corner of a larger one, the identity in the other."""
    more = size - stack.shape[-1]
    if not more:
        return stack
    rest = jnp.concatenate([jnp.zeros(size - more), jnp.ones(more)]).astype(stack.dtype)
    return jnp.pad(stack, ((0, 0), (0, more), (0, more))) + jnp.diag(rest)[None]


def inverse(stacks: Sequence[Array]) -> list[Array]:
    """Of positive definite matrices: L⁻ᵀ L⁻¹."""
    return [matmul(transposed(half), half) for _, half in cholesky(stacks)]


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


def _factorised(stack: Array, inverted: Callable[[Array], Array]) -> tuple[Array, Array]:
    lower = jnp.linalg.cholesky(stack)
    return lower, inverted(lower)


def _triangular_inverse(lower: Array) -> Array:
    """By halves: [[A, 0], [C, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ C A⁻¹, B⁻¹]], both halves in one stack."""
    size = lower.shape[-1]
    if size <= _LEAF:
        return _substituted(lower)
    if size % 2:
        return _triangular_inverse(grown(lower, size + 1))[:, :-1, :-1]
    half = size // 2
    diagonal = [lower[:, :half, :half], lower[:, half:, half:]]
    first, second = jnp.split(_triangular_inverse(jnp.concatenate(diagonal)), 2)
    corner = -matmul(second, matmul(lower[:, half:, :half], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=2)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)


def _substituted(lower: Array) -> Array:
    eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
