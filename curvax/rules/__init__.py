"""What is made of the gradient of a tensor, with the tensor's own second moments."""

from curvax.rules.base import AbstractTensorRule as AbstractTensorRule
from curvax.rules.chained import Chained as Chained
from curvax.rules.covariance import KroneckerCovariance as KroneckerCovariance
from curvax.rules.eigenbasis_adam import EigenbasisAdam as EigenbasisAdam
from curvax.rules.kronecker import KroneckerRoots as KroneckerRoots
from curvax.rules.momentum import Momentum as Momentum
from curvax.rules.orthogonal import NewtonSchulz as NewtonSchulz
from curvax.rules.subspace_adam import SubspaceAdam as SubspaceAdam
from curvax.rules.whitening import TriangularWhitening as TriangularWhitening
