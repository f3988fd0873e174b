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
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

Events: TypeAlias = Float[Array, "..."]  # (*lead, *event)
Targets: TypeAlias = PyTree  # one array, but for `CustomLoss`


def _wide(x: Array) -> Array:
    """`x`, in float32 if its dtype is a narrower floating one."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


def _floored_sqrt(curvature: Array, dtype: Any) -> Array:
    """√max(c, tiny), with the smallest normal number of `dtype`: its inverse is finite too."""
    return jnp.sqrt(jnp.maximum(curvature, float(jnp.finfo(dtype).tiny)))


def _check_array(name: str, x: Any, floating: bool = False) -> None:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise ValueError(f"{name}: got {type(x).__name__}, wanted an array")
    kinds = (jnp.floating,) if floating else (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        wanted = "a floating dtype" if floating else "a floating, integer or bool dtype"
        raise ValueError(f"{name}: got dtype {x.dtype}, wanted {wanted}")


def _check_shape(name: str, x: Any, wanted: tuple[int, ...], why: str) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted {wanted} ({why})")


def _check_range(name: str, x: Any, low: int | float, high: int | float) -> None:
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
        _check_array("outputs", outputs, floating=True)
        shape, event_ndim = tuple(outputs.shape), self.event_ndim or 0
        if len(shape) < 1 + event_ndim:
            wanted = f"a batch axis and {event_ndim} event axes"
            raise ValueError(f"outputs: got shape {shape}, wanted {wanted}")
        if 0 in shape:
            raise ValueError(f"outputs: got shape {shape}, wanted at least one entry on each axis")


class _AbstractDiagonalLoss(AbstractLoss):
    """A loss with S = diag(root), so S = Sᵀ."""

    @abc.abstractmethod
    def _root(self, outputs: Events) -> Array:
        """The diagonal of S, before it is rounded to the outputs' dtype."""

    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        return (self._root(outputs) * _wide(coordinates)).astype(outputs.dtype)

    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self.sqrt_product(outputs, targets, vector)


class _AbstractElementwiseLoss(_AbstractDiagonalLoss):
    """ℓ(z, y) = Σᵢ φ(zᵢ, yᵢ), y of the shape of z, with φ'' ≥ 0 a function of z alone."""

    _support: ClassVar[tuple[int | float, int | float]]  # the range of the targets

    @abc.abstractmethod
    def _terms(self, z: Array, y: Array) -> Array:
        """φ(zᵢ, yᵢ)."""

    @abc.abstractmethod
    def _slopes(self, z: Array, y: Array) -> Array:
        """φ'(zᵢ, yᵢ)."""

    @abc.abstractmethod
    def _curvature(self, z: Array) -> Array:
        """φ''(zᵢ)."""

    def _root(self, outputs: Events) -> Array:
        return _floored_sqrt(self._curvature(_wide(outputs)), outputs.dtype)

    def _arguments(self, outputs: Events, targets: Array) -> tuple[Array, Array]:
        z = _wide(outputs)
        y = targets.astype(z.dtype)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            low, high = self._support
            y = jnp.where((low <= y) & (y <= high), y, jnp.nan)
        return z, y

    def value(self, outputs: Events, targets: Targets) -> Array:
        terms = self._terms(*self._arguments(outputs, targets))
        return jnp.sum(terms, axis=tuple(range(len(self.lead_shape(outputs)), outputs.ndim)))

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        return self._slopes(*self._arguments(outputs, targets)).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return (self._curvature(_wide(outputs)) * _wide(vector)).astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self.hessian_product(outputs, targets, vector)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events:
        slopes = self._slopes(*self._arguments(outputs, targets))
        return (slopes / self._root(outputs)).astype(outputs.dtype)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        _check_array("targets", targets)
        _check_shape("targets", targets, tuple(outputs.shape), "the shape of the outputs")
        _check_range("targets", targets, *self._support)


class SquaredError(_AbstractElementwiseLoss):
    """½‖z − y‖², or ‖z − y‖² with `half=False`, summed over the event.

    As a likelihood: y ~ N(z, I), or N(z, I/2) with `half=False`.
    """

    half: bool = eqx.field(default=True, static=True)
    event_ndim: int | None = eqx.field(default=None, static=True)
    convex: bool = eqx.field(default=True, static=True, init=False)
    _support: ClassVar[tuple[int | float, int | float]] = (-np.inf, np.inf)

    def _terms(self, z, y):
        return (0.5 if self.half else 1.0) * (z - y) ** 2

    def _slopes(self, z, y):
        return (1.0 if self.half else 2.0) * (z - y)

    def _curvature(self, z):
        return jnp.full_like(z, 1.0 if self.half else 2.0)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        z = _wide(outputs)
        # Not rounded to bfloat16: at |z| ≫ 1 that would lose the noise, hence the Fisher.
        return z + jax.random.normal(key, z.shape, z.dtype) / self._root(z)


class SigmoidCrossEntropy(_AbstractElementwiseLoss):
    """Σᵢ log(1 + e^{zᵢ}) − yᵢ zᵢ: independent binary labels y in [0, 1], outputs z are logits."""

    event_ndim: int | None = eqx.field(default=None, static=True)
    convex: bool = eqx.field(default=True, static=True, init=False)
    _support: ClassVar[tuple[int | float, int | float]] = (0, 1)

    def _terms(self, z, y):
        # softplus(z) − y z would cancel for large z; for y in {0, 1} one of the two terms is 0.
        return y * jax.nn.softplus(-z) + (1.0 - y) * jax.nn.softplus(z)

    def _slopes(self, z, y):
        return (1.0 - y) * jax.nn.sigmoid(z) - y * jax.nn.sigmoid(-z)  # σ(z) − y, uncancelled

    def _curvature(self, z):
        return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        z = _wide(outputs)
        return jax.random.bernoulli(key, jax.nn.sigmoid(z)).astype(z.dtype)


class Poisson(_AbstractElementwiseLoss):
    """Σᵢ e^{zᵢ} − yᵢ zᵢ: counts y ≥ 0, outputs z are log rates. The constant log y! is left out.

    `sample` needs a threefry key, as `jax.random.poisson` does, and saturates at the largest
    integer that JAX is configured for.
    """

    event_ndim: int | None = eqx.field(default=None, static=True)
    convex: bool = eqx.field(default=True, static=True, init=False)
    _support: ClassVar[tuple[int | float, int | float]] = (0, np.inf)

    def _terms(self, z, y):
        return jnp.exp(z) - y * z

    def _slopes(self, z, y):
        return jnp.exp(z) - y

    def _curvature(self, z):
        return jnp.exp(z)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        z = _wide(outputs)
        return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)


class SoftmaxCrossEntropy(AbstractLoss):
    """−Σ_c y_c log softmax(z)_c over the classes c, the last axis of the outputs.

    Targets are integer labels of shape (*lead,), or real labels y ≥ 0 of the outputs' shape
    (one-hot or soft). The latter need not sum to one: with s = Σ_c y_c and p = softmax(z),
    ∇ℓ = s p − y and ∇²ℓ = s (diag p − p pᵀ). Logits of −∞ (masked classes) are allowed for
    classes with y_c = 0. An integer that names no class makes every result of its event NaN.

    `sample` draws integer labels, whose Fisher information is that of s = 1.
    """

    event_ndim: int | None = eqx.field(default=1, static=True, init=False)
    convex: bool = eqx.field(default=True, static=True, init=False)

    def _labels(self, z: Array, targets: Array) -> tuple[Array, Array]:
        """The labels y, (*lead, classes), and their sums s, (*lead, 1)."""
        if jnp.issubdtype(targets.dtype, jnp.integer):
            # Compared, not gathered: an index would be clamped or wrapped, and XLA fuses the
            # comparison into the sum over classes, also where these are sharded.
            label = targets.astype(np.promote_types(targets.dtype, np.int32))[..., None]
            named = (label >= 0) & (label < z.shape[-1])
            hit = label == jax.lax.broadcasted_iota(label.dtype, z.shape, z.ndim - 1)
            # Selected, not multiplied: XLA takes NaN · 0 for 0 where it knows the 0.
            y, s = (jnp.where(named, x.astype(z.dtype), jnp.nan) for x in (hit, named))
            return y, s
        y = targets.astype(z.dtype)
        return y, jnp.sum(y, axis=-1, keepdims=True)

    def _sqrt_parts(self, outputs: Events, targets: Array) -> tuple[Array, Array, Array]:
        """p, d = √p and √s, with which S = √s (I − p 1ᵀ) diag(d)."""
        z = _wide(outputs)
        p = jax.nn.softmax(z, axis=-1)
        return p, _floored_sqrt(p, outputs.dtype), jnp.sqrt(self._labels(z, targets)[1])

    def value(self, outputs: Events, targets: Targets) -> Array:
        z = _wide(outputs)
        y, _ = self._labels(z, targets)
        # 0 log 0 = 0: a masked class costs nothing.
        return -jnp.sum(jnp.where(y == 0, 0.0, y * jax.nn.log_softmax(z, axis=-1)), axis=-1)

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        z = _wide(outputs)
        y, s = self._labels(z, targets)
        return (s * jax.nn.softmax(z, axis=-1) - y).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        z, v = _wide(outputs), _wide(vector)
        p = jax.nn.softmax(z, axis=-1)
        _, s = self._labels(z, targets)
        return (s * p * (v - jnp.sum(p * v, axis=-1, keepdims=True))).astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self.hessian_product(outputs, targets, vector)

    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        p, d, root_s = self._sqrt_parts(outputs, targets)
        du = d * _wide(coordinates)
        return (root_s * (du - p * jnp.sum(du, axis=-1, keepdims=True))).astype(outputs.dtype)

    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        p, d, root_s = self._sqrt_parts(outputs, targets)
        v = _wide(vector)
        return (root_s * d * (v - jnp.sum(p * v, axis=-1, keepdims=True))).astype(outputs.dtype)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events:
        y, s = self._labels(_wide(outputs), targets)
        p, d, root_s = self._sqrt_parts(outputs, targets)
        # r = ∇ℓ / (√s d): S r = ∇ℓ − p (1ᵀ∇ℓ), and 1ᵀ∇ℓ = s − s = 0. With s = 0, ∇ℓ = 0 = r.
        r = (s * p - y) / (jnp.where(s == 0, 1.0, root_s) * d)
        return r.astype(outputs.dtype)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        return jax.random.categorical(key, _wide(outputs), axis=-1)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        _check_array("targets", targets)
        shape = tuple(outputs.shape)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            _check_shape("targets", targets, shape[:-1], "one integer label for each event")
            _check_range("targets", targets, 0, shape[-1] - 1)
        else:
            why = "the shape of the outputs; labels of one axis less must have an integer dtype"
            _check_shape("targets", targets, shape, why)
            _check_range("targets", targets, 0, np.inf)


class Gaussian(_AbstractDiagonalLoss):
    """½ Σᵢ ρᵢ + (yᵢ − μᵢ)² e^{−ρᵢ}: a normal distribution with learned variance e^ρ.

    The last axis of the outputs is (μ₁ … μ_k, ρ₁ … ρ_k), that of the targets is k. ℓ is not
    convex; the curvature S Sᵀ is the Fisher information E_y[∇²ℓ] = diag(e^{−ρ}, ½).
    """

    event_ndim: int | None = eqx.field(default=1, static=True, init=False)
    convex: bool = eqx.field(default=False, static=True, init=False)

    def _root(self, outputs: Events) -> Array:
        _, rho = jnp.split(_wide(outputs), 2, axis=-1)
        return jnp.concatenate([jnp.exp(-0.5 * rho), jnp.full_like(rho, 0.5**0.5)], axis=-1)

    def _residual(self, outputs: Events, targets: Array) -> tuple[Array, Array, Array]:
        """ε = (y − μ) e^{−ρ/2}, e^{−ρ/2} and ρ. No e^{−ρ}: it overflows before ε² does."""
        mean, rho = jnp.split(_wide(outputs), 2, axis=-1)
        scale = jnp.exp(-0.5 * rho)
        return (targets.astype(mean.dtype) - mean) * scale, scale, rho

    def value(self, outputs: Events, targets: Targets) -> Array:
        error, _, rho = self._residual(outputs, targets)
        return 0.5 * jnp.sum(rho + error**2, axis=-1)

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        error, scale, _ = self._residual(outputs, targets)
        parts = [-error * scale, 0.5 * (1.0 - error**2)]
        return jnp.concatenate(parts, axis=-1).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        # ∂²ℓ/∂μ² = e^{−ρ}, ∂²ℓ/∂μ∂ρ = (y − μ) e^{−ρ}, ∂²ℓ/∂ρ² = ½ (y − μ)² e^{−ρ}.
        error, scale, _ = self._residual(outputs, targets)
        v_mean, v_rho = jnp.split(_wide(vector), 2, axis=-1)
        parts = [
            scale * (scale * v_mean + error * v_rho),
            error * (scale * v_mean + 0.5 * error * v_rho),
        ]
        return jnp.concatenate(parts, axis=-1).astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return (self._root(outputs) ** 2 * _wide(vector)).astype(outputs.dtype)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> Events:
        error, _, _ = self._residual(outputs, targets)
        parts = [-error, 0.5**0.5 * (1.0 - error**2)]  # ∇ℓ / (e^{−ρ/2}, √½), never divided
        return jnp.concatenate(parts, axis=-1).astype(outputs.dtype)

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Array:
        mean, rho = jnp.split(_wide(outputs), 2, axis=-1)
        return mean + jnp.exp(0.5 * rho) * jax.random.normal(key, mean.shape, mean.dtype)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        _check_array("targets", targets)
        *lead, size = outputs.shape
        if size % 2:
            wanted = "a last axis of even size (means, then log variances)"
            raise ValueError(f"outputs: got shape {tuple(outputs.shape)}, wanted {wanted}")
        _check_shape("targets", targets, (*lead, size // 2), "half the last axis of the outputs")


class CustomLoss(AbstractLoss):
    """A user's function `fn(event_outputs, event_targets) -> scalar`, by automatic differentiation.

    `fn` sees one event: outputs of the trailing `event_ndim` axes, and a pytree of targets whose
    leaves have lost the lead axes, all in float32 if they were narrower. With `convex=False` the
    curvature is ∇²ℓ with its negative eigenvalues set to zero, as in S always.
    `sampler(key, event_outputs)` draws the targets of one event; without it `sample` **raises**
    `ValueError`.

    S is the symmetric root V √max(Λ, 0) Vᵀ of the dense Hessian of an event, found by `eigh`: it
    is unique, where V alone could differ between two compilations. It costs n² memory and n³
    work for events of n entries.

    The functions are static, hence compared by identity: define them once, because a new lambda
    retraces.
    """

    fn: Callable[[Any, Any], Any] = eqx.field(static=True)
    event_ndim: int | None = eqx.field(default=1, static=True)
    convex: bool = eqx.field(default=True, static=True)
    sampler: Callable[[Any, Any], Any] | None = eqx.field(default=None, static=True)

    def _over_events(self, event_fn: Callable, outputs: Array, *others: Any) -> Any:
        for _ in self.lead_shape(outputs):
            event_fn = jax.vmap(event_fn)
        return event_fn(*jax.tree.map(_wide, (outputs, *others)))

    def value(self, outputs: Events, targets: Targets) -> Array:
        values = self._over_events(self.fn, outputs, targets)
        return values.astype(_wide(outputs).dtype)

    def gradient(self, outputs: Events, targets: Targets) -> Events:
        return self._over_events(jax.grad(self.fn), outputs, targets).astype(outputs.dtype)

    def hessian_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        def event_product(z, y, v):
            return jax.jvp(lambda z: jax.grad(self.fn)(z, y), (z,), (v,))[1]

        product = self._over_events(event_product, outputs, targets, vector)
        return product.astype(outputs.dtype)

    def _spectral_product(self, outputs, targets, vector, function: Callable) -> Array:
        """V f(max(Λ, 0)) Vᵀ v, where ∇²ℓ = V Λ Vᵀ."""

        def event_product(z, y, v):
            hessian = jax.hessian(self.fn)(z, y).reshape(z.size, z.size)
            eigenvalues, basis = jnp.linalg.eigh(hessian)
            inner = jnp.matmul(basis.T, v.reshape(-1), precision=jax.lax.Precision.HIGHEST)
            inner = function(jnp.maximum(eigenvalues, 0.0)) * inner
            return jnp.matmul(basis, inner, precision=jax.lax.Precision.HIGHEST).reshape(z.shape)

        product = self._over_events(event_product, outputs, targets, vector)
        return product.astype(outputs.dtype)

    def fisher_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        if self.convex:
            return self.hessian_product(outputs, targets, vector)
        return self._spectral_product(outputs, targets, vector, lambda x: x)

    def sqrt_product(self, outputs: Events, targets: Targets, coordinates: Events) -> Events:
        return self._spectral_product(outputs, targets, coordinates, jnp.sqrt)

    def sqrt_transpose_product(self, outputs: Events, targets: Targets, vector: Events) -> Events:
        return self._spectral_product(outputs, targets, vector, jnp.sqrt)

    def gradient_coordinates(self, outputs: Events, targets: Targets) -> None:
        return None

    def sample(self, key: PRNGKeyArray, outputs: Events) -> Targets:
        if self.sampler is None:
            wanted = "a function (key, event_outputs) -> event_targets, to draw targets with"
            raise ValueError(f"sampler: got None, wanted {wanted}")
        sampler = self.sampler
        keys = jax.random.split(key, self.lead_shape(outputs))
        return self._over_events(lambda z, key: sampler(key, z), outputs, keys)

    def check(self, outputs: Any, targets: Any) -> None:
        self._check_outputs(outputs)
        lead = self.lead_shape(outputs)
        for path, leaf in jax.tree_util.tree_leaves_with_path(targets):
            name = f"targets{jax.tree_util.keystr(path)}"
            if not hasattr(leaf, "shape"):
                raise ValueError(f"{name}: got {type(leaf).__name__}, wanted an array")
            seen = tuple(leaf.shape)
            if seen[: len(lead)] != lead:
                wanted = f"({', '.join(map(str, lead))}, ...), the lead axes of the outputs first"
                raise ValueError(f"{name}: got shape {seen}, wanted {wanted}")
        events = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[len(lead) :], x.dtype), (outputs, targets)
        )
        result = jax.eval_shape(lambda z, y: self.fn(*jax.tree.map(_wide, (z, y))), *events)
        _check_array("fn's result", result, floating=True)
        _check_shape("fn's result", result, (), "a scalar for each event")
