"""Shampoo: inverse roots of the second moments along each dimension."""

import optax
from jaxtyping import ScalarLike

from curvax.roots import AbstractInverseRoot, CoupledNewtonRoot, EigenbasisRoot
from curvax.rules.budget import TensorBudget
from curvax.rules.kronecker import KroneckerRoots
from curvax.taps.wishes import SideRank
from curvax.tensors import Axes, Layouts
from curvax.tensorwise import tensorwise


def shampoo(
    *,
    decay: ScalarLike = 0.99,
    refresh_every: int = 10,
    statistics_every: int = 1,
    root: AbstractInverseRoot | None = None,
    exponent: float | None = None,
    graft: optax.GradientTransformation | None = optax.scale_by_rms(
        0.99, eps_in_sqrt=False, bias_correction=True
    ),
    block_size: int | None = 1024,
    merge: int = 1024,
    longest: int | None = 8192,
    diagonal: bool = False,
    one_sided: bool = False,
    vectors: bool = False,
    early: bool = True,
    rank: SideRank = None,
    state_budget: str | None = None,
    axes: Axes | None = None,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """L^(−1/4) G R^(−1/4), with L and R the moving averages of GGᵀ and GᵀG; for tensors of order k
    −1/(2k) and a factor for each dimension.

    Shampoo (Gupta, Koren & Singer 2018, algorithms 1 and 2) in the form in which it is used: moving
    averages, corrected for their start, blocks, roots that are refreshed now and then, and the
    length of each step from another method (Anil et al. 2020; Shi et al. 2023).

    **Arguments:**

    - `decay`: β of L ← βL + (1 − β)GGᵀ; 1 is for the sum, as in the first paper.
    - `refresh_every`: steps from one refresh of the roots to the next.
    - `statistics_every`: steps from one measurement of L and R to the next.
    - `root`: the way to the inverse roots, and the ridge:
      [`EigenbasisRoot`][curvax.EigenbasisRoot], [`EighRoot`][curvax.EighRoot],
      [`CoupledNewtonRoot`][curvax.CoupledNewtonRoot] or
      [`NewtonSchulzRoot`][curvax.NewtonSchulzRoot]. With `EigenbasisRoot(tolerance=0.05)` bases
      that still fit stay. None is `EigenbasisRoot()`, with a rank or a budget
      `CoupledNewtonRoot()`.
    - `exponent`: e of L^−e; None is 1/(2k), where k counts the dimensions with a factor.
    - `graft`: each tensor gets the norm that it has after this transformation of the gradient
      (Agarwal et al. 2020): `optax.identity()` for SGD, `optax.scale_by_rss()` for Adagrad,
      `optax.scale_by_rms(...)`, `optax.scale_by_adam(...)`. The default is Adam without momentum,
      so that its learning rates fit. None leaves the length as it is.
    - `block_size`: dimensions longer than this are cut, and each block has its own factors; the
      norm is that of the whole.
    - `merge`: neighbouring dimensions are merged as long as the product is at most this and two are
      left: (3, 3, 64, 128) becomes (576, 128).
    - `longest`: dimensions longer than this, such as a vocabulary, are not cut and have no factor;
      with `diagonal` they have a diagonal one.
    - `one_sided`: only the shortest dimension of a block has a factor, with e = 1/2.
    - `vectors`: leaves of one axis have a factor, too (and tensors may be merged into one).
    - `early`: refreshes also in steps 1, 2, 4, 8 …, before the first `refresh_every` are over.
    - `rank`: how L and R are held: a share of their size, a number of columns k, or None for full
      matrices. At low rank L is QMQᵀ + τ(I − QQᵀ), with the trace of the full one; the moving
      average of LQ sees every gradient, and a refresh makes a new basis of it by one pass of a
      Nyström approximation (Tropp et al. 2017). Sides of at most 32 are full whatever the rank.
    - `state_budget`: instead of a rank, what the state may cost, a momentum behind and that of
      `graft` included, such as `"1.5x adam"`: the largest share that fits is taken, for all tensors
      together. Where the smallest does not, those with the largest state for their size have one
      side only, or none. (The default `graft` and a momentum are 1.0x themselves.)
    - `axes`: the names of the axes of leaves, by a part of their path, as of
      [`Layouts`][curvax.tensors.Layouts]: `{"layers": "layers ..."}` for layers in one array.
    - `rest`: for the other leaves. None is `optax.scale_by_adam()`.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.trace(0.9)` and `optax.scale_by_learning_rate`. `exponent` is a `static_args` of
    `optax.inject_hyperparams`.

    **State:** for each block m × n 2(m² + n²) numbers, with the default root 3(m² + n²), and that
    of `graft`; at rank k 2k(m + n) + 4k². **Cost:** a step 2mn(m + n) operations for the moments,
    as many for the direction; a refresh with the default root about 19(m³ + n³), and an
    eigendecomposition in the first step. At rank k a step costs 16mnk operations, and a refresh
    about 10k²(m + n) and those for the roots of two k × k matrices.

    **Raises** `ValueError` for arguments out of range; in `init` for names of axes that do not fit,
    for a budget that is too small, and for an exponent that `root` does not have.
    """
    order = 1 if vectors else 2
    layouts = Layouts.of(axes, block=block_size, merge=merge, longest=longest, order=order)
    # Without a factor and a graft a gradient would keep its length, which is none of this method's.
    budget = TensorBudget.parse(state_budget, behind=1, bare=graft is not None)
    rank = rank if budget is None else 1.0
    if root is None:
        root = EigenbasisRoot() if rank is None else CoupledNewtonRoot()
    rule = KroneckerRoots(
        root,
        decay,
        refresh_every,
        statistics_every,
        exponent,
        longest,
        diagonal,
        one_sided,
        early,
        rank,
    )
    rest = optax.scale_by_adam() if rest is None else rest
    return tensorwise(rule, layouts, rest=rest, magnitude=graft, budget=budget)
