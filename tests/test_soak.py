"""Long runs: memory that does not grow, nothing compiled on the way, and that growth is seen."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments import models, soak
from experiments.soak import Reading
from experiments.training import Task
from tests.toys import images

MIB = 2**20


def test_three_hundred_steps_take_no_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "load", lambda name: images())
    monkeypatch.setattr(models, "IMAGE_WIDTHS", (16,))
    out = tmp_path / "soak.json"
    flags = ("--steps", "300", "--every", "50", "--batch-size", "32", "--out", str(out))
    assert soak.main(["--methods", "kfac", "soap", *flags]) == 0, capsys.readouterr().err
    sections = json.loads(out.read_text())["sections"]
    assert set(sections) == {"kfac", "soap"}
    for rows in sections.values():
        assert [row["step"] for row in rows] == list(range(50, 301, 50))
        assert rows[0]["arrays' bytes"] > 64 * 16 * 4  # the weights of a layer, at least
        assert all(row["compiled"] == rows[0]["compiled"] > 0 for row in rows)


def test_what_is_hoarded_is_seen():
    hoard, compiled = [], []

    def keep(x):
        hoard.append(jnp.copy(x))
        if len(hoard) > 20:  # a program of its own for each step
            compiled.append(jax.jit(lambda y: y + len(hoard))(x))
        return x

    task = Task(images(), "mlp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak.jax, "block_until_ready", keep)
        found = list(soak.readings("adam", task, steps=40, batch_size=32, every=20))
    said = soak.grown(found, 64 * MIB)
    assert "20 programs compiled after step 20" in said
    assert any("arrays more" in line for line in said)


@pytest.mark.parametrize(
    ("resident", "said"),
    [
        ((10, 50, 11, 12), []),  # a peak is no growth
        ((10, 20, 30, 40), ["20.0 MiB more in the second half of the run"]),
        ((40, 10, 10, 10), []),
    ],
)
def test_resident_bytes_are_held_against_those_of_the_first_half(resident, said):
    found = [Reading(100 * i, bytes_ * MIB, 5, 2, 3) for i, bytes_ in enumerate(resident, 1)]
    assert soak.grown(found, 4 * MIB) == said


def test_too_few_readings_are_refused(capsys):
    assert soak.main(["--steps", "100", "--every", "51"]) == 2
    assert "at least two readings" in capsys.readouterr().err
