"""What a user asks of the blocks, for all leaves or by path: ranks, fused weights, diagonals."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The default of the methods, and of leaves that a mapping of ranks leaves out.
SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class ByPath:
    """A setting by parts of the paths of leaves: the longest part that a path has decides (of
    equally long ones the first in alphabetical order). The part "" is in every path.

    `name`: of the argument, for messages.
    """

    name: str
    items: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(name: str, mapping: Mapping[str, Any]) -> "ByPath":
        """From a mapping, as a hashable value."""
        order = lambda item: (-len(item[0]), item[0])
        return ByPath(name, tuple(sorted(mapping.items(), key=order)))

    def get(self, path: str, default: Any) -> Any:
        """The setting of a leaf."""
        return next((value for part, value in self.items if part in path), default)

    def check(self, paths: Sequence[str], what: str = "leaf") -> None:
        """**Raises** `ValueError` for a part that is in none of the paths."""
        for part, _ in self.items:
            if part and not any(part in path for path in paths):
                raise ValueError(
                    f"{self.name}: got the key {part!r}, which is no part of the path of a {what}; "
                    f"there are {', '.join(paths)}."
                )


@dataclasses.dataclass(frozen=True)
class StateBudget:
    """The largest rank for which factors and one momentum fit into `of_adam` times Adam's state."""

    of_adam: float

    @staticmethod
    def parse(text: str) -> "StateBudget":
        """From a text such as "0.75x adam". **Raises** `ValueError` for any other."""
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*[x×]\s*adam\s*", text, re.IGNORECASE)
        if match is None or float(match[1]) == 0:
            raise ValueError(
                f"state_budget: got {text!r}, wanted a multiple of Adam's, such as '1.0x adam'."
            )
        return StateBudget(float(match[1]))


# Of a factor: a share of its size, a number of columns, or None for a full matrix.
SideRank = float | int | None
# Of a block: of both its factors, or of the input's and of the output's.
BlockRank = SideRank | tuple[SideRank, SideRank]
Ranks = BlockRank | Mapping[str, BlockRank]
Rank = Ranks | ByPath | StateBudget


def as_rank(rank: Rank) -> BlockRank | ByPath | StateBudget:
    """A rank as a hashable value. **Raises** `ValueError` for one out of range."""
    if isinstance(rank, Mapping):
        rank = ByPath.of("rank", rank)
    if isinstance(rank, StateBudget):
        return rank
    wanted = dict(rank.items) if isinstance(rank, ByPath) else {"": rank}
    for part, each in wanted.items():
        for side in each if isinstance(each, tuple) else (each,):
            share = isinstance(side, float) and not 0 < side <= 1
            if share or (isinstance(side, int) and side < 1):
                where = f" for {part!r}" if isinstance(rank, ByPath) else ""
                raise ValueError(
                    f"rank: got {side}{where}, wanted a share in (0, 1], a number of columns ≥ 1, "
                    "or None for full factors."
                )
    return rank


# Parts that the outputs of a weight consist of, by a part of its path.
Parts = Mapping[str, int] | ByPath | None


def as_parts(parts: Parts) -> ByPath:
    """Parts as a hashable value. **Raises** `ValueError` for a number of parts below 1."""
    parts = parts if isinstance(parts, ByPath) else ByPath.of("fused", parts or {})
    for part, count in parts.items:
        if count < 1:
            raise ValueError(f"fused: got {count} for {part!r}, wanted a number of parts ≥ 1.")
    return parts


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What was asked for, leaf by leaf."""

    rank: Any
    diagonal: tuple[str, ...]
    fused: ByPath
    absent: frozenset[str]

    def ranks(self, path: str) -> tuple[Any, Any]:
        """Of the input and of the output factor."""
        rank = self.rank.get(path, SHARE) if isinstance(self.rank, ByPath) else self.rank
        return rank if isinstance(rank, tuple) else (rank, rank)

    def asks_diagonal(self, path: str) -> bool:
        return any(part in path for part in self.diagonal)

    def frees(self, bias: str) -> bool:
        """Whether a bias is to be no part of a weight's block."""
        return bias in self.absent or self.asks_diagonal(bias)
