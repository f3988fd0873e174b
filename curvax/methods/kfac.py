"""Kronecker-factored curvature: K-FAC."""

from collections.abc import Mapping

from jaxtyping import ScalarLike

from curvax.blockwise import precondition
from curvax.damping import AbstractDamping, AbstractFactorDamping, RelativeTikhonov
from curvax.factored import KroneckerPreconditioner
from curvax.objective import Objective
from curvax.plan.moments import Recipe
from curvax.scalings import RMS, AbstractScaling
from curvax.taps.moments import FisherKind
from curvax.taps.statistics import Sharing
from curvax.taps.wishes import Ranks, StateBudget
from curvax.transform import Method


def kfac(
    objective: Objective,
    *,
    rank: Ranks = 0.15,
    state_budget: str | None = None,
    refresh_every: int = 10,
    fisher: FisherKind = "mc",
    samples: int = 1,
    sharing: Sharing = "expand",
    damping: AbstractDamping | ScalarLike = 1.0,
    split: AbstractFactorDamping = RelativeTikhonov(),
    scaling: AbstractScaling = RMS(),
    decay: float = 0.9,
    stagger: int = 1,
    diagonal: tuple[str, ...] = (),
    fused: Mapping[str, int] | None = None,
    rows: int | None = 4,
) -> Method:
    """(G + γ_G I)⁻¹ ∇W (A + γ_A I)⁻¹ for each weight W, with A and G kept as moving averages.

    K-FAC (Martens & Grosse 2015, sections 4.2 and 6.3): the block of a weight, with its bias as one
    more input, is taken as G ⊗ A, where A is the second moment of its inputs and G that of the
    cotangents of its outputs. For convolutions see Grosse & Martens (2016), for weights that many
    positions share Eschenhagen et al. (2023). Leaves that are used elementwise have a diagonal
    block. No layer is wrapped or named: [`sites`][curvax.sites] shows what was found.

    **Arguments:**

    - `objective`: what is minimised, made with `example=` a batch or its shapes: the blocks are
      part of the state, and must be known before the first step.
    - `rank`: how a factor is held: a share of its size, a number of columns, or None for full
      matrices. A low-rank factor is Q M Qᵀ + τ(I − QQᵀ) with the trace of the full one, refreshed
      by one pass of a Nyström approximation from the basis that it has (Tropp et al. 2017); no
      n × n matrix is formed. Sides of at most 32 are full whatever the rank, and those above 8192
      diagonal. A share is rounded down to a multiple of 16, and gives a side at most half as many
      columns as the weight's other side has entries (32 at the least), so that a basis costs no
      more than half of its weight. A pair is for the inputs and for the outputs. A mapping gives
      some weights a rank of their own, by a part of their path: `{"embed": 64, "head": None, "":
      0.1}`. The longest part that a path has decides; `""` is for the rest, 0.15 if it is left out.
    - `state_budget`: instead of a rank, what the state may cost, a momentum included, such as
      `"0.75x adam"`: the largest share that fits is taken.
    - `refresh_every`: steps from one refresh to the next. Curvature changes slowly, and a refresh
      costs more than a step without one.
    - `fisher`: `"mc"`, `samples` targets drawn from the model for each event: unbiased, with one
      more backward pass for each sample and a key in every step; `"exact"`, the Gauss-Newton
      matrix, with one more backward pass for each output; `"empirical"`, the targets of the batch
      in the gradient's own backward pass: the cheapest, but no estimate of the Fisher matrix, and
      worst near a minimum; `"forward_only"`, A alone, with G = I and other leaves as they are.
    - `samples`: of `"mc"`. One will do, as the factors average over batches.
    - `sharing`: `"expand"` takes positions that share a weight as independent examples, `"reduce"`
      sums over them first and costs less (Eschenhagen et al. 2023). In a language model each
      position is an event of its own, which is `"expand"`. Steps of a time loop are always
      expanded.
    - `damping`: a policy, or a number for a constant λ; its unit is that of `split`. A policy that
      listens to the gain ratio costs one forward pass and one product with J when it looks. λ
      enters the inverses when a block is refreshed, not between.
    - `split`: how λ is shared out between A and G.
      [`RelativeTikhonov`][curvax.RelativeTikhonov] has no unit, and so needs no tuning for the
      scale of the loss; with [`FactoredTikhonov`][curvax.FactoredTikhonov] λ is added to the
      curvature.
    - `scaling`: what is made of the preconditioned gradient. [`RMS`][curvax.RMS] gives each leaf
      the size of an Adam step, smaller for wide layers, so that one learning rate serves many
      problems and widths (0.002, falling to zero, did on all that were tried).
      [`KLClip`][curvax.KLClip] keeps the lengths of the natural gradient, and bounds how far a step
      moves the predictions.
    - `decay`: the weight of the past in a factor's moving average at each refresh, corrected for
      the start: min(decay, 1 − 1/t) at the t-th refresh (section 5).
    - `stagger`: over how many steps of a cycle the refreshes are spread. With 1 every block is
      refreshed in the same step. More make that step less slow, and are more executables to
      compile. Blocks are dealt out by cost; in step 0 all are refreshed.
    - `diagonal`: parts of the paths of leaves that are to have a diagonal block.
    - `fused`: for weights that are several in one, by a part of their path, of how many equal parts
      their outputs consist: `{"qkv": 3}`, or three times the heads. Each part has a block of its
      own, with its own G and the A of all. The bias goes along.
    - `rows`: where positions share a weight, an n × n factor is measured from about rows·n of them
      (2048 at the least), and the diagonal block of a scale or a shift from about 64 examples,
      evenly spaced in the batch; None takes all. Moving averages over ten refreshes see ten times
      as many.

    **Returns** an Optax transformation that keeps the sign of the gradient: chain it with
    `optax.trace(0.9)` and `optax.scale_by_learning_rate`, and give the chain to
    [`make_step`][curvax.make_step], or pass `batch=` (and `key=`) to `update`.

    **State:** of a full n × n factor two matrices, the average and its damped inverse; of one of
    rank k n·k + 2k² numbers; of a diagonal block one copy of its leaf. `sites(...)` prints it.
    **Cost:** a step without a refresh is a gradient and, for each weight, two products with its
    factors (thin ones for low rank). A refresh adds the backward passes above, one product for
    each factor's moment, and Cholesky factorisations of n³ or k³ operations.

    **Under `optax.masked` or `optax.partition`** it has blocks for the leaves that it sees, as if
    the others were constants: a weight whose bias is hidden has none, and a bias whose weight is
    hidden a diagonal block. The state must then be made by [`make_step`][curvax.make_step].

    **Raises** `ValueError` for arguments out of range; in `init` without an example, for a model
    that cannot be applied to it, and where leaves are masked outside of `make_step`; in `update`
    without `observation` and `batch`, for `fisher="mc"` without a key, and for a batch on which the
    model has other blocks.
    """
    held = rank if state_budget is None else StateBudget.parse(state_budget)
    recipe = Recipe(held, fisher, samples, sharing, diagonal, fused, rows)
    factors = KroneckerPreconditioner(recipe, refresh_every, stagger, decay, split)
    return precondition(objective, factors, damping=damping, scaling=scaling)
