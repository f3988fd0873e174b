"""Which block of the curvature each leaf of the parameters goes to, and how factors are held."""

import dataclasses
from typing import Any

import jax
import numpy as np

from curvax import _tree
from curvax.objective import Objective, Params
from curvax.taps.arrangement import AbstractProduct, Elementwise, Fused, Lookup
from curvax.taps.find import Found, find_uses
from curvax.taps.layout import View, flipped, on_host, place_in, tile
from curvax.taps.statistics import Kind, Sharing, Statistics
from curvax.taps.uses import Unknown, Use
from curvax.taps.wishes import ByPath, Parts, Rank, StateBudget, Wishes, as_parts, as_rank

# Sides longer than this (a vocabulary) have a diagonal factor.
LONGEST = 8192
# Sides at most this long are held whole, whatever the rank.
WHOLE = 32
# Ranks given as a share are rounded down to whole tiles of matrix units.
TILE = 16


@dataclasses.dataclass(frozen=True)
class Form:
    """How one factor is held: `full`, `sketch` (low rank), `diagonal`, or `none` (the identity)."""

    kind: Kind
    size: int
    rank: int = 0

    @staticmethod
    def of(size: int, other: int, rank: float | int | None) -> "Form":
        """The form of a factor, next to one of size `other`."""
        if size > LONGEST:
            return Form("diagonal", size)
        if rank is None or size <= WHOLE:
            return Form("full", size)
        columns = rank if isinstance(rank, int) else max(int(rank * size), 1)
        if isinstance(rank, float) and rank < 1:
            # The basis of a long side shall cost at most half of what the weight does.
            columns = min(columns, max(other // 2, WHOLE))
            columns -= columns % TILE if columns >= 2 * TILE else 0
        return Form("full", size) if columns >= size else Form("sketch", size, columns)

    def __str__(self) -> str:
        rank = f" at rank {self.rank}" if self.kind == "sketch" else ""
        prefix = {"diagonal": "diagonal ", "none": "identity "}.get(self.kind, "")
        return f"{prefix}{self.size}{rank}"

    @property
    def numbers(self) -> int:
        """Numbers that a state keeps of one such factor: its average, and its damped inverse."""
        if self.kind == "sketch":
            return self.size * self.rank + 2 * self.rank**2 + 2
        return 2 * self.size ** (2 if self.kind == "full" else 1)


@dataclasses.dataclass(frozen=True)
class KroneckerBlock:
    """The block of a weight (with its bias): one Kronecker product for each matrix of a stack.

    `view` sees the weight as (stack, out, in); a bias is one more input. `swapped` says of each
    use whether its outputs are the inputs of the block (a tied embedding), `flipped` that the
    weight lies in memory as (stack, in, out). `rows` as of `Statistics`.
    """

    path: str
    leaf: int
    bias: int | None
    view: View
    bias_view: View | None
    stack: int
    input: Form
    output: Form
    uses: tuple[Use, ...]
    swapped: tuple[bool, ...]
    flipped: bool = False
    rows: int | None = None

    @property
    def kind(self) -> str:
        return " + ".join(dict.fromkeys(use.kind for use in self.uses))

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.leaf,) if self.bias is None else (self.leaf, self.bias)

    @property
    def parts(self) -> int:
        """Of how many parts the outputs are, each with a matrix of the stack."""
        arrangements = [use.arrangement for use in self.uses]
        return max((a.parts for a in arrangements if isinstance(a, Fused)), default=1)

    @property
    def numbers(self) -> int:
        """Numbers in its factors."""
        return self.stack * (self.input.numbers + self.output.numbers)

    def statistics(self, index: int, sharing: Sharing, weighted: bool) -> Statistics:
        """The rule of the tap at a use."""
        input, output = self.input, self.output
        if self.swapped[index]:
            input, output = output, input
        arrangement = self.uses[index].arrangement
        assert isinstance(arrangement, AbstractProduct)
        return Statistics(
            arrangement,
            input.kind,
            output.kind,
            input.rank,
            output.rank,
            self.bias is not None,
            sharing,
            weighted,
            rows=self.rows,
        )


@dataclasses.dataclass(frozen=True)
class DiagonalBlock:
    """The block of a leaf whose curvature is kept as a diagonal; `reason` says why, if that is a
    fallback. Without uses the diagonal is estimated from whole gradients. With `rows` it is taken
    from some examples only.
    """

    path: str
    leaf: int
    uses: tuple[Use, ...]
    reason: str = ""
    rows: int | None = None

    @property
    def loops(self) -> int:
        """Leading axes of the leaf that the model scans over, if it does so everywhere."""
        depths = {use.view.depth for use in self.uses}
        return depths.pop() if len(depths) == 1 else 0

    @property
    def kind(self) -> str:
        return " + ".join(dict.fromkeys(use.kind for use in self.uses)) or "?"

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.leaf,)


Block = KroneckerBlock | DiagonalBlock


def input_side(block: Block) -> Block:
    """The block without an output factor: the identity stands for it, and nothing is measured."""
    if isinstance(block, DiagonalBlock):
        return block
    uses = tuple(u for u, swapped in zip(block.uses, block.swapped, strict=True) if not swapped)
    output = Form("none", block.output.size)
    return dataclasses.replace(block, uses=uses, swapped=(False,) * len(uses), output=output)


def find_blocks(
    objective: Objective,
    params: Params,
    x: Any,
    *,
    rank: Rank = None,
    diagonal: tuple[str, ...] = (),
    fused: Parts = None,
    absent: frozenset[str] = frozenset(),
) -> tuple[Any, tuple[Block, ...]]:
    """The jaxpr of one example of a batch of inputs x, and the blocks of its parameters.

    `diagonal` names leaves (by a part of their path) whose block is to be diagonal, `fused` those
    whose outputs consist of so many equal parts, each with a block of its own, and `absent` has the
    whole paths of leaves without a block, which are taken as constants.

    **Raises** `ValueError` for a rank out of range, for a path that no leaf has, for outputs that
    are no such parts, and for a model that cannot be applied to an example.
    """
    wishes = Wishes(as_rank(rank), diagonal, as_parts(fused), absent)
    first = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    leaves, treedef = jax.tree.flatten(params)
    one = jax.tree.map(first, x)

    def predict(leaves: Any, x: Any, key: Any) -> Any:
        return objective.predict_one(jax.tree.unflatten(treedef, leaves), x, key)

    key = jax.eval_shape(lambda: jax.random.key(0)) if objective.stochastic else None
    try:
        closed = jax.make_jaxpr(predict)(leaves, one, key)
    except (AttributeError, TypeError, ValueError) as error:
        raise objective.inapplicable(params, one, error) from error
    variables = {var: i for i, var in enumerate(closed.jaxpr.invars[: len(leaves)])}
    found = find_uses(closed.jaxpr, variables)
    paths = _tree.paths(params)
    make = lambda rank: _blocks(found, paths, leaves, dataclasses.replace(wishes, rank=rank))
    budget = isinstance(wishes.rank, StateBudget)
    kept = {i: leaf for i, leaf in enumerate(leaves) if paths[i] not in absent}
    blocks = _affordable(make, kept, wishes.rank) if budget else make(wishes.rank)
    if isinstance(wishes.rank, ByPath):
        # A leaf in slices has a block, and a path, for each.
        wishes.rank.check(list(dict.fromkeys((*paths, *(block.path for block in blocks)))))
    weights = [block.path for block in blocks if isinstance(block, KroneckerBlock)]
    wishes.fused.check([*weights, *absent], "weight with a Kronecker block")
    return closed, blocks


def _affordable(make: Any, leaves: dict[int, Any], budget: StateBudget) -> tuple[Block, ...]:
    """The blocks of the largest share of a rank, in steps of 1/64, that the budget allows."""
    size = sum(leaf.size for leaf in leaves.values())
    allowed = (2 * budget.of_adam - 1) * size

    def needed(blocks: tuple[Block, ...]) -> int:
        return sum(
            b.numbers if isinstance(b, KroneckerBlock) else leaves[b.leaf].size for b in blocks
        )

    low, high = 1, 64
    if needed(make(low / 64)) > allowed:
        least = (needed(make(low / 64)) / size + 1) / 2
        raise ValueError(
            f"state_budget: got {budget.of_adam:g}x adam, wanted at least {least:.2f}x: a momentum "
            "and the smallest factors (rank 1/64) need as much."
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(make(middle / 64)) <= allowed else (low, middle - 1)
    return make(low / 64)


def _blocks(found: Found, paths: list[str], leaves: list[Any], wishes: Wishes) -> tuple[Block, ...]:
    by_leaf: dict[int, list[Use | Unknown]] = {i: [] for i in range(len(paths))}
    for use in found:
        by_leaf[use.leaf if isinstance(use, Unknown) else use.view.leaf].append(use)
    blocks: list[Block] = []
    biases: dict[int, list[int]] = {}
    for leaf, uses in by_leaf.items():
        if paths[leaf] in wishes.absent:
            continue
        asked = wishes.asks_diagonal(paths[leaf])
        made = None if asked else _kronecker(leaf, paths[leaf], leaves[leaf], uses, wishes)
        for block in made or ():
            if block.bias is not None:
                biases.setdefault(block.bias, []).append(len(blocks))
            blocks.append(block)
    for bias, users in biases.items():
        # A bias of two blocks, or one that is also used by itself, belongs to neither.
        if len(users) > 1 or by_leaf[bias] or wishes.frees(paths[bias]):
            for index in users:
                blocks[index] = _without_bias(blocks[index])
    for use in found:
        # What does not become a part of a weight's block has one of its own.
        if isinstance(use, Use) and use.shift is not None:
            by_leaf[use.shift.view.leaf].append(use.shift)
    covered = {leaf for block in blocks for leaf in block.leaves}
    for leaf in range(len(paths)):
        if leaf not in covered and paths[leaf] not in wishes.absent:
            asked = wishes.asks_diagonal(paths[leaf])
            blocks.append(_diagonal(leaf, paths[leaf], by_leaf[leaf], asked))
    order = sorted(blocks, key=lambda block: block.leaf)
    return tuple(order)


def _kronecker(
    leaf: int, path: str, struct: Any, uses: list[Use | Unknown], wishes: Wishes
) -> list[KroneckerBlock] | None:
    """The blocks of a leaf that is only used in products, if they fit together."""
    products = [
        use for use in uses if isinstance(use, Use) and not isinstance(use.arrangement, Elementwise)
    ]
    if not products or len(products) < len(uses):
        return None
    views: dict[View, list[Use]] = {}
    for use in products:
        views.setdefault(use.view, []).append(use)
    parts = wishes.fused.get(path, 1)
    if len(views) == 1 and not products[0].view.partial:
        uses_of_parts = [_in_parts(use, path, parts) for use in products]
        return [_block(leaf, path, uses_of_parts, (False,) * len(products), wishes)]
    sliced = all(view.partial for view in views) and tile(views)
    if parts > 1 and not (sliced and len(views) == parts):
        raise ValueError(
            f"fused: got {parts} parts for {path}, which the model itself uses as {len(views)} "
            "different matrices."
        )
    if sliced:
        return [
            _block(leaf, f"{path}[{i}]", group, (False,) * len(group), wishes)
            for i, group in enumerate(views.values())
        ]
    swapped = _tied(products, struct)
    return None if swapped is None else [_block(leaf, path, products, swapped, wishes)]


def _in_parts(use: Use, path: str, parts: int) -> Use:
    """A use of a weight whose outputs are several parts: that many matrices, one after another."""
    whole = use.arrangement
    if parts == 1:
        return use
    assert isinstance(whole, AbstractProduct)
    if isinstance(whole, Lookup):
        raise ValueError(f"fused: got {parts} parts for {path}, wanted a weight, not an embedding.")
    if whole.outputs % parts:
        raise ValueError(
            f"fused: got {parts} parts for {path}, whose {whole.outputs} outputs are no {parts} "
            "equal parts."
        )
    fused = Fused.of(whole, parts)
    shape = (fused.stack, fused.outputs)
    bias = None if use.bias is None else use.bias.then("reshape", shape, shape)
    shape = (*shape, fused.inputs)
    view = use.view.then("reshape", shape, shape)
    return dataclasses.replace(use, view=view, bias=bias, arrangement=fused)


def _block(
    leaf: int, path: str, uses: list[Use], swapped: tuple[bool, ...], wishes: Wishes
) -> KroneckerBlock:
    frame = uses[swapped.index(False)]
    bias_views = {use.bias for use in uses}
    bias = bias_views.pop() if len(bias_views) == 1 and not any(swapped) else None
    arrangement = frame.arrangement
    inputs, outputs = arrangement.inputs + (bias is not None), arrangement.outputs
    ranks = wishes.ranks(path)
    input, output = Form.of(inputs, outputs, ranks[0]), Form.of(outputs, inputs, ranks[1])
    if any(isinstance(use.arrangement, Lookup) for use in uses):
        input = Form("diagonal", arrangement.inputs)
    return KroneckerBlock(
        path,
        leaf,
        None if bias is None else bias.leaf,
        frame.view,
        bias,
        frame.stack,
        input,
        output,
        tuple(uses),
        swapped,
        flipped(frame.view),
    )


def _without_bias(block: Block) -> Block:
    assert isinstance(block, KroneckerBlock)
    input = dataclasses.replace(block.input, size=block.input.size - 1)
    return dataclasses.replace(block, bias=None, bias_view=None, input=input)


def _tied(uses: list[Use], struct: Any) -> tuple[bool, ...] | None:
    """For uses of a leaf as a matrix and as its transpose: which are transposed."""
    first = next((use for use in uses if isinstance(use.arrangement, Lookup)), uses[0])
    if any(use.view.partial or use.view.depth or use.view.repeats for use in uses):
        return None
    memory = np.empty(struct.shape, np.int8)
    frame = place_in(on_host(first.view, memory), memory)
    swapped = []
    for use in uses:
        seen = on_host(use.view, memory)
        if frame is None or seen.ndim != 3:
            return None
        if place_in(seen, memory) == frame:
            swapped.append(False)
        elif place_in(seen.swapaxes(1, 2), memory) == frame:
            swapped.append(True)
        else:
            return None
    # The tied use must be able to hold what the other holds: no tables on both sides.
    if any(s and isinstance(u.arrangement, Lookup) for s, u in zip(swapped, uses, strict=True)):
        return None
    return tuple(swapped)


def _diagonal(leaf: int, path: str, uses: list[Use | Unknown], asked: bool) -> DiagonalBlock:
    elementwise = tuple(
        use for use in uses if isinstance(use, Use) and isinstance(use.arrangement, Elementwise)
    )
    if asked:
        reason = "asked for"
    elif not uses:
        reason = "the model does not use it"
    elif len(elementwise) == len(uses):
        return DiagonalBlock(path, leaf, elementwise)
    else:
        unknown = [use.reason for use in uses if isinstance(use, Unknown)]
        reason = unknown[0] if unknown else "its uses do not fit together"
    return DiagonalBlock(path, leaf, (), reason)
