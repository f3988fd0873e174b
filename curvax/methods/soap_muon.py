"""SOAP's direction, orthogonalised."""

from typing import Any

import optax
from jaxtyping import ScalarLike

from curvax.orthogonal import QUINTIC, Coefficients
from curvax.rules.chained import Chained
from curvax.rules.eigenbasis_adam import EigenbasisAdam
from curvax.rules.orthogonal import NewtonSchulz, spectral_scale
from curvax.rules.subspace_adam import SubspaceAdam
from curvax.tensors import Axes, Layouts
from curvax.tensorwise import tensorwise


def soap_muon(
    *,
    adam: EigenbasisAdam | SubspaceAdam = EigenbasisAdam(),
    coefficients: Coefficients = (QUINTIC,) * 5,
    rms: ScalarLike | None = 0.2,
    dtype: Any = None,
    axes: Axes | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """U Vᵀ of SOAP's direction U Σ Vᵀ for each matrix, and Adam for all that is no matrix.

    SOAP-Muon (Vyas et al. 2025, "Improving SOAP using iterative whitening and Muon", without their
    power of the singular values): what the eigenbases of a few steps ago leave of correlations, the
    orthogonalisation takes away. In track 3 of modded-nanogpt the name is for the same chain with
    the momentum in front (Nesterov's, whose squares then are Adam's), and with other parts behind.

    **Arguments:**

    - `adam`: SOAP's part: decays, cadence, one-sided bases; at low rank
      [`SubspaceAdam(rank=0.15)`][curvax.SubspaceAdam].
    - `coefficients`, `rms`, `dtype`, `axes`: as of [`muon`][curvax.methods.muon.muon]. Matrices are
      not cut into blocks. With an `rms` of 0.2 the learning rates of Adam fit.
    - `rest`: for the other leaves. None is Adam with the same numbers.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`. As with
    [`soap`][curvax.methods.soap.soap], the first step gives matrices a direction of zero.

    **State:** as of [`soap`][curvax.methods.soap.soap]: 2mn + 2(m² + n²) numbers for each m × n
    matrix, at low rank fewer, and two copies of the rest. **Cost:** those of
    [`soap`][curvax.methods.soap.soap] and [`muon`][curvax.methods.muon.muon].

    **Raises** `ValueError` for arguments out of range, and in `init` for names of axes that do not
    fit.
    """
    rest = optax.scale_by_adam(adam.b1, adam.b2, adam.eps) if rest is None else rest
    rule = Chained(adam, NewtonSchulz(coefficients, dtype=dtype))
    layouts = Layouts.of(axes, matrices=True)
    return tensorwise(rule, layouts, rest=rest, scale=spectral_scale(rms))
