"""Losses of a model's outputs, with the curvature that Gauss-Newton and Fisher need."""

from curvax.losses.base import AbstractLoss as AbstractLoss
from curvax.losses.custom import CustomLoss as CustomLoss
from curvax.losses.elementwise import Poisson as Poisson
from curvax.losses.elementwise import SigmoidCrossEntropy as SigmoidCrossEntropy
from curvax.losses.elementwise import SquaredError as SquaredError
from curvax.losses.gaussian import Gaussian as Gaussian
from curvax.losses.softmax import SoftmaxCrossEntropy as SoftmaxCrossEntropy
