"""What a step makes of a preconditioned gradient: its length, or more.

A scaling is its own part of a method, because composition decides: the same factors with another
scaling are another optimizer.
"""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, Float, Int, Scalar, ScalarLike

from curvax import _tree
from curvax._checks import check_positive
from curvax._masked import seen_by
from curvax._sharding import compiler_sharded
from curvax.objective import Params
from curvax.operators.kronecker import arrange, disarrange
from curvax.orthogonal import QUINTIC, newton_schulz
from curvax.plan.plan import Observation, Requirement
from curvax.plan.quantities import AbstractCurvatureQuantity, GaussNewtonCurvature
from curvax.taps.arrangement import Elementwise, Lookup
from curvax.taps.blocks import Block, DiagonalBlock


class Context(NamedTuple):
    """What a scaling may look at, besides the direction.

    `gradient` is what came down the Optax chain; `observation` has the quantities that the scaling
    asked for; `damping` is λ of this step; `blocks` say which leaves belong together, and with
    `curvax.operators.kronecker.arrange` as which matrices; `inverse` is the P that made the
    direction, where that is an operator.
    """

    gradient: Params
    params: Params
    observation: Observation
    damping: Scalar
    blocks: tuple[Block, ...]
    inverse: lx.AbstractLinearOperator | None = None


class AbstractScaling(eqx.Module):
    """Turns a preconditioned gradient into the direction of a step, with the gradient's sign.

    A subclass gives `apply`, and where it needs them `requirements` and `init`. The state must keep
    its structure, shapes and dtypes.
    """

    def requirements(self) -> tuple[Requirement, ...]:
        """The quantities it wants."""
        return ()

    def init(self, params: Params) -> Any:
        """Its state."""
        del params
        return ()

    @abc.abstractmethod
    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, Any]:
        """The scaled direction, and the new state."""


class AsIs(AbstractScaling):
    """No scaling: the natural gradient, whose length follows from the damping alone."""

    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, Any]:
        del context
        return direction, state


class ClippedState(NamedTuple):
    """The share of the entries of the last direction that were not clipped; NaN before the first.

    Liu et al. (2023) tune γ until it is 0.1 to 0.5.
    """

    win_rate: Float[Array, ""]


class Clipped(AbstractScaling):
    """Each entry of the direction clipped to [−`limit`, `limit`] (Liu et al. 2023, Sophia).

    Where the curvature is small, negative or out of date, the step is then no longer than that of
    a method of signs. Its state has the `win_rate`.
    """

    limit: ScalarLike = 1.0

    def __check_init__(self):
        check_positive("limit", self.limit)

    def init(self, params: Params) -> ClippedState:
        del params
        return ClippedState(jnp.asarray(jnp.nan, jnp.float32))

    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, ClippedState]:
        limit = lambda leaf: jnp.asarray(self.limit, leaf.dtype)
        clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -limit(leaf), limit(leaf)), direction)
        # Numbers, not truth values: a sum of those is slower on a CPU.
        one, zero = jnp.float32(1), jnp.float32(0)
        inside = lambda leaf: jnp.where(jnp.abs(leaf) < limit(leaf), one, zero)
        within = _tree.total(jax.tree.map(inside, clipped))
        return clipped, ClippedState(within / max(_tree.size(direction), 1))


class KLClip(AbstractScaling):
    """The direction d = F⁻¹g, shortened so that dᵀFd ≤ `limit`².

    dᵀFd (which is gᵀd before it is shortened) is twice the change of the predictions in KL
    divergence that a step of length 1 makes, to second order; a step of learning rate η then
    changes them by at most ½ η² limit² nats an event, however small the damping (Ba et al. 2017,
    section 5; Pauloski et al. 2021).

    **Arguments:**

    - `limit`: in square roots of nats. With a loss that is not a negative log likelihood it is in
      square roots of the loss's own unit.
    - `always`: makes the direction as long as the limit allows also where it is shorter.
    """

    limit: ScalarLike = 1.0
    always: bool = eqx.field(static=True, default=False)

    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, Any]:
        square = jnp.maximum(_tree.dot(direction, context.gradient), 0)
        length = jnp.sqrt(square)
        factor = jnp.asarray(self.limit, length.dtype) / jnp.maximum(
            length, jnp.finfo(length.dtype).tiny
        )
        factor = jnp.where(length > 0, factor, 1.0)
        if not self.always:
            factor = jnp.minimum(factor, 1.0)
        return _tree.scale(factor.astype(length.dtype), direction), state


class RMS(AbstractScaling):
    """Each leaf, and of leaves that are scanned over each layer, scaled to a root mean square of 1,
    the size of an Adam step; a weight with n inputs to √(`inputs`/n).

    A step of a given learning rate then changes the outputs of wide layers as much as those of
    narrow ones, if the singular values of the direction are about equal, which preconditioning
    tends to make them (Yang et al. 2023, condition 1). The lengths that the preconditioner gave to
    the leaves are lost, their directions kept.

    **Arguments:**

    - `inputs`: those of a weight whose root mean square is 1; None for 1 everywhere. Rows of an
      embedding, which are looked up, have none.
    - `eps`: is added to the mean square, so that a direction of zero stays zero.
    """

    inputs: ScalarLike | None = 64.0
    eps: float = 1e-30

    def __check_init__(self):
        if isinstance(self.inputs, int | float) and not self.inputs > 0:
            raise ValueError(f"inputs: got {self.inputs}, wanted a positive number or None.")

    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, Any]:
        leaves, treedef = jax.tree.flatten(direction)
        loops, fans = (of(context.blocks, len(leaves)) for of in (_loop_axes, _fans_in))

        scaled = list(leaves)
        for members in _tree.alike(leaves, list(zip(loops, fans, strict=True))):
            depth, fan = loops[members[0]], fans[members[0]]
            stack = _tree.stacked([leaves[i] for i in members])
            wide = stack.astype(_tree.accumulation_dtype(stack.dtype))
            axes = tuple(range(1 + depth, wide.ndim))
            factors = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axes, keepdims=True) + self.eps)
            if self.inputs is not None and fan:
                factors = factors * (self.inputs / fan) ** 0.5
            for i, factor in zip(members, factors.astype(stack.dtype), strict=True):
                scaled[i] = (leaves[i] * factor).astype(stack.dtype)
        return treedef.unflatten(scaled), state


def _fans_in(blocks: tuple[Block, ...], count: int) -> list[int]:
    """For each leaf the most inputs that a product with it sums over, 0 for one in no product."""
    fans = [0] * count
    for block in blocks:
        for arrangement in (use.arrangement for use in block.uses):
            if not isinstance(arrangement, Lookup | Elementwise):
                fans[block.leaf] = max(fans[block.leaf], arrangement.inputs)
    return fans


def _loop_axes(blocks: tuple[Block, ...], count: int) -> list[int]:
    """For each leaf, how many of its leading axes the model scans over."""
    depths = [0] * count
    for block in blocks:
        if isinstance(block, DiagonalBlock):
            depths[block.leaf] = block.loops
            continue
        depths[block.leaf] = block.view.depth
        if block.bias is not None and block.bias_view is not None:
            depths[block.bias] = block.bias_view.depth
    return depths


class Grafted(AbstractScaling):
    """Each leaf scaled to the norm of what another transformation makes of the gradient
    (Agarwal et al. 2020).

    **Arguments:** `magnitude`, such as `optax.scale_by_adam()`: its learning rates then fit. Its
    state, for Adam two copies of the parameters, is kept here. It sees the gradient alone, no extra
    arguments.
    """

    magnitude: optax.GradientTransformation = eqx.field(static=True)

    def init(self, params: Params) -> Any:
        return self.magnitude.init(params)

    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, Any]:
        target, state = self.magnitude.update(context.gradient, state, context.params)

        def leaf(d: Array, t: Array) -> Array:
            length, wanted = _tree.norm(d), _tree.norm(t)
            factor = jnp.where(length > 0, wanted / jnp.where(length > 0, length, 1), 0)
            return (d * factor.astype(d.dtype)).astype(d.dtype)

        return jax.tree.map(leaf, direction, target), state


class Orthogonalised(AbstractScaling):
    """Each matrix replaced by the nearest semi-orthogonal one, times a number that makes its root
    mean square about 1; leaves without a matrix (and embeddings) are scaled to just that.

    By Newton-Schulz iteration (Jordan et al. 2024, Muon). A semi-orthogonal m × n matrix has a root
    mean square of 1/√max(m, n), and is multiplied by √max(m, n), so that one learning rate, of the
    size of Adam's, serves all shapes and both kinds of leaf.

    **Arguments:**

    - `momentum`: Nesterov's, before the orthogonalisation as in Muon, and so a state of this
      scaling: `optax.trace` could only come after. One copy of the parameters.
    - `steps`: of the iteration. After five, singular values lie between about 0.7 and 1.2.
    """

    momentum: float = 0.95
    steps: int = eqx.field(static=True, default=5)

    def init(self, params: Params) -> Any:
        return _tree.zeros_like(params)

    def apply(self, state: Any, direction: Params, context: Context) -> tuple[Params, Any]:
        # In its own dtype, whatever that of the gradient is.
        state = _tree.cast(_tree.add_scaled(direction, self.momentum, state), state)
        ahead = _tree.add_scaled(direction, self.momentum, state)  # Nesterov
        leaves, treedef = jax.tree.flatten(ahead)
        plain, _ = RMS().apply((), ahead, context)
        spectral = lambda *args: self._orthogonal(context.blocks, *args)
        results = compiler_sharded(spectral, leaves, leaves, jax.tree.leaves(plain))
        return jax.tree.unflatten(treedef, results), state

    def _orthogonal(
        self, blocks: tuple[Block, ...], leaves: list[Array], plain: list[Array]
    ) -> list[Array]:
        """The leaves of matrices orthogonalised, and the others as in `plain`."""
        results = list(plain)
        for block in blocks:
            if isinstance(block, DiagonalBlock) or block.kind == "embedding":
                continue
            matrix = arrange(block, leaves)
            weight = matrix if block.bias is None else matrix[..., :-1]
            spectral = newton_schulz(weight, (QUINTIC,) * self.steps)
            rows, columns = weight.shape[-2:]
            spectral = spectral * math.sqrt(max(rows, columns))
            if block.bias is not None:
                bias = matrix[..., -1:]
                size = jnp.sqrt(jnp.mean(jnp.square(bias), axis=(1, 2), keepdims=True))
                bias = bias / jnp.maximum(size, 1e-30)
                spectral = jnp.concatenate([spectral, bias.astype(spectral.dtype)], axis=-1)
            for leaf, part in disarrange(block, spectral, leaves).items():
                results[leaf] = part.astype(leaves[leaf].dtype)
        return results


class QuadraticState(NamedTuple):
    """The last step δ, the coefficients (α, μ) of it, and how many steps there were."""

    last: Params
    coefficients: Float[Array, "2"]
    count: Int[Array, ""]


class QuadraticModel(AbstractScaling):
    """δ = α d + μ δ₋₁ with the α and μ that minimise the quadratic model of the objective on the
    batch, m(δ) = gᵀδ + ½ δᵀ(A + λI)δ (Martens & Grosse 2015, sections 6.4 and 7).

    Give the chain a learning rate of 1 and no momentum of its own: both are chosen here.

    **Arguments:** `curvature`: A, as a quantity of the plan.

    **State:** one copy of the parameters. **Cost:** two products with A and a 2 × 2 solve in each
    step.
    """

    curvature: AbstractCurvatureQuantity = GaussNewtonCurvature()

    def requirements(self) -> tuple[Requirement, ...]:
        return (Requirement(self.curvature, "scaling"),)

    def init(self, params: Params) -> QuadraticState:
        zero = jnp.zeros((), jnp.int32)
        return QuadraticState(_tree.zeros_like(params), jnp.zeros((2,), jnp.float32), zero)

    def apply(
        self, state: QuadraticState, direction: Params, context: Context
    ) -> tuple[Params, QuadraticState]:
        operator = seen_by(context.observation[self.curvature], direction)
        basis = [direction, state.last]
        images = [operator.mv(v) for v in basis]
        dtype = _tree.accumulation_dtype(_tree.common_dtype(direction))
        damping = context.damping.astype(dtype)
        entry = lambda i, j: (
            _tree.dot(basis[i], images[j]) + damping * _tree.dot(basis[i], basis[j])
        )
        matrix = jnp.asarray([[entry(i, j) for j in range(2)] for i in range(2)], dtype)
        slopes = jnp.asarray([_tree.dot(v, context.gradient) for v in basis], dtype)
        # Scaled to a unit diagonal, so that one direction may be tiny; zero stays out.
        scale = jnp.sqrt(jnp.diagonal(matrix))
        inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
        unit = matrix * jnp.outer(inverse, inverse) + jnp.diag(jnp.where(scale > 0, 1e-6, 1.0))
        step = -inverse * jnp.linalg.solve(unit, inverse * slopes)
        delta = _tree.add_scaled(_tree.scale(step[0], direction), step[1], state.last)
        new = QuadraticState(delta, step.astype(jnp.float32), state.count + 1)
        return _tree.scale(-1.0, delta), new
