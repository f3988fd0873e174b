"""What is being minimised: a model, a loss on its outputs, and how examples are averaged.

Everything that curvax derives (gradients, curvature products, statistics) is derived from an
[`Objective`][curvax.Objective], and every scale is declared here, once.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from curvax import _tree
from curvax._masked import is_masked, keep_unmasked, unmask
from curvax._sharding import gathered
from curvax.batch import Batch, Example, share, taken_apart, weigh
from curvax.linearisation import Linearisation
from curvax.losses import AbstractLoss

Params = PyTree[Any]


class Objective(eqx.Module):
    """A model's loss over a batch.

    The objective is

        f(θ) = Σ_e c_e ℓ(z_e(θ), y_e) + ½·l2·‖θ‖²

    where an *event* e is what the loss scores at once: one row of class scores, or the whole
    output of one example for a squared error (see `event_ndim` of the losses). A sequence model
    under a softmax loss has batch × length events. The coefficients are

    - `reduction="mean"`: c_e = w_e / Σ w, so f is the weighted mean over all events;
    - `reduction="sum"`: c_e = w_e.

    Weights w (all one if none are given) come with the batch; a zero masks an event. A batch
    whose weights are all zero has f = ½·l2·‖θ‖².

    **Arguments:**

    - `predict`: `predict(model, x) -> outputs` for *one* example; curvax adds the batch axis.
      `outputs` is one floating-point array of any rank.
    - `loss`: an [`AbstractLoss`][curvax.AbstractLoss].
    - `reduction`: `"mean"` or `"sum"`.
    - `l2`: coefficient of ½‖θ‖², not divided by the number of events.
    - `stochastic`: if true, `predict(model, x, key)` gets a key of its own for each example
      (dropout), and every call that evaluates the objective needs a `key`.
    - `split`: `split(batch) -> (x, target)` or `(x, target, weight)`. By default a batch is such
      a tuple, or a mapping with the keys `"x"`, `"y"` and optionally `"weight"`. Every leaf of x
      has the batch axis first; a weight has the shape (batch,) or that of the loss's values.
    - `static`: the part of the model that is not trained, as returned by `eqx.partition`. Give it
      where only the trained part travels, as in an existing Optax loop over
      `eqx.filter(model, eqx.is_inexact_array)`, or to freeze leaves.
    - `example`: a batch, or its shapes, of which only the shapes are kept. Methods that must know
      the layers of a model before its first step (K-FAC) ask for it.

    **Raises** `ValueError` for an unknown reduction, and when evaluated on a batch that the model
    or the loss cannot take: the message names the argument, what was seen and what was wanted.
    """

    predict: Callable[..., Array] = eqx.field(static=True)
    loss: AbstractLoss
    reduction: Literal["mean", "sum"] = eqx.field(static=True)
    l2: float = eqx.field(static=True)
    stochastic: bool = eqx.field(static=True)
    split: Callable[[Batch], tuple] | None = eqx.field(static=True)
    frozen: PyTree[Array]
    skeleton: tuple[tuple[Any, ...], Any] = eqx.field(static=True)
    shapes: tuple[tuple[Any, ...], Any] | None = eqx.field(static=True)

    def __init__(
        self,
        predict: Callable[..., Array],
        loss: AbstractLoss,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        l2: float = 0.0,
        stochastic: bool = False,
        split: Callable[[Batch], tuple] | None = None,
        static: PyTree[Any] = None,
        example: Batch = None,
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: got {reduction!r}, wanted 'mean' or 'sum'.")
        self.predict = predict
        self.loss = loss
        self.reduction = reduction
        self.l2 = l2
        self.stochastic = stochastic
        self.split = split
        # Arrays are ordinary leaves; what is left (functions, sizes) is kept flat, so that it is
        # hashable and an objective passes through jit, scan and vmap like any array.
        self.frozen, skeleton = eqx.partition(static, _tree.is_array)
        self.skeleton = _tree.freeze(skeleton)
        self.shapes = None
        if example is not None:
            self.shapes = _tree.freeze(jax.tree.map(_shape_of, self.example(example).x))

    # -- the model ---------------------------------------------------------------------------

    def bind(self, model: PyTree[Any]) -> tuple[Params, "Objective"]:
        """Splits a model into its trained parameters and an objective over just those.

        Parameters are the inexact array leaves. **Raises** `ValueError` if there are none.
        """
        params, static = eqx.partition(model, is_parameter)
        if not any(leaf.size for leaf in jax.tree.leaves(params)):
            raise ValueError(
                "model: got no trainable leaf, wanted at least one non-empty floating-point array. "
                f"Leaves seen: {_tree.described(model)}."
            )
        if not jax.tree.leaves(static):
            return params, self
        return params, self._with_static(static)

    @property
    def static(self) -> PyTree[Any]:
        """The part of the model that is not trained."""
        return eqx.combine(self.frozen, _tree.thaw(self.skeleton))

    def model(self, params: Params) -> PyTree[Any]:
        """The whole model again, from its trained part."""
        if not jax.tree.leaves(self.static):
            return params
        return eqx.combine(unmask(params), self.static)

    def restrict(self, params: Params, template: PyTree[Any]) -> tuple[Params, "Objective"]:
        """The same objective over only those parameters that `template` does not mask.

        `template` is what `optax.masked` hands to an inner transformation: the parameters with
        `optax.MaskedNode()` in place of each leaf (or subtree) that takes no part.
        """
        kept = keep_unmasked(template, params)
        frozen = jax.tree.map(
            lambda t, p: p if is_masked(t) else jax.tree.map(lambda _: None, p),
            template,
            params,
            is_leaf=is_masked,
        )
        return kept, self._with_static(frozen)

    def without_l2(self) -> "Objective":
        """The same objective with no l2 term."""
        return self.scaled_l2(0.0)

    def scaled_l2(self, factor: float) -> "Objective":
        """The same objective with so many times its l2 term."""
        return self._with(l2=factor * self.l2)

    def _with_static(self, static: PyTree[Any]) -> "Objective":
        if jax.tree.leaves(self.static):
            static = eqx.combine(static, self.static)
        return self._with(static=static)

    def _with(self, **changes: Any) -> "Objective":
        fields = {
            "reduction": self.reduction,
            "l2": self.l2,
            "stochastic": self.stochastic,
            "split": self.split,
            "static": self.static,
        }
        new = Objective(self.predict, self.loss, **(fields | changes))
        object.__setattr__(new, "shapes", self.shapes)
        return new

    @property
    def inputs(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The shapes of the x of `example`, batch axis first.

        **Raises** `ValueError` if no example was given.
        """
        if self.shapes is None:
            raise ValueError(
                "objective: this method must know the model's layers before the first step, and "
                "no batch was shown to it yet: pass Objective(..., example=batch) (a batch, or its "
                "shapes)."
            )
        return _tree.thaw(self.shapes)

    # -- one batch ---------------------------------------------------------------------------

    def example(self, batch: Batch) -> Example:
        """Takes a batch apart. **Raises** `ValueError` if it cannot."""
        return taken_apart(batch, self.split)

    def outputs(self, params: Params, x: PyTree[Any], key: PRNGKeyArray | None = None) -> Array:
        """The model's outputs on a batch of inputs."""
        keys = self.example_keys(x, key)
        return jax.vmap(lambda one, k: self.predict_one(params, one, k))(x, keys)

    def predict_one(self, params: Params, x: PyTree[Any], key: PRNGKeyArray | None) -> Array:
        """The model's outputs for one example."""
        model = self.model(params)
        return self.predict(model, x, key) if self.stochastic else self.predict(model, x)

    def example_keys(self, x: PyTree, key: PRNGKeyArray | None) -> Array | None:
        """A key for each example, for a stochastic objective."""
        if not self.stochastic:
            return None
        if key is None:
            raise ValueError(
                "key: got None, but this objective is stochastic: pass key=jax.random.key(...)."
            )
        return jax.random.split(key, jax.tree.leaves(x)[0].shape[0])

    def check(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> jax.ShapeDtypeStruct:
        """Checks a batch against model and loss without computing anything; returns the shape of
        the outputs.

        Shapes and dtypes are always checked; values of targets only where they are concrete.
        **Raises** `ValueError` naming the argument, what was seen and what was wanted.
        """
        example = self.example(batch)
        try:
            outputs = jax.eval_shape(self.outputs, params, example.x, key)
        except (AttributeError, TypeError, ValueError) as error:
            if "key:" in str(error):
                raise
            one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), example.x)
            raise self.inapplicable(params, one, error) from error
        if not isinstance(outputs, jax.ShapeDtypeStruct):
            raise ValueError(
                f"outputs: got a {type(outputs).__name__} from predict, wanted one array."
            )
        self.loss.check(outputs, example.target)
        if example.weight is not None:
            values = jax.eval_shape(self.loss.value, outputs, example.target)
            if example.weight.shape not in (values.shape, values.shape[:1]):
                raise ValueError(
                    f"weight: got shape {example.weight.shape}, wanted {values.shape[:1]} (one an "
                    f"example) or {values.shape} (one an event)."
                )
        return outputs

    def inapplicable(self, params: Params, x: PyTree[Any], error: Exception) -> ValueError:
        """What to say where the model cannot be applied to one example x."""
        leaves, hint = jax.tree.leaves(params), ""
        holes = len(jax.tree.leaves(params, is_leaf=lambda a: a is None)) > len(leaves)
        if any(not _tree.is_array(leaf) and not hasattr(leaf, "dtype") for leaf in leaves):
            hint = (
                " The parameters have leaves that are no arrays: give the trained part alone, "
                "eqx.filter(model, eqx.is_inexact_array), and the rest as Objective(..., static=…)"
                ", or the whole model to curvax.make_step(optimizer, method).init(model)."
            )
        elif holes and not jax.tree.leaves(self.static):
            hint = (
                " The parameters have None where the model has leaves that are not trained: pass "
                "Objective(..., static=eqx.partition(model, eqx.is_inexact_array)[1]), or give the "
                "whole model to curvax.make_step(optimizer, method).init(model)."
            )
        return ValueError(
            "x: the model could not be applied to one example with leaves "
            f"{_tree.described(x)}.{hint} It said: {error}"
        )

    def coefficients(self, example: Example, values: PyTree) -> Float[Array, "..."]:
        """The coefficient c_e of each event, from the shape of the loss's values."""
        if example.weight is None:
            count = 1.0 if self.reduction == "sum" else float(max(values.size, 1))
            return jnp.asarray(1.0 / count, values.dtype)
        weight = example.weight.astype(values.dtype)
        weight = weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim))
        weight = jnp.broadcast_to(weight, values.shape)
        if self.reduction == "sum":
            return weight
        return share(weight, jnp.sum(weight))

    def total_weight(self, batch: Batch, values: PyTree) -> Scalar:
        """Σ w over the events of a batch: its share in a mean over several batches."""
        example = self.example(batch)
        if example.weight is None:
            return jnp.asarray(values.size, values.dtype)
        return jnp.sum(example.weight.astype(values.dtype)) * (values.size / example.weight.size)

    # -- evaluation --------------------------------------------------------------------------

    def value(self, params: Params, batch: Batch, key: PRNGKeyArray | None = None) -> Scalar:
        """f(θ) on a batch."""
        self.check(params, batch, key)
        example = self.example(batch)
        return self._reduce(params, example, self.outputs(params, example.x, key))

    def _reduce(self, params: Params, example: Example, outputs: Array) -> Scalar:
        values = self.loss.value(outputs, jax.tree.map(jnp.asarray, example.target))
        coefficients = self.coefficients(example, values)
        value = jnp.sum(weigh(coefficients, values))
        return value + self._l2_value(params, value.dtype)

    def _l2_value(self, params: Params, dtype) -> Scalar:
        if self.l2 == 0.0:
            return jnp.zeros((), dtype)
        return (0.5 * self.l2 * _tree.dot(params, params)).astype(dtype)

    def linearise(
        self, params: Params, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Linearisation:
        """The model on a batch, linearised at θ: one forward pass."""
        self.check(params, batch, key)
        example = self.example(batch)
        outputs, tangent = jax.linearize(lambda p: self.outputs(p, example.x, key), params)
        return self.linearised(params, example, outputs, tangent)

    def linearised(
        self, params: Params, example: Example, outputs: Array, tangent: Callable[[Params], Array]
    ) -> Linearisation:
        """A linearisation, from outputs and a linear map that are already there."""
        target = jax.tree.map(jnp.asarray, example.target)
        values = jax.eval_shape(self.loss.value, outputs, target)
        return Linearisation(params, outputs, target, self.coefficients(example, values), tangent)

    def value_of(self, linearisation: Linearisation, batch: Batch) -> Scalar:
        """f(θ), from outputs that are already there."""
        return self._reduce(linearisation.params, self.example(batch), linearisation.outputs)

    def gradient_of(self, linearisation: Linearisation) -> Params:
        """∇f(θ) = Jᵀ(c·∇ℓ) + l2·θ: one backward pass from a linearisation."""
        product = linearisation.vjp(self.score_of(linearisation))
        return self.add_l2(product, linearisation.params)

    def score_of(self, linearisation: Linearisation) -> Array:
        """c·∇ℓ, the cotangent of the outputs that Jᵀ takes to the gradient without l2."""
        outputs = linearisation.outputs
        # Weighed before they are rounded to the outputs' dtype: once, and with autodiff's kernels.
        wide = outputs.astype(_tree.accumulation_dtype(outputs.dtype))
        scores = weigh(linearisation.coefficients, self.loss.gradient(wide, linearisation.targets))
        if scores.dtype == outputs.dtype:
            return scores
        # Else XLA keeps the wide scores beside the rounded ones, for statistics of them.
        return jax.lax.optimization_barrier(scores.astype(outputs.dtype))

    def add_l2(self, product: Params, vector: Params) -> Params:
        """Adds the l2 term's share, l2·v, to a product."""
        return _tree.add_scaled(product, self.l2, vector) if self.l2 else product

    def pull_back_example(
        self, params: Params, x: PyTree[Array], cotangent: Array, key: PRNGKeyArray | None = None
    ) -> Params:
        """Jᵀu of one example."""
        _, vjp = jax.vjp(lambda p: self.predict_one(p, x, key), params)
        return vjp(cotangent)[0]

    def pull_back_examples(
        self,
        params: Params,
        x: PyTree[Array],
        cotangents: Float[Array, "columns batch ..."],
        key: PRNGKeyArray | None = None,
    ) -> PyTree[Float[Array, "batch columns ..."]]:
        """Jᵢᵀuᵢ of each example i by itself, for several columns of cotangents u.

        The result holds batch × columns gradients of the size of the parameters.
        """
        params = gathered(params, (x, cotangents))

        def one(x: PyTree[Array], cotangents: Array, key: PRNGKeyArray | None) -> Params:
            return jax.vmap(lambda u: self.pull_back_example(params, x, u, key))(cotangents)

        return jax.vmap(one, (0, 1, 0))(x, cotangents, self.example_keys(x, key))


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf of a model is trained: a floating-point array, or the shape of one."""
    array = _tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
    return array and jnp.issubdtype(leaf.dtype, jnp.inexact)
