"""KL-Shampoo: factors that are fitted to the gradient's covariance together."""

import optax
from jaxtyping import ScalarLike

from curvax.rules.budget import TensorBudget
from curvax.rules.covariance import KroneckerCovariance
from curvax.tensors import Axes, Layouts
from curvax.tensorwise import tensorwise


def kl_shampoo(
    *,
    b1: ScalarLike = 0.9,
    b2: ScalarLike = 0.98,
    eps: ScalarLike = 1e-8,
    initial: ScalarLike = 0.1,
    limit: ScalarLike | None = 4000.0,
    refresh_every: int = 10,
    block_size: int | None = 1024,
    merge: int = 0,
    longest: int | None = 8192,
    one_sided: bool = False,
    state_budget: str | None = None,
    axes: Axes | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """L^(−1/2) M R^(−1/2) with M the moving average of gradients G, L that of G R⁻¹ Gᵀ/n and R that
    of Gᵀ L⁻¹ G/m, for an m × n matrix.

    KL-Shampoo (Lin et al. 2025): L ⊗ R is near to the second moment of the gradient in KL
    divergence, as L ⊗ R of Shampoo is not, and needs no grafting. This is the variant with QR
    steps: bases Q of L and of R are turned by one step of orthogonal iteration every
    `refresh_every` steps, unsorted, while the eigenvalues in them are moving averages of diag(Qᵀ G
    R⁻¹ Gᵀ Q)/n in every step. Wherever L or R is inverted, its basis and these eigenvalues stand
    for it. The direction of a step is that of the factors before it; M is not corrected for its
    start. As in the authors' code, the first step gives a direction of zero: its gradient begins
    the factors, with nothing inverted, and their eigenvectors are the first bases, with `initial`
    for all eigenvalues. No damping enters the factors.

    **Arguments:**

    - `b1`, `b2`: of the moving averages of M, and of L, R and the eigenvalues.
    - `eps`: is added to the square roots of the products of eigenvalues.
    - `initial`: the first eigenvalues.
    - `limit`: the root of an inverse eigenvalue of an n × n factor is at most max(10, min(n,
      `limit`)); None for no limit.
    - `refresh_every`, `block_size`, `merge`, `longest`, `one_sided`, `axes`, `rest`: as of
      [`soap`][curvax.methods.soap.soap]; `rest` of None is `optax.scale_by_adam(b1, b2, eps)`.
    - `state_budget`: what the state may cost, such as `"2.0x adam"`: as many tensors as fit have
      both factors, and those with the largest state for their size that of the shortest side only.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.

    **State:** one copy of the parameters, and for each block m × n 2(m² + n²) numbers. **Cost:** a
    step about 7mn(m + n) operations; a refresh about 17(m³ + n³) + 2mn(m + n), and an
    eigendecomposition in the second step.

    **Raises** `ValueError` for arguments out of range, and in `init` for names of axes that do not
    fit, and for a budget that is too small.
    """
    layouts = Layouts.of(axes, block=block_size, merge=merge, longest=longest, order=2)
    rule = KroneckerCovariance(
        b1=b1,
        b2=b2,
        eps=eps,
        initial=initial,
        limit=limit,
        refresh_every=refresh_every,
        longest=longest,
        one_sided=one_sided,
    )
    rest = optax.scale_by_adam(b1, b2, eps) if rest is None else rest
    # Without a factor a gradient would keep its length, which is none of this method's.
    budget = TensorBudget.parse(state_budget, bare=False)
    return tensorwise(rule, layouts, rest=rest, budget=budget)
