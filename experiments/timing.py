"""Timing side by side: variants in one process, interleaved, compared by ratios of medians."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

PACKAGES = ("curvax", "jax", "equinox", "optax", "lineax", "python-somax", "kfac-jax")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each round of one variant, and of its first call (compilation included)."""

    name: str
    seconds: tuple[float, ...]
    first_call: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 4:
            return float("nan")
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return 0.5 * (upper - lower) / self.median


def interleave(
    variants: dict[str, Callable[[], Any]],
    *,
    seconds: float = 10.0,
    least: int = 7,
    most: int = 400,
) -> dict[str, Timing]:
    """Times the variants in turn, round after round, for about `seconds` in all.

    A variant is a function without arguments; what it returns is waited for. Whatever disturbs
    the machine then disturbs all of them alike. The first two calls of each are not counted.
    """
    first: dict[str, float] = {}
    for name, run in variants.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        first[name] = time.perf_counter() - start
        jax.block_until_ready(run())
    rounds: dict[str, list[float]] = {name: [] for name in variants}
    began = time.perf_counter()
    while True:
        for name, run in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            rounds[name].append(time.perf_counter() - start)
        done = len(next(iter(rounds.values())))
        if done >= most or (done >= least and time.perf_counter() - began > seconds):
            break
    return {name: Timing(name, tuple(taken), first[name]) for name, taken in rounds.items()}


def provenance() -> dict[str, Any]:
    """What a figure needs beside it: device, versions, date, command."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": "python -m " + _module() + "".join(f" {arg}" for arg in sys.argv[1:]),
    }


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else sys.argv[0]
