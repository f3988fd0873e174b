"""Curvature of an objective: Hessian, Gauss-Newton, Fisher, and the Jacobian behind them.

Each operator can be built on a model and a batch and be handed around as a pytree of arrays; a
product then does its own forward pass. `lineax.linearise` (which every iterative solver calls)
does that pass once and keeps its residuals.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from curvax import _tree
from curvax._checks import check_count
from curvax._masked import Embedded, keep_unmasked
from curvax._sharding import sharded_as
from curvax.batch import Batch
from curvax.linearisation import Linearisation
from curvax.objective import Objective, Params
from curvax.operators.base import AbstractOperator, AbstractSymmetricOperator, Transpose
from curvax.operators.metric import AbstractOutputMetric, LossMetric, ScoreMetric
from curvax.operators.rows import row_gram


class AbstractCurvature(AbstractSymmetricOperator):
    """A symmetric operator over the parameters of an objective, at one point, on one batch."""

    objective: eqx.AbstractVar[Objective]
    params: eqx.AbstractVar[PyTree[Any]]
    batch: eqx.AbstractVar[Batch]
    key: eqx.AbstractVar[PRNGKeyArray | None]

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return _tree.structure(self.params)

    @abc.abstractmethod
    def restrict(self, template: PyTree[Any]) -> "AbstractCurvature":
        """The block of those parameters that `template` does not mask (see `optax.masked`)."""


class Hessian(AbstractCurvature):
    """∇²f of the objective on a batch (Pearlmutter 1994, here forward over reverse).

    **Arguments:** `objective`; `params`: the model, or its trained part; `batch`; and a `key` if
    the objective is stochastic. Nothing of size n × n is formed.
    """

    objective: Objective
    params: PyTree[Any]
    batch: Batch
    key: PRNGKeyArray | None = None
    tangent: Callable[[Params], Params] | None = None

    def __post_init__(self):
        self.params, self.objective = self.objective.bind(self.params)

    def _gradient(self, params: Params) -> Params:
        return jax.grad(lambda p: self.objective.value(p, self.batch, self.key))(params)

    def linearise(self) -> "Hessian":
        if self.tangent is not None:
            return self
        _, tangent = jax.linearize(self._gradient, self.params)
        return dataclasses.replace(self, tangent=tangent)

    def mv(self, vector: Params) -> Params:
        vector = _tree.cast(vector, self.params)
        if self.tangent is not None:
            return self.tangent(vector)
        return jax.jvp(self._gradient, (self.params,), (vector,))[1]

    def restrict(self, template: PyTree[Any]) -> "Hessian":
        params, objective = self.objective.restrict(self.params, template)
        tangent = self.tangent
        if tangent is not None:
            tangent = _RestrictedTangent(tangent, self.params, template)
        return dataclasses.replace(self, objective=objective, params=params, tangent=tangent)


class _RestrictedTangent(eqx.Module):
    embedded: Embedded
    template: PyTree[Any]

    def __init__(self, tangent: Callable[[Params], Params], params: Params, template: PyTree[Any]):
        self.embedded = Embedded(tangent, _tree.structure(params))
        # Only its structure counts; a leaf stands for "takes part".
        self.template = jax.tree.map(lambda _: jnp.zeros(()), template)

    def __call__(self, vector: Params) -> Params:
        return keep_unmasked(self.template, self.embedded(vector))


class AbstractOutputCurvature(AbstractCurvature):
    """JᵀCJ + l2·I: curvature that passes through the model's outputs."""

    linearisation: eqx.AbstractVar[Linearisation | None]

    @property
    def positive_semidefinite(self) -> bool:
        return True

    @abc.abstractmethod
    def metric(self, linearisation: Linearisation) -> AbstractOutputMetric:
        """The C of JᵀCJ."""

    def linearised(self) -> tuple[Linearisation, AbstractOutputMetric]:
        """The model linearised on the batch, and the metric of its outputs."""
        linearisation = self.linearisation
        if linearisation is None:
            linearisation = self.objective.linearise(self.params, self.batch, self.key)
        return linearisation, self.metric(linearisation)

    def linearise(self) -> "AbstractOutputCurvature":
        return dataclasses.replace(self, linearisation=self.linearised()[0])

    def mv(self, vector: Params) -> Params:
        linearisation, metric = self.linearised()
        pushed = linearisation.jvp(_tree.cast(vector, self.params))
        return self.objective.add_l2(linearisation.vjp(metric.product(pushed)), vector)

    def quadratic_form(self, vector: Params) -> Scalar:
        """vᵀJᵀCJv + l2·‖v‖², by one product with J alone."""
        linearisation, metric = self.linearised()
        pushed = linearisation.jvp(_tree.cast(vector, self.params))
        form = _tree.dot(pushed, metric.product(pushed))
        return form + self.objective.l2 * _tree.dot(vector, vector) if self.objective.l2 else form

    def restrict(self, template: PyTree[Any]) -> "AbstractOutputCurvature":
        params, objective = self.objective.restrict(self.params, template)
        linearisation = self.linearisation
        if linearisation is not None:
            linearisation = linearisation.restrict(template)
        return dataclasses.replace(
            self, objective=objective, params=params, linearisation=linearisation
        )

    def row_gradients(self) -> PyTree[Float[Array, "batch rows ..."]]:
        """Every row of the row-space view: U with JᵀCJ = U Uᵀ.

        One backward pass over the whole batch for each row that an example has; the result holds
        batch × rows gradients.
        """
        x = self.objective.example(self.batch).x
        return self.objective.pull_back_examples(self.params, x, self.row_basis(), self.key)

    def row_gram(self) -> Float[Array, "rows rows"]:
        """UᵀU, the Gram matrix of the rows, which belong to the first example first.

        Costs one backward pass for each row that an example has, and inner products; of the
        weights in matrix products no row is ever written out.
        """
        x = self.objective.example(self.batch).x
        return row_gram(self.objective, self.params, x, self.row_basis(), self.key)

    def row_basis(self) -> Float[Array, "rows batch ..."]:
        """The cotangents of the outputs that stand for each row of an example."""
        _, metric = self.linearised()
        struct = metric.rows_structure()
        count = struct.size // struct.shape[0]
        basis = jnp.eye(count, dtype=struct.dtype).reshape(count, 1, *struct.shape[1:])
        return jax.vmap(lambda row: metric.sqrt(jnp.broadcast_to(row, struct.shape)))(basis)

    def diagonal(self) -> Params:
        """The exact diagonal: the squared rows, summed."""

        def leaf(rows: Array) -> Array:
            return jnp.sum(jnp.square(rows), axis=(0, 1)) + jnp.asarray(
                self.objective.l2, rows.dtype
            )

        entries = jax.tree.map(leaf, self.row_gradients())
        return jax.tree.map(sharded_as, entries, self.params)


class GaussNewton(AbstractOutputCurvature):
    """The generalised Gauss-Newton matrix Σ_e c_e Jₑᵀ ∇²ℓ(z_e) Jₑ + l2·I (Schraudolph 2002).

    For a loss that is not convex in the outputs, the expectation of ∇²ℓ under the model's own
    predictions stands in for it, so that the operator is always positive semidefinite.

    **Arguments:** `objective`; `params`: the model, or its trained part; `batch`; and a `key` if
    the objective is stochastic. A product with the linearised operator costs at most 4/3 of a
    gradient in FLOPs.
    """

    objective: Objective
    params: PyTree[Any]
    batch: Batch
    key: PRNGKeyArray | None = None
    linearisation: Linearisation | None = None

    def __post_init__(self):
        self.params, self.objective = self.objective.bind(self.params)

    def metric(self, linearisation: Linearisation) -> AbstractOutputMetric:
        return LossMetric(self.objective.loss, linearisation)


class Fisher(AbstractOutputCurvature):
    """The Fisher information Σ_e c_e Jₑᵀ E[∇ℓ ∇ℓᵀ] Jₑ + l2·I of the model's predictions.

    **Arguments:** as [`GaussNewton`][curvax.GaussNewton], and

    - `kind`: `"exact"`, the expectation under the model's predictive distribution (type 2; equal
      to the Gauss-Newton matrix for every convex loss of curvax); `"mc"`, its Monte Carlo
      estimate with targets drawn by `key`; or `"empirical"`, with the targets of the batch
      (Kunstner et al. 2019 say what that loses).
    - `samples`: targets drawn for each event, for `"mc"`.

    Each event counts by itself: the scores of different positions of one sequence do not mix, as
    they are independent given the outputs.

    **Raises** `ValueError` for an unknown kind, fewer than one sample, or `"mc"` without a key.
    """

    objective: Objective
    params: PyTree[Any]
    batch: Batch
    key: PRNGKeyArray | None = None
    kind: Literal["exact", "mc", "empirical"] = eqx.field(static=True, default="exact")
    samples: int = eqx.field(static=True, default=1)
    linearisation: Linearisation | None = None

    def __post_init__(self):
        if self.kind not in ("exact", "mc", "empirical"):
            raise ValueError(f"kind: got {self.kind!r}, wanted 'exact', 'mc' or 'empirical'.")
        check_count("samples", self.samples)
        if self.kind == "mc" and self.key is None:
            raise ValueError("key: got None, but kind='mc' draws targets: pass a key.")
        self.params, self.objective = self.objective.bind(self.params)

    def metric(self, linearisation: Linearisation) -> AbstractOutputMetric:
        loss = self.objective.loss
        if self.kind == "exact":
            return LossMetric(loss, linearisation)
        if self.kind == "empirical":
            return ScoreMetric.from_targets(loss, linearisation)
        assert self.key is not None
        return ScoreMetric.from_samples(loss, linearisation, self.key, self.samples)


class Jacobian(AbstractOperator):
    """J: parameters → outputs of the model on a batch, of shape (batch, …); `.T` is Jᵀ.

    **Arguments:** as [`GaussNewton`][curvax.GaussNewton].
    """

    objective: Objective
    params: PyTree[Any]
    batch: Batch
    key: PRNGKeyArray | None = None
    linearisation: Linearisation | None = None

    def __post_init__(self):
        self.params, self.objective = self.objective.bind(self.params)

    def linearise(self) -> "Jacobian":
        if self.linearisation is not None:
            return self
        linearisation = self.objective.linearise(self.params, self.batch, self.key)
        return dataclasses.replace(self, linearisation=linearisation)

    def mv(self, vector: Params) -> Array:
        vector = _tree.cast(vector, self.params)
        if self.linearisation is not None:
            return self.linearisation.jvp(vector)
        x = self.objective.example(self.batch).x
        predict = lambda p: self.objective.outputs(p, x, self.key)
        return jax.jvp(predict, (self.params,), (vector,))[1]

    def transpose(self) -> AbstractOperator:
        return Transpose(self)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return _tree.structure(self.params)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        if self.linearisation is not None:
            return _tree.structure(self.linearisation.outputs)
        x = self.objective.example(self.batch).x
        return jax.eval_shape(self.objective.outputs, self.params, x, self.key)
