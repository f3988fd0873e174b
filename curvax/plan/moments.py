"""The moments of Kronecker factors, as a quantity of a plan."""

import dataclasses
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray, Scalar

from curvax import _tree
from curvax._checks import check_count
from curvax._masked import is_masked
from curvax.batch import Batch
from curvax.objective import Objective, Params
from curvax.plan.quantities import AbstractQuantity, Scope
from curvax.taps.blocks import Block, KroneckerBlock, find_blocks, input_side
from curvax.taps.moments import BlockMoments as Sides
from curvax.taps.moments import FisherKind, Moments, collect_moments, tapped_pass
from curvax.taps.statistics import Sharing
from curvax.taps.wishes import Parts, Rank, as_parts, as_rank


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What Kronecker factors are made of.

    - `rank`: of a factor's basis: a share of its size, a number of columns, None for full
      matrices, a pair of these for inputs and outputs, a mapping to these from parts of paths, or
      a `StateBudget`.
    - `fisher`: `"mc"` (targets drawn from the model, `samples` for each event), `"exact"` (a
      backward pass for each output), `"empirical"` (the targets of the batch, in the gradient's
      own backward pass), or `"forward_only"` (the input factors alone; G = I).
    - `sharing`: `"expand"` or `"reduce"` over the positions that share a weight (Eschenhagen et
      al. 2023).
    - `diagonal`: parts of the paths of leaves whose blocks are to be diagonal.
    - `fused`: for weights that are several in one, by a part of their path, how many.
    - `rows`: an n × n factor is measured from about rows·n positions (2048 at the least) of a batch
      that has more, a diagonal block from about 64 examples; None takes all.
    """

    rank: Rank = None
    fisher: FisherKind = "mc"
    samples: int = 1
    sharing: Sharing = "expand"
    diagonal: tuple[str, ...] = ()
    fused: Parts = None
    rows: int | None = None

    def __post_init__(self):
        kinds = ("mc", "exact", "empirical", "forward_only")
        if self.fisher not in kinds:
            raise ValueError(f"fisher: got {self.fisher!r}, wanted one of {', '.join(kinds)}.")
        if self.sharing not in ("expand", "reduce"):
            raise ValueError(f"sharing: got {self.sharing!r}, wanted 'expand' or 'reduce'.")
        check_count("samples", self.samples)
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: got {self.rows}, wanted None or at least 1.")
        object.__setattr__(self, "rank", as_rank(self.rank))
        object.__setattr__(self, "fused", as_parts(self.fused))

    def blocks(
        self, objective: Objective, params: Params, x: Any, absent: frozenset[str] = frozenset()
    ) -> tuple[Any, tuple[Block, ...]]:
        """The jaxpr of one example, and the blocks of the parameters, but for those at the paths
        `absent`.
        """
        closed, blocks = find_blocks(
            objective,
            params,
            x,
            rank=self.rank,
            diagonal=self.diagonal,
            fused=self.fused,
            absent=absent,
        )
        if self.fisher == "forward_only":
            blocks = tuple(input_side(block) for block in blocks)
        return closed, tuple(dataclasses.replace(block, rows=self.rows) for block in blocks)


class BlockMoments(AbstractQuantity):
    """The moments of the blocks in one of several slots, into which they are dealt by cost.

    In the eigenbases that the memory holds, if `rotated`.
    """

    recipe: Recipe = eqx.field(static=True)
    slot: int = eqx.field(static=True, default=0)
    slots: int = eqx.field(static=True, default=1)
    rotated: bool = eqx.field(static=True, default=False)

    @property
    def label(self) -> str:
        what = "second moments in the eigenbasis" if self.rotated else "Kronecker moments"
        part = f", slot {self.slot + 1} of {self.slots}" if self.slots > 1 else ""
        return f"{what} ({self.recipe.fisher}{part})"

    @property
    def random(self) -> bool:
        return self.recipe.fisher == "mc"

    @property
    def tapped(self) -> bool:
        return True

    @property
    def from_start(self) -> bool:
        return not self.rotated

    @property
    def additive(self) -> bool:
        return True

    def weighed(self, value: Moments, portion: Scalar, fraction: Scalar) -> Moments:
        def one(each: Any) -> Any:
            scaled = _tree.scale(portion, each)
            if not isinstance(each, Sides):
                return scaled
            # The one side is a mean; the other carries the scale of the objective.
            return scaled._replace(input=_tree.scale(fraction, each.input))

        return {path: one(each) for path, each in value.items()}

    def mine(self, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        """The blocks of this slot."""
        kept = tuple(b for b in blocks if isinstance(b, KroneckerBlock)) if self.rotated else blocks
        slots = deal(blocks, self.slots)
        return tuple(b for b in kept if slots[b.path] == self.slot)

    def compute(self, scope: Scope) -> Moments:
        at = scope.curvature.tapped(self)
        return {block.path: at.moments[block.path] for block in self.mine(at.all_blocks)}


def deal(blocks: tuple[Block, ...], slots: int) -> dict[str, int]:
    """The slot of each block, by path: largest first, to the slot with the least work so far."""

    def work(block: Block) -> int:
        if not isinstance(block, KroneckerBlock):
            return 1
        return block.stack * sum(
            form.size * max(form.rank, 1) for form in (block.input, block.output)
        )

    loads, dealt = [0] * slots, {}
    for work_of, path in sorted(((work(b), b.path) for b in blocks), key=lambda b: (-b[0], b[1])):
        dealt[path] = loads.index(min(loads))
        loads[dealt[path]] += work_of
    return dealt


class TappedScope:
    """One forward pass with the taps of all quantities that are due, and what comes of it.

    Lives, as a `Scope`, only while a step is traced.
    """

    def __init__(self, scope: Scope, quantities: tuple[BlockMoments, ...]):
        first = quantities[0]
        self._scope, self._recipe = scope, first.recipe
        scope.objective.check(scope.params, scope.batch, scope.key)
        x = scope.objective.example(scope.batch).x
        bases = {} if scope.bases is None else scope.bases(first.rotated)
        absent = frozenset(path for path, each in bases.items() if is_masked(each))
        closed, self.all_blocks = first.recipe.blocks(scope.objective, scope.params, x, absent)
        self.blocks = tuple(b for q in quantities for b in q.mine(self.all_blocks))
        _check_bases(self.blocks, bases)
        self.run = tapped_pass(
            scope.objective,
            scope.params,
            scope.batch,
            scope.key,
            closed,
            self.blocks,
            bases,
            first.recipe.sharing,
        )
        self._moments: Moments | None = None
        self._pulled: Any = None

    @property
    def pulled(self) -> Any:
        """The gradient without its l2 term, and the statistics of its backward pass."""
        if self._pulled is None:
            self._pulled = self.run.pull(self._scope.objective.score_of(self.run.linearisation))
        return self._pulled

    @property
    def moments(self) -> Moments:
        if self._moments is None:
            scope, recipe = self._scope, self._recipe
            in_gradient = recipe.fisher in ("empirical", "forward_only")
            self._moments = collect_moments(
                scope.objective,
                scope.batch,
                scope.key,
                self.run,
                self.blocks,
                recipe.fisher,
                recipe.samples,
                recipe.sharing,
                self.pulled if in_gradient else None,
            )
        return self._moments


def _check_bases(blocks: tuple[Block, ...], bases: Any) -> None:
    for block in blocks:
        if not isinstance(block, KroneckerBlock) or block.path in bases:
            continue
        if "sketch" in (block.input.kind, block.output.kind):
            raise ValueError(
                f"{block.path}: a low-rank factor is sketched in the basis that the "
                "optimizer's state holds: pass state=…, the state of the method, to observe."
            )


def moments_of(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: PRNGKeyArray | None,
    quantity: BlockMoments,
    bases: Any = None,
) -> tuple[tuple[Block, ...], Moments]:
    """The blocks of a model and their moments on one batch, outside of any plan."""
    scope = Scope(objective, params, batch, key, bases=bases)
    tapped = TappedScope(scope, (quantity,))
    return tapped.all_blocks, tapped.moments
