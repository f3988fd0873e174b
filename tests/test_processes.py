"""Training in several processes, started as a user would, on data made here."""

import json
import os
import pathlib
import random
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import data, distributed
from tests.toys import images

_ROOT = pathlib.Path(__file__).parents[1]
BATCH, STEPS = 32, 12
METHODS = ("kfac", "sophia_g")
# `python -m experiments.distributed`, but for the data; no process may read more than its rows.
PROGRAM = """
import os, sys
from experiments import data, distributed, models
from tests.toys import images

def batches(*args, **options):
    for part in data.batches(*args, **options):
        assert len(part[0]) == int(os.environ["ROWS"])
        yield part

models.IMAGE_WIDTHS = (16,)
distributed.load, distributed.batches = lambda name: images(), batches
sys.exit(distributed.main())
"""


def start(*flags, rows=BATCH, devices=1, **environment):
    forced = f"--xla_force_host_platform_device_count={devices}"
    environment |= {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {forced}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(_ROOT),
        "ROWS": str(rows),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        cwd=_ROOT,
    )


def ended(*processes):
    """What each wrote; all have to succeed."""
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def usual(out):
    # Where sums are rounded to float32, each way to split them has its own curve.
    return ("--methods", *METHODS, "--steps", STEPS, "--batch", BATCH, "--float64", "--out", out)


def curves(out):
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["method"], line["step"]) for line in lines] == [
        (method, step) for method in METHODS for step in range(STEPS)
    ]
    return np.array([line["loss"] for line in lines])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curves of one process with one device."""
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    ended(start(*usual(out)))
    losses = curves(out).reshape(len(METHODS), STEPS)
    assert (losses[:, -1] < 0.8 * losses[:, 0]).all()
    return losses.ravel()


def test_two_processes_that_slurm_starts_share_a_mesh_of_two_axes(alone, tmp_path):
    out = tmp_path / "out.jsonl"
    job = {
        "SLURM_JOB_ID": str(random.randrange(4096)),  # JAX makes the port of it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
    }
    flags = (*usual(out), "--mesh", "data=2,tensor=2")
    first, second = ended(
        *(
            start(*flags, rows=16, devices=2, **job, SLURM_PROCID=i, SLURM_LOCALID=i)
            for i in ("0", "1")
        )
    )
    np.testing.assert_allclose(curves(out), alone, rtol=1e-6)
    assert "2 processes, 4 × cpu: data 2, tensor 2" in first
    assert f"written: {out}" in first
    assert "processes" not in second and "loss" not in second


def test_four_processes_that_are_told_of_each_other(alone, tmp_path):
    out, port = tmp_path / "out.jsonl", free_port()
    meet = ("--coordinator", f"localhost:{port}", "--processes", 4, "--process")
    ended(*(start(*usual(out), *meet, i, rows=8) for i in range(4)))
    np.testing.assert_allclose(curves(out), alone, rtol=1e-6)


def test_the_parts_of_batches_make_up_the_whole():
    arrays = images().train
    whole = list(data.batches(arrays, BATCH, seed=3, steps=15))
    parts = [
        list(data.batches(arrays, BATCH, seed=3, steps=15, rows=slice(i, i + 8)))
        for i in range(0, BATCH, 8)
    ]
    for step, batch in enumerate(whole):
        for i, array in enumerate(batch):
            together = np.concatenate([part[step][i] for part in parts])
            np.testing.assert_array_equal(together, array)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mesh", "data=64"), "has 64 places, and there are"),
        (("--mesh", "model=1"), "wanted each of data, fsdp, tensor at most once"),
        (("--batch", "401"), "wanted 1 to 400"),
        (("--methods", "newton_direct"), "parameters, and dense curvature is for at most"),
        (("--processes", "2", "--process", "0"), "they need --coordinator host:port too"),
        (("--coordinator", "localhost:1"), "pass --processes N --process I"),
        (("--coordinator", "host", "--processes", "2", "--process", "0"), "wanted host:port"),
        (("--coordinator", "a:1", "--processes", "2", "--process", "2"), "wanted 0 to 1"),
    ],
)
def test_what_does_not_fit_is_said(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "load", lambda name: images())
    assert distributed.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused():
    mesh = jax.sharding.AbstractMesh((4, 2, 3), ("data", "fsdp", "tensor"))
    with pytest.raises(distributed.Unusable, match="8 does not divide it; take 24"):
        distributed.batch_sharding(mesh, 31)


def test_a_port_that_is_taken_is_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        where = f"localhost:{taken.getsockname()[1]}"
        flags = ("--coordinator", where, "--processes", "2", "--process", "0")
        assert distributed.main(flags) == 2
    assert "process 0 cannot listen at port" in capsys.readouterr().err


def test_a_coordinator_that_is_not_there_ends_the_wait():
    meet = ("--coordinator", f"localhost:{free_port()}", "--processes", 2, "--process", 1)
    process = start(*meet, "--timeout", 2)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert "the processes did not meet within 2 seconds" in said
    assert "Traceback" not in said
