"""The curvature of a loss in the space of the model's outputs: the C of JᵀCJ.

C is block-diagonal over events, positive semidefinite, and includes the events' coefficients.
Coordinates of its square root, C = R Rᵀ, are the *rows* of the row-space view
JᵀCJ = U Uᵀ with U = JᵀR; a row belongs to one example, so that the batch axis comes first.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from curvax.batch import weigh
from curvax.linearisation import Linearisation
from curvax.losses import AbstractLoss


class AbstractOutputMetric(eqx.Module):
    """C and its square root R. `outputs` below stands for the shape of the model's outputs."""

    @abc.abstractmethod
    def product(self, vector: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """C u."""

    @abc.abstractmethod
    def sqrt(self, rows: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """R r, from row coordinates to outputs."""

    @abc.abstractmethod
    def sqrt_transpose(self, vector: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        """Rᵀ u, from outputs to row coordinates."""

    @abc.abstractmethod
    def gradient_rows(self) -> Float[Array, "batch ..."] | None:
        """r with R r = c·∇ℓ, the loss's weighted gradient in the outputs; None if there is none.

        Where there is one, the gradient of the objective lies in the span of the rows.
        """

    @abc.abstractmethod
    def rows_structure(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of row coordinates."""


class LossMetric(AbstractOutputMetric):
    """C_e = c_e ∇²ℓ(z_e), or its expectation for a loss that is not convex."""

    loss: AbstractLoss
    linearisation: Linearisation

    def product(self, vector: Array) -> Array:
        at = self.linearisation
        return weigh(at.coefficients, self.loss.fisher_product(at.outputs, at.targets, vector))

    def sqrt(self, rows: Array) -> Array:
        at = self.linearisation
        return weigh(
            jnp.sqrt(at.coefficients), self.loss.sqrt_product(at.outputs, at.targets, rows)
        )

    def sqrt_transpose(self, vector: Array) -> Array:
        at = self.linearisation
        return weigh(
            jnp.sqrt(at.coefficients),
            self.loss.sqrt_transpose_product(at.outputs, at.targets, vector),
        )

    def gradient_rows(self) -> Array | None:
        at = self.linearisation
        rows = self.loss.gradient_coordinates(at.outputs, at.targets)
        return None if rows is None else weigh(jnp.sqrt(at.coefficients), rows)

    def rows_structure(self) -> jax.ShapeDtypeStruct:
        outputs = self.linearisation.outputs
        return jax.ShapeDtypeStruct(outputs.shape, outputs.dtype)


class ScoreMetric(AbstractOutputMetric):
    """C_e = c_e · mean over s of g_es g_esᵀ, for scores g = ∇ℓ with given or sampled targets."""

    scores: Float[Array, "samples batch ..."]
    coefficients: Float[Array, "..."]
    event_axes: tuple[int, ...] = eqx.field(static=True)

    @staticmethod
    def from_targets(loss: AbstractLoss, at: Linearisation) -> "ScoreMetric":
        """The empirical metric: scores of the targets of the batch."""
        scores = loss.gradient(at.outputs, at.targets)[None]
        return ScoreMetric(scores, at.coefficients, _event_axes(loss, at))

    @staticmethod
    def from_samples(
        loss: AbstractLoss, at: Linearisation, key: PRNGKeyArray, samples: int
    ) -> "ScoreMetric":
        """The Monte Carlo metric: scores of targets drawn from the model's predictions."""

        def score(key: PRNGKeyArray) -> Array:
            # The draw is data, not a function of the parameters to differentiate through.
            targets = jax.lax.stop_gradient(loss.sample(key, at.outputs))
            return loss.gradient(at.outputs, targets)

        scores = jax.vmap(score)(jax.random.split(sampling_key(key), samples))
        return ScoreMetric(scores, at.coefficients, _event_axes(loss, at))

    def _share(self) -> Array:
        return self.coefficients / self.scores.shape[0]

    def product(self, vector: Array) -> Array:
        along = jnp.sum(self.scores * vector[None], axis=self._axes(1), keepdims=True)
        return weigh(self._share(), jnp.sum(self.scores * along, axis=0))

    def sqrt(self, rows: Array) -> Array:
        rows = jnp.moveaxis(rows, 1, 0)
        rows = rows.reshape(rows.shape + (1,) * len(self.event_axes))
        return weigh(jnp.sqrt(self._share()), jnp.sum(self.scores * rows, axis=0))

    def sqrt_transpose(self, vector: Array) -> Array:
        along = jnp.sum(self.scores * vector[None], axis=self._axes(1))
        # Weighed last: the scores of a masked event may be NaN.
        return jax.vmap(weigh, (None, 0), 1)(jnp.sqrt(self._share()), along)

    def gradient_rows(self) -> Array | None:
        return None

    def rows_structure(self) -> jax.ShapeDtypeStruct:
        samples, batch, *rest = self.scores.shape
        lead = rest[: len(rest) - len(self.event_axes)]
        return jax.ShapeDtypeStruct((batch, samples, *lead), self.scores.dtype)

    def _axes(self, shift: int) -> tuple[int, ...]:
        return tuple(axis + shift for axis in self.event_axes)


def sampling_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """The key for drawing targets, apart from the one that the model's own randomness uses."""
    return jax.random.fold_in(key, 1)


def _event_axes(loss: AbstractLoss, at: Linearisation) -> tuple[int, ...]:
    lead = len(loss.lead_shape(at.outputs))
    return tuple(range(lead, at.outputs.ndim))
