"""What the factors in the state of an optimizer hold, and at which rank they still would."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from curvax._tables import table
from curvax.memories import AbstractMemory, DiagonalMemory
from curvax.operators.factors import AbstractFactor, DenseFactor, LowRankFactor
from curvax.refresh import FactorMemory
from curvax.taps import blocks
from curvax.taps.blocks import Form
from curvax.taps.wishes import BlockRank
from curvax.transform import method_states


@dataclasses.dataclass(frozen=True)
class FactorSummary:
    """One side of a block, as it is in the state.

    - `path`: of the block.
    - `side`: `"input"` or `"output"` of a Kronecker block, `"entries"` of a diagonal one.
    - `stack`: how many matrices there are. Of the others, the numbers are of the one that needs
      the most: the least `captured`, the largest `effective_rank`, the fewest `updates`.
    - `form`: size and rank. None for a diagonal block.
    - `captured`: the share of the factor's trace that lies in its basis; 1 unless it is of low
      rank. None before the first refresh, as the next.
    - `effective_rank`: how many eigenvalues of the core make up nearly all of its trace.
    - `updates`, `failures`: refreshes that came in, and such as were not finite (in all).
    - `age`: steps since the last refresh; None before the first.
    """

    path: str
    side: str
    stack: int
    form: Form | None
    captured: float | None
    effective_rank: int | None
    updates: int
    failures: int
    age: int | None


@dataclasses.dataclass(frozen=True)
class FactorReport:
    """What [`factor_report`][curvax.factor_report] returns: a sequence of
    [`FactorSummary`][curvax.FactorSummary], printed as a table.

    `share` is that of the trace which `effective_rank` is for.
    """

    factors: tuple[FactorSummary, ...]
    share: float

    def __iter__(self) -> Iterator[FactorSummary]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    @property
    def ranks(self) -> dict[str, BlockRank]:
        """The effective ranks of inputs and outputs by the path of each block: a `rank=` for
        [`kfac`][curvax.methods.kfac.kfac] with the least state that holds as much. Never above what
        there is; what was never refreshed stays as it is.
        """
        sides: dict[str, dict[str, int | None]] = {}
        for each in self.factors:
            if each.form is not None:
                sides.setdefault(each.path, {})[each.side] = _rank(each.form, each.effective_rank)
        return {path: (both["input"], both["output"]) for path, both in sides.items()}

    def __str__(self) -> str:
        said = lambda value: "" if value is None else str(value)
        rank = f"rank for {self.share:.4g}"
        rows: list[tuple[str, ...]] = [
            ("block", "side", "stack", "factor", "captured", rank, "updates", "failures", "age")
        ]
        for each in self.factors:
            captured = "" if each.captured is None else f"{each.captured:.3f}"
            form = said(each.form) or "diagonal"
            counters = map(said, (each.effective_rank, each.updates, each.failures, each.age))
            rows.append((each.path, each.side, str(each.stack), form, captured, *counters))
        return "\n".join(line.rstrip() for line in table(rows))


def factor_report(state: Any, share: float = 0.99) -> FactorReport:
    """How well the Kronecker factors of a live optimizer do, block by block and side by side.

    **Arguments:**

    - `state`: of a method with Kronecker factors, or anything that has it inside: of a chain, of a
      fused step.
    - `share`: of the trace in a factor's core, that its effective rank is to hold.

    **Returns** the report. Print it for a table; `report.ranks` is a `rank=` for a method whose
    state is no larger than it needs to be. Ranks are static: they take effect with a new method and
    a new state, `kfac(objective, rank=report.ranks)`. A `captured` far below 1 says that more
    columns may be worth their cost.

    Reads the state on the host and takes an eigendecomposition of each core: not for each step, and
    not inside of `jit`. **Raises** `ValueError` for a share out of (0, 1], and for a state that
    holds no factors.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, wanted a number in (0, 1].")
    found: list[FactorSummary] = []
    for method in method_states(state):
        memory = method.preconditioner
        for each in memory.values() if isinstance(memory, dict) else ():
            for path, own in each.split() if isinstance(each, AbstractMemory) else ():
                found.extend(_summaries(path, own, int(method.count), share))
    if not found:
        raise ValueError(
            "state: got none of a method with Kronecker factors, wanted that of kfac, ekfac or "
            "newton_muon, or one that has it inside."
        )
    return FactorReport(tuple(found), share)


def _summaries(path: str, each: Any, count: int, share: float) -> Iterator[FactorSummary]:
    refreshed = int(each.refreshed)
    age = None if refreshed < 0 else count - 1 - refreshed
    if isinstance(each, DiagonalMemory):
        counters = int(each.updates[0]), int(each.failures[0])
        yield FactorSummary(path, "entries", 1, None, None, None, *counters, age)
        return
    for side in ("input", "output"):
        yield _side(path, side, getattr(each, side), age, share)


def _side(
    path: str, side: str, memory: FactorMemory, age: int | None, share: float
) -> FactorSummary:
    updates, failures = np.asarray(memory.updates), np.asarray(memory.failures)
    form, captured, effective = _form(memory.factor), None, None
    if updates.min() > 0:
        spectra, shares = _spectra(memory.factor)
        captured = float(shares.min())
        effective = max(_enough(spectrum, share) for spectrum in spectra)
    elif form.kind == "diagonal" and np.all(np.asarray(memory.factor.diagonal()) == 1):
        form = Form("none", form.size)  # which is never refreshed
    counters = int(updates.min()), int(failures.sum())
    return FactorSummary(path, side, len(updates), form, captured, effective, *counters, age)


def _form(factor: AbstractFactor) -> Form:
    if isinstance(factor, LowRankFactor):
        return Form("sketch", factor.size, factor.core.shape[-1])
    return Form("full" if isinstance(factor, DenseFactor) else "diagonal", factor.size)


def _spectra(factor: AbstractFactor) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues in the basis of each matrix, and which share of its trace they are."""
    if isinstance(factor, LowRankFactor):
        spectra = np.linalg.eigvalsh(_wide(factor.core))
    elif isinstance(factor, DenseFactor):
        spectra = np.linalg.eigvalsh(_wide(factor.values))
    else:
        spectra = _wide(factor.diagonal())
    spectra = np.maximum(spectra, 0)
    inside = spectra.sum(axis=1)
    if not isinstance(factor, LowRankFactor):
        return spectra, np.ones_like(inside)
    trace = inside + (factor.size - spectra.shape[1]) * _wide(factor.tail)
    return spectra, np.where(trace > 0, inside / np.where(trace > 0, trace, 1), 1)


def _wide(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _enough(spectrum: np.ndarray, share: float) -> int:
    """The fewest of the eigenvalues that have a share of their sum."""
    sums = np.cumsum(np.sort(spectrum)[::-1])
    return int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1


def _rank(form: Form, effective: int | None) -> int | None:
    """The rank to ask for; None where a factor is whole anyway."""
    if form.kind in ("diagonal", "none") or form.size <= blocks.WHOLE:
        return None
    held = form.rank if form.kind == "sketch" else form.size
    rank = held if effective is None else min(effective, held)
    return None if rank >= form.size else rank
