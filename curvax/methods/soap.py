"""SOAP: Adam in Shampoo's eigenbasis."""

import functools

import optax
from jaxtyping import ScalarLike

from curvax.rules.budget import TensorBudget
from curvax.rules.eigenbasis_adam import EigenbasisAdam
from curvax.rules.subspace_adam import SubspaceAdam
from curvax.taps.wishes import SideRank
from curvax.tensors import Axes, Layouts
from curvax.tensorwise import tensorwise


def soap(
    *,
    b1: ScalarLike = 0.95,
    b2: ScalarLike = 0.95,
    eps: ScalarLike = 1e-8,
    decay: ScalarLike | None = None,
    refresh_every: int = 10,
    tolerance: float | None = None,
    block_size: int | None = 1024,
    merge: int = 0,
    longest: int | None = 8192,
    one_sided: bool = False,
    rank: SideRank = None,
    state_budget: str | None = None,
    axes: Axes | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """P Adam(PᵀGQ) Qᵀ, with P and Q the eigenvectors of the moving averages of GGᵀ and GᵀG; for
    tensors of higher order a basis for each dimension.

    SOAP (Vyas et al. 2024, algorithm 3). Bases are turned by one QR step of orthogonal iteration
    (algorithm 4), by Cholesky QR, with their columns sorted by eigenvalue and Adam's second moments
    put in the same order. As in the authors' code, the first step gives a direction of zero for
    tensors: its gradient begins the averages, whose eigendecomposition is the first basis; no
    gradient is projected on a basis that was made of it; the mean is rotated along with the bases;
    and Adam's corrections for the start stand before m/(√v + ε).

    **Arguments:**

    - `b1`, `b2`, `eps`: Adam's.
    - `decay`: of the averages of GGᵀ and GᵀG; None is `b2`.
    - `refresh_every`: steps from one turn of the bases to the next.
    - `tolerance`: full bases stay in which the off-diagonal part of QᵀLQ has less than this share
      of its Frobenius norm (Eschenhagen et al. 2025); None turns all. The refresh is left out when
      all stay.
    - `block_size`: dimensions longer than this are cut, and each block has its own bases, which
      saves most of the cost for long ones; None is the paper's.
    - `merge`: neighbouring dimensions are merged as long as the product is at most this and two are
      left.
    - `longest`: dimensions longer than this, such as a vocabulary, are not cut, and keep their own
      coordinates. Where all do, it is Adam.
    - `one_sided`: only the shortest dimension of a block has a basis (section 6.3 of the paper).
    - `rank`: how bases are held: the columns that there are, as a share of the side or a number, or
      None for full ones. At low rank Adam's second moments are those of the coordinates in the span
      and one for all outside: see [`SubspaceAdam`][curvax.SubspaceAdam]. Sides of at most 32 are
      full whatever the rank.
    - `state_budget`: instead of a rank, what the state may cost, such as `"1.0x adam"`: the largest
      share that fits is taken, for all tensors together. Where the smallest does not, those with
      the largest state for their size have one side only, or are left to Adam.
    - `axes`: the names of the axes of leaves, by a part of their path, as of
      [`Layouts`][curvax.tensors.Layouts]: `{"layers": "layers ..."}` for layers in one array.
    - `rest`: for leaves of one axis, and others that are no tensors. None is Adam with the same
      numbers, which takes its first step at once.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.add_decayed_weights` and `optax.scale_by_learning_rate`.

    **State:** Adam's two copies of the parameters, and for each block m × n 2(m² + n²) numbers; at
    rank k one copy, and 2k(m + n) + (k + 1)². **Cost:** a step 6mn(m + n) operations, one third of
    it for the averages; a refresh about 17(m³ + n³) + 2mn(m + n), and an eigendecomposition in the
    second step. At rank k a step costs 16mnk operations, and a refresh about 20k²(m + n).

    **Raises** `ValueError` for arguments out of range, and in `init` for names of axes that do not
    fit, and for a budget that is too small.
    """
    layouts = Layouts.of(axes, block=block_size, merge=merge, longest=longest, order=2)
    budget = TensorBudget.parse(state_budget)
    rank = rank if budget is None else 1.0
    kind = EigenbasisAdam if rank is None else functools.partial(SubspaceAdam, rank=rank)
    rule = kind(
        b1=b1,
        b2=b2,
        eps=eps,
        decay=decay,
        refresh_every=refresh_every,
        longest=longest,
        one_sided=one_sided,
        tolerance=tolerance,
    )
    rest = optax.scale_by_adam(b1, b2, eps) if rest is None else rest
    return tensorwise(rule, layouts, rest=rest, budget=budget)
