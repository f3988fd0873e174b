"""Programs that need several devices: in a process of their own, where a CPU is split into some."""

import os
import pathlib
import subprocess
import sys
import textwrap

_ROOT = pathlib.Path(__file__).parents[1]


def printed(program: str, devices: int = 4) -> list[str]:
    """The words that a program prints on so many devices of the CPU; it has to succeed."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    # A factorisation on each device, with all threads of the CPU each, takes twenty times as long.
    # XLA's threads wait in collectives: with one for each device, two collectives that devices
    # begin in different orders may wait for each other forever.
    threads = {"OPENBLAS_NUM_THREADS": "1", "PJRT_NPROC": str(4 * devices)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ
        | threads
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)},
        cwd=_ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()
