"""Losses as functions of the model's outputs, with the curvature that Gauss-Newton and Fisher need.

`outputs` is one array with at least a leading batch axis. Its trailing `event_ndim` axes form an
*event*, the argument of one negative log-likelihood ℓ; the axes before them are the *lead* axes
(batch, and for instance positions of a sequence). `event_ndim=None` takes every axis after the
first. Every method acts on each event alone: reduction and weights belong to the objective.

Precision: float16 and bfloat16 outputs are computed with in float32. Results have the dtype of
`outputs`, except values and sampled real targets, which stay in float32. The diagonal in a square
root S is floored at the root of the smallest normal number of the outputs' dtype, in S and in the
gradient coordinates r alike: S r = ∇ℓ stays exact and r finite where a probability underflows.

Nothing can be raised about values under `jit`: an integer target out of its range makes value and
gradient of its event NaN, which a training step that skips non-finite gradients sees.
"""

import abc
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Events: TypeAlias = Float[Array, "..."]  # (*lead, *event)
Targets: TypeAlias = PyTree  # one array, but for `CustomLoss`


def wide(x: Array) -> Array:
    """`x`, in float32 if its dtype is a narrower floating one."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


def floored_sqrt(curvature: Array, dtype: Any) -> Array:
    """√max(c, tiny), with the smallest normal number of `dtype`: its inverse is finite too."""
    return jnp.sqrt(jnp.maximum(curvature, float(jnp.finfo(dtype).tiny)))


def check_array(name: str, x: Any, floating: bool = False) -> None:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted an array")
    kinds = (jnp.floating,) if floating else (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        wanted = "a floating dtype" if floating else "a floating, integer or bool dtype"
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted {wanted}")


def check_shape(name: str, x: Any, wanted: tuple[int, ...], why: str) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {wanted} ({why})")


def check_range(name: str, x: Any, low: int | float, high: int | float) -> None:
    """Raises for the first entry outside [low, high], if the entries of `x` can be read now."""
    if isinstance(x, Tracer | jax.ShapeDtypeStruct) or (low, high) == (-np.inf, np.inf):
        return
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return  # its entries live in other processes too
    entries = np.asarray(x)
    with np.errstate(invalid="ignore"):  # bfloat16 warns of NaNs
        bad = (entries < low) | (entries > high)
    if bad.any():
        index = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
        wanted = f"values in [{low}, {high}]"
        raise ValueError(f"{name}: got {entries[index]} at index {index}, wanted {wanted}")


class AbstractLoss(eqx.Module):
    """A negative log-likelihood ℓ(z, y) of targets y, given outputs z.

    Shapes: `outputs`, `vector` and `coordinates` are (*lead, *event); so are all results, but for
    values, which are (*lead,), and samples. The shape of the targets is the loss's own. Methods
    do not validate: call `check` once, where the arrays enter.

    `convex` says whether ℓ is convex in z, so that ∇²ℓ is itself the positive semidefinite
    curvature.
    """

    event_ndim: eqx.AbstractVar[int | None]
    convex: eqx.AbstractVar[bool]

    def __check_init__(self):
        if self.event_ndim is not None and self.event_ndim < 0:
            raise ValueError(f"event_ndim: got {self.event_ndim}, wanted None or at least 0")

    def lead_shape(self, outputs: Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """The lead axes of `outputs`: one entry for each event."""
        ndim = 1 if self.event_ndim is None else outputs.ndim - self.event_ndim
        return tuple(outputs.shape[:ndim])

    @abc.abstractmethod
    def value(self, outputs: Events, targets: Targets) -> Array:
        """ℓ of each event, shape (*lead,), in float32 or wider."""

    @abc.abstractmethod
    def gradient(self, outputs: Events, targets: Targets) -> Events:
        """∇ℓ."""

    @abc.abstractmethod
    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        """∇²ℓ v, exact, whether or not ℓ is convex."""

    @abc.abstractmethod
    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        """The positive semidefinite curvature S Sᵀ v: ∇²ℓ v where ℓ is convex."""

    @abc.abstractmethod
    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        """S u. S is square: the coordinates u have the shape of `outputs`."""

    @abc.abstractmethod
    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        """Sᵀ v."""

    @abc.abstractmethod
    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events | None:
        """The r with S r = ∇ℓ exactly, or None where no such r is cheap."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, outputs: Events) -> Targets:
        """Targets from the predictive distribution: E[∇ℓ ∇ℓᵀ] is the Fisher information at z."""

    @abc.abstractmethod
    def check(self, outputs: Any, targets: Any) -> None:
        """Validates arrays or `ShapeDtypeStruct`s; concrete targets are read, hence synchronised.

        **Raises** `ValueError` naming the argument, what was seen and what was wanted: outputs
        not floating, empty, or of too low a rank; targets of another shape, number of examples
        or kind; concrete targets out of their range. NaNs pass.
        """

    def _check_outputs(self, outputs: Any) -> None:
        check_array("outputs", outputs, floating=True)
        shape, event_ndim = tuple(outputs.shape), self.event_ndim or 0
        if len(shape) < 1 + event_ndim:
            wanted = f"a batch axis and {event_ndim} event axes"
            raise ValueError(f"outputs: got shape {shape}, wanted {wanted}")
        if 0 in shape:
            raise ValueError(f"outputs: got shape {shape}, wanted at least one entry on each axis")


class AbstractDiagonalLoss(AbstractLoss):
    """A loss with S = diag(root), so S = Sᵀ."""

    @abc.abstractmethod
    def _root(self, outputs: Events) -> Array:
        """The diagonal of S, before it is rounded to the outputs' dtype."""

    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        return (self._root(outputs) * wide(coordinates)).astype(outputs.dtype)

    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self.sqrt_product(outputs, targets, vector)
