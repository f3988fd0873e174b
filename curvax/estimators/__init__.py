"""Stochastic estimates of diagonals and traces."""

from curvax.estimators.diagonal import gauss_newton_bartlett as gauss_newton_bartlett
from curvax.estimators.matrix_free import flat as flat
from curvax.estimators.matrix_free import hutchinson_diagonal as hutchinson_diagonal
from curvax.estimators.matrix_free import hutchinson_trace as hutchinson_trace
