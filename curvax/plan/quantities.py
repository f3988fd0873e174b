"""The quantities that parts of a method ask a step for, and what they share.

A quantity is a hashable description; two parts that ask for equal quantities get one computation.
Beneath that, quantities share the intermediates of a [`Scope`][curvax.plan.quantities.Scope]: one
linearised forward pass serves value, gradient, curvature products and diagonal estimates.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from curvax import _tree
from curvax._checks import check_count
from curvax.batch import Batch
from curvax.estimators import gauss_newton_bartlett, hutchinson_diagonal
from curvax.linearisation import Linearisation
from curvax.objective import Objective, Params
from curvax.operators import AbstractCurvature, Fisher, GaussNewton, Hessian


class Scope:
    """The intermediates of one pass over one batch, each traced at most once.

    Lives only while a step is traced.
    """

    def __init__(
        self,
        objective: Objective,
        params: Params,
        batch: Batch,
        key: PRNGKeyArray | None,
        curvature_batch: Batch | None = None,
        gradient_from_hessian: bool = False,
        taps: tuple[Any, ...] = (),
        bases: Callable[[bool], Any] | None = None,
    ):
        self.objective = objective
        self.params = params
        self.batch = batch
        self.key = key
        self.curvature_batch = curvature_batch
        self._gradient_from_hessian = gradient_from_hessian
        self._taps = taps
        self.bases = bases
        self._tapped: dict[Any, Any] = {}

    def tapped(self, quantity: Any) -> Any:
        """The forward pass that holds the taps of a quantity, and of all that go with it."""
        kind = (quantity.recipe, quantity.rotated)
        if kind not in self._tapped:
            from curvax.plan.moments import TappedScope

            together = [tap for tap in self._taps if (tap.recipe, tap.rotated) == kind]
            self._tapped[kind] = TappedScope(self, tuple(together) or (quantity,))
        return self._tapped[kind]

    @functools.cached_property
    def curvature(self) -> "Scope":
        """The scope of the curvature batch: this one, if there is no batch apart."""
        if self.curvature_batch is None:
            return self
        return Scope(
            self.objective,
            self.params,
            self.curvature_batch,
            self.key,
            taps=self._taps,
            bases=self.bases,
        )

    @property
    def _gradient_taps(self) -> Any:
        """The tapped pass that the gradient takes part in: one forward pass serves both."""
        on_this_batch = self._taps and self.curvature_batch is None
        return self.tapped(self._taps[0]) if on_this_batch else None

    @functools.cached_property
    def linearisation(self) -> Linearisation:
        """The model's outputs, linearised: one forward pass, residuals kept."""
        if self._gradient_taps is not None:
            return self._gradient_taps.run.linearisation
        return self.objective.linearise(self.params, self.batch, self.key)

    @functools.cached_property
    def hessian(self) -> tuple[tuple[Scalar, Params], Any]:
        """Value and gradient, and the gradient's linear map: forward and backward pass, kept."""
        evaluate = jax.value_and_grad(lambda p: self.objective.value(p, self.batch, self.key))
        primal, tangent = jax.linearize(evaluate, self.params)
        return primal, GradientTangent(tangent)

    @functools.cached_property
    def value(self) -> Scalar:
        if self._gradient_from_hessian:
            return self.hessian[0][0]
        return self.objective.value_of(self.linearisation, self.batch)

    @functools.cached_property
    def gradient(self) -> Params:
        if self._gradient_from_hessian:
            return self.hessian[0][1]
        if self._gradient_taps is not None:
            return self.objective.add_l2(self._gradient_taps.pulled[0], self.params)
        return self.objective.gradient_of(self.linearisation)

    def provide(self, quantity: "AbstractQuantity") -> PyTree[Array]:
        """The value of a quantity."""
        return quantity.compute(self)

    def operator(self, of: type[AbstractCurvature], /, **options: Any) -> AbstractCurvature:
        """A curvature operator on the batch of this scope, linearised."""
        if issubclass(of, Hessian):
            options["tangent"] = self.hessian[1]
        else:
            options["linearisation"] = self.linearisation
        return of(self.objective, self.params, self.batch, self.key, **options)

    def inside_branch(self) -> "Scope":
        """A scope for a branch of `lax.cond`: it may read what is there, but what it adds must
        not leak out of the branch.
        """
        inner = Scope(
            self.objective,
            self.params,
            self.batch,
            self.key,
            self.curvature_batch,
            bases=self.bases,
        )
        there = self.__dict__
        inner.__dict__.update(
            {name: there[name] for name in ("linearisation", "hessian") if name in there}
        )
        if self.curvature_batch is not None and "curvature" in there:
            inner.__dict__["curvature"] = self.curvature.inside_branch()
        return inner


class GradientTangent(eqx.Module):
    """The linear map of (value, gradient), as that of the gradient alone."""

    tangent: Any

    def __call__(self, vector: Params) -> Params:
        return self.tangent(vector)[1]


class AbstractQuantity(eqx.Module):
    """Something that a step can be asked to provide. All fields are static."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """Its name in tables."""

    @property
    def random(self) -> bool:
        """Whether it needs a key."""
        return False

    @property
    def tapped(self) -> bool:
        """Whether it comes from taps in the step's own forward and backward pass."""
        return False

    @property
    def from_hessian(self) -> bool:
        """Whether it linearises the gradient, so that value and gradient come with it."""
        return False

    @property
    def from_start(self) -> bool:
        """Whether it is due on the very first step, too, whatever its offset."""
        return False

    @property
    def additive(self) -> bool:
        """Whether its value on a batch is the sum of its values on parts of it, as `weighed`."""
        return False

    def weighed(self, value: PyTree[Array], portion: Scalar, fraction: Scalar) -> PyTree[Array]:
        """What a part of a batch adds, of which the objective counts `portion` times, and which has
        this `fraction` of all weight.
        """
        del fraction
        return _tree.scale(portion, value)

    @abc.abstractmethod
    def compute(self, scope: Scope) -> PyTree[Array]:
        """Its value, from the intermediates of the scope."""


class AbstractCurvatureQuantity(AbstractQuantity):
    """A curvature operator, linearised at the current parameters, on the curvature batch."""

    @abc.abstractmethod
    def compute(self, scope: Scope) -> AbstractCurvature: ...


class GaussNewtonCurvature(AbstractCurvatureQuantity):
    """The [`GaussNewton`][curvax.GaussNewton] operator."""

    @property
    def label(self) -> str:
        return "Gauss-Newton operator"

    def compute(self, scope: Scope) -> AbstractCurvature:
        return scope.curvature.operator(GaussNewton)


class FisherCurvature(AbstractCurvatureQuantity):
    """The [`Fisher`][curvax.Fisher] operator of a kind."""

    kind: Literal["exact", "mc", "empirical"] = eqx.field(static=True, default="exact")
    samples: int = eqx.field(static=True, default=1)

    @property
    def label(self) -> str:
        return f"Fisher operator ({self.kind})"

    @property
    def random(self) -> bool:
        return self.kind == "mc"

    def compute(self, scope: Scope) -> AbstractCurvature:
        return scope.curvature.operator(Fisher, kind=self.kind, samples=self.samples)


class HessianCurvature(AbstractCurvatureQuantity):
    """The [`Hessian`][curvax.Hessian] operator."""

    @property
    def label(self) -> str:
        return "Hessian operator"

    @property
    def from_hessian(self) -> bool:
        return True

    def compute(self, scope: Scope) -> AbstractCurvature:
        return scope.curvature.operator(Hessian)


class BartlettDiagonal(AbstractQuantity):
    """The Gauss-Newton-Bartlett estimate of the Gauss-Newton diagonal."""

    @property
    def label(self) -> str:
        return "Gauss-Newton-Bartlett diagonal"

    @property
    def random(self) -> bool:
        return True

    @property
    def additive(self) -> bool:
        return True

    def compute(self, scope: Scope) -> Params:
        at = scope.curvature
        assert at.key is not None
        return gauss_newton_bartlett(at.objective, at.linearisation, at.key)


class FisherDiagonal(AbstractQuantity):
    """The exact diagonal of the [`Fisher`][curvax.Fisher] operator of a kind: for `"empirical"` the
    squared gradients of the examples, summed (Martens 2010, section 4.7). One backward pass for
    each row of an example; what XLA does not fuse holds a gradient for each.
    """

    kind: Literal["exact", "mc", "empirical"] = eqx.field(static=True, default="empirical")
    samples: int = eqx.field(static=True, default=1)

    @property
    def label(self) -> str:
        return f"Fisher diagonal ({self.kind})"

    @property
    def random(self) -> bool:
        return self.kind == "mc"

    @property
    def additive(self) -> bool:
        return True

    def compute(self, scope: Scope) -> Params:
        return FisherCurvature(self.kind, self.samples).compute(scope).diagonal()


class HutchinsonDiagonal(AbstractQuantity):
    """Hutchinson's estimate of the Hessian's diagonal."""

    samples: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("samples", self.samples)

    @property
    def label(self) -> str:
        return f"Hutchinson diagonal of the Hessian ({self.samples})"

    @property
    def random(self) -> bool:
        return True

    @property
    def from_hessian(self) -> bool:
        return True

    def compute(self, scope: Scope) -> Params:
        assert scope.key is not None
        key = jax.random.fold_in(scope.key, 2)
        return hutchinson_diagonal(HessianCurvature().compute(scope), key, self.samples)


class GainRatio(AbstractQuantity):
    """The gain ratio of the step. Known only after the step: an observation says when it is due."""

    @property
    def label(self) -> str:
        return "gain ratio"

    def compute(self, scope: Scope) -> None:
        return None
