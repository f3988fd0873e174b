"""Checks of numbers against a range. What is no plain number, but traced, is taken as it is."""

from typing import Any


def check_share(name: str, value: Any, one: bool = False) -> None:
    """**Raises** `ValueError` for a number outside of [0, 1), or of [0, 1] if `one` is allowed."""
    if isinstance(value, int | float) and not (0 <= value < 1 or (one and value == 1)):
        raise ValueError(f"{name}: got {value}, wanted a number in [0, 1{']' if one else ')'}.")


def check_positive(name: str, value: Any, zero: bool = False) -> None:
    """**Raises** `ValueError` for a number that is not positive, nor zero if that is allowed."""
    if isinstance(value, int | float) and not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name}: got {value}, wanted a number {'≥' if zero else '>'} 0.")


def check_count(name: str, value: int) -> None:
    """**Raises** `ValueError` for a number below 1."""
    if value < 1:
        raise ValueError(f"{name}: got {value}, wanted at least 1.")


def check_cadence(name: str, every: int | None, never: bool = False) -> None:
    """**Raises** `ValueError` for a number of steps below 1. None is for `never`, if allowed."""
    if not (never and every is None) and (every is None or every < 1):
        wanted = "a number of steps ≥ 1" + (", or None for never" if never else "")
        raise ValueError(f"{name}: got {every}, wanted {wanted}.")


def check_decays(*, sums: bool = False, **decays: Any) -> None:
    """**Raises** `ValueError` for what is no weight of a past. With `sums` 1 is one."""
    for name, decay in decays.items():
        if not sums:
            check_share(name, decay)
        elif isinstance(decay, int | float) and not 0 <= decay <= 1:
            raise ValueError(f"{name}: got {decay}, wanted a number in [0, 1], 1 for a sum.")
