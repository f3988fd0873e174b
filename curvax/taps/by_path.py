"""Settings that differ from leaf to leaf."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


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
