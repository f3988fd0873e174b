"""A table of where a model uses its parameters, and which block each goes to."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from curvax import _tree
from curvax._tables import table
from curvax.batch import Batch
from curvax.objective import Objective
from curvax.taps.blocks import Block, DiagonalBlock, Form, find_blocks
from curvax.taps.wishes import Ranks


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter leaf: what it is used as, and the block that it belongs to.

    - `path`, `shape`: of the leaf.
    - `kind`: `dense`, `conv` or `embedding` for a weight, `bias` for what is a part of a weight's
      block, `scale` or `shift` for what is used elementwise, several joined by ` + ` for a leaf
      with several uses, `?` for a use that was not understood.
    - `block`: the path of the block's weight.
    - `stack`: how many matrices the leaf holds (layers that are scanned over, groups, heads).
    - `parts`: of how many parts the outputs of a fused weight consist; each is a matrix of the
      stack.
    - `positions`: how often an example uses it (times, places, tokens).
    - `factors`: the forms of its input and output factor, None for a diagonal block.
    - `reason`: why a block is diagonal, if that is a fallback; else empty.
    - `bytes`: of the block's factors, and `flops` of one preconditioned gradient, both counted at
      the weight.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    block: str
    stack: int
    parts: int
    positions: int
    factors: tuple[Form, Form] | None
    reason: str
    bytes: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Sites:
    """The sites of a model, in the order of its leaves; printed as a table.

    `sites[path]` is that of one leaf.
    """

    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, path: str) -> Site:
        for site in self.sites:
            if site.path == path:
                return site
        raise KeyError(f"{path}: no leaf has this path; there are {[s.path for s in self.sites]}.")

    @property
    def fallbacks(self) -> tuple[Site, ...]:
        """The leaves whose use was not understood, which have a diagonal block instead."""
        return tuple(site for site in self.sites if site.reason)

    def __str__(self) -> str:
        heading = (
            "parameter",
            "shape",
            "kind",
            "block",
            "stack",
            "in",
            "out",
            "bytes",
            "FLOPs",
            "",
        )
        rows: list[tuple[str, ...]] = [heading]
        for site in self.sites:
            own = site.block == site.path
            forms = site.factors or (None, None)
            rows.append(
                (
                    site.path,
                    "×".join(map(str, site.shape)) or "scalar",
                    site.kind,
                    ("Kronecker" if site.factors else "diagonal") if own else f"with {site.block}",
                    _stack(site) if own and site.factors else "",
                    *(str(form) if own and form else "" for form in forms),
                    f"{site.bytes:,}" if own else "",
                    f"{site.flops:,}" if own else "",
                    f"FALLS BACK TO A DIAGONAL: {site.reason}" if site.reason else "",
                )
            )
        return "\n".join(line.rstrip() for line in table(rows))


def _stack(site: Site) -> str:
    return f"{site.stack} ({site.parts} parts)" if site.parts > 1 else str(site.stack)


def sites(
    objective: Objective,
    model: PyTree[Any],
    batch: Batch,
    *,
    rank: Ranks = None,
    diagonal: tuple[str, ...] = (),
    fused: Mapping[str, int] | None = None,
) -> Sites:
    """Every parameter leaf of a model: how it is used, and which block it goes to.

    **Arguments:**

    - `objective`: what is minimised; it needs no `example` here.
    - `model`: the model, or its trained part.
    - `batch`: a batch, or its shapes.
    - `rank`, `diagonal`, `fused`: as of [`kfac`][curvax.methods.kfac.kfac]; by default factors are
      full.

    **Returns** the sites in the order of the leaves. Print them for a table; `fallbacks` has the
    leaves that fell back to a diagonal. Nothing is computed: the model is traced on the shapes of
    one example. **Raises** `ValueError` for a batch that is no batch of this objective, and for a
    rank out of range or for a path that no leaf has.
    """
    params, objective = objective.bind(model)
    x = objective.example(batch).x
    _, blocks = find_blocks(objective, params, x, rank=rank, diagonal=diagonal, fused=fused)
    leaves, paths = jax.tree.leaves(params), _tree.paths(params)
    found: dict[int, Site] = {}
    for block in blocks:
        for leaf in block.leaves:
            site = _site(block, leaf, leaves, paths)
            before = found.get(leaf)
            if before is not None:  # a leaf in slices, each a block
                site = dataclasses.replace(
                    before,
                    stack=before.stack + site.stack,
                    bytes=before.bytes + site.bytes,
                    flops=before.flops + site.flops,
                )
            found[leaf] = site
    return Sites(tuple(found[i] for i in range(len(paths))))


def _site(block: Block, leaf: int, leaves: list[Any], paths: list[str]) -> Site:
    shape, dtype = leaves[leaf].shape, _tree.accumulation_dtype(leaves[leaf].dtype)
    owner = paths[block.leaf]
    if isinstance(block, DiagonalBlock):
        size = leaves[leaf].size
        positions = max((use.arrangement.positions for use in block.uses), default=1)
        factors, stack, parts, kind, flops, reason = None, 1, 1, block.kind, size, block.reason
        numbers = size
    else:
        positions = sum(use.arrangement.positions * use.repeats for use in block.uses)
        factors, reason = (block.input, block.output), ""
        stack, parts = block.stack, block.parts
        kind = block.kind if leaf == block.leaf else "bias"
        numbers = block.numbers
        flops = stack * sum(
            _flops(form, other)
            for form, other in (
                (block.input, block.output.size),
                (block.output, block.input.size),
            )
        )
    nbytes = numbers * dtype.itemsize
    return Site(
        paths[leaf], shape, kind, owner, stack, parts, positions, factors, reason, nbytes, flops
    )


def _flops(form: Form, columns: int) -> int:
    if form.kind == "diagonal":
        return form.size * columns
    width = 2 * form.rank if form.kind == "sketch" else form.size
    return 2 * form.size * width * columns
