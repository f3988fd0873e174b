"""The quickstart experiment, end to end on data made here."""

import json
import math

import jax
import numpy as np
import pytest

from experiments import data, quickstart
from experiments.plots import style
from experiments.recipes import RECIPES, Setting
from experiments.summary import Trial
from experiments.training import LENGTH, Run, Task, evaluate, smooth
from tests.toys import columns, images, letters

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _small_data(monkeypatch):
    made = {"fashion-mnist": images(), "yacht": columns(), "tinyshakespeare": letters()}
    monkeypatch.setattr(quickstart, "load", made.__getitem__)
    monkeypatch.setenv("COLUMNS", "100")


def run(tmp_path, *flags):
    assert quickstart.main(["--smoke", "--out", str(tmp_path), *flags]) == 0
    return json.loads((tmp_path / "quickstart.json").read_text())


def losses(document):
    runs = document["comparisons"][0]["runs"]
    return {(r["method"], r["learning_rate"]): r["losses"] for r in runs}


def test_smoke_writes_numbers_and_plot_and_prints_a_table(tmp_path, capsys):
    document = run(tmp_path, "--model", "mlp", "--methods", "adam", "ggn_cg")
    assert {"device", "versions", "date", "command", "settings", "smoothing"} <= set(document)
    assert document["command"].startswith("python -m experiments.quickstart --smoke")
    assert document["settings"]["seeds"] == [0]
    (comparison,) = document["comparisons"]
    adam, ggn = comparison["rows"]
    assert (adam["method"], ggn["method"]) == ("adam", "ggn_cg")
    assert adam["time_ratio"] == adam["state_ratio"] == adam["to_adam_ratio"] == 1
    # The warm start is one copy of the parameters; Adam has two.
    assert ggn["state_ratio"] == pytest.approx(0.5, abs=0.01)
    assert len(comparison["runs"]) == 4
    for one in comparison["runs"]:
        assert len(one["losses"]) == len(one["seconds"]) == 10
        assert one["losses"][-1] < one["losses"][0]
        assert not one["diverged"]
        assert 0 <= one["score"] <= 1
    assert (tmp_path / "quickstart.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "mlp (16,771 parameters) on fashion-mnist" in printed
    assert max(len(line) for line in printed.splitlines()[:-1]) <= 100
    for part in ("method", "Adam's end", "ggn_cg", "×Adam", "quickstart.json"):
        assert part in printed
    assert "…" not in printed


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path):
    flags = ("--model", "mlp", "--methods", "adam", "ggn_cg", "--cg-steps", "1", "--no-plot")
    first = losses(run(tmp_path / "0", *flags))
    both = run(tmp_path / "both", *flags, "--seeds", "0", "1")
    runs = both["comparisons"][0]["runs"]
    again, other = (
        {(r["method"], r["learning_rate"]): r["losses"] for r in runs if r["seed"] == seed}
        for seed in (0, 1)
    )
    assert again == first
    assert all(other[key] != first[key] for key in first)
    assert not (tmp_path / "0" / "quickstart.png").exists()


def test_the_convnet_trains(tmp_path):
    document = run(tmp_path, "--model", "cnn", "--methods", "adam", "--no-plot")
    assert document["comparisons"][0]["model"] == "cnn"


def test_regression_adds_egn(tmp_path, capsys):
    flags = quickstart.parser().parse_args(["--dataset", "yacht", "--batch-size", "32"])
    usual = ("adam", "ggn_cg", "newton_cg", "kfac", "kfac_full", "ekfac")
    settings = quickstart.settle(flags, columns())
    assert (settings.methods, settings.models) == ((*usual, "egn"), ("mlp",))
    run(tmp_path, "--dataset", "yacht", "--batch-size", "32", "--methods", "egn", "--no-plot")
    assert "RMSE" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["kfac"])
def test_factored_methods_train(method, tmp_path):
    document = run(tmp_path, "--dataset", "yacht", "--methods", method, "--no-plot")
    for one in document["comparisons"][0]["runs"]:
        assert one["losses"][-1] < one["losses"][0]
        assert one["skipped"] == 0
        assert one["state_bytes"] > 0


def test_the_learning_rate_falls_to_zero_over_the_run():
    task = Task(columns(), "mlp")
    trainer = RECIPES["adam"].build(Setting(task.objective))
    model = task.init(jax.random.key(0))
    state = trainer.init(model, 1.0, 4)
    lengths = []
    for _ in range(5):
        new, state, _ = trainer(model, state, task.train, jax.random.key(0))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new, model)
        lengths.append(max(jax.tree.leaves(moved)))
    # At the same parameters every step of Adam has a length of 1.
    np.testing.assert_allclose(lengths, [1, 0.853553, 0.5, 0.146447, 0], atol=1e-3)


def test_the_language_model_trains(tmp_path, capsys):
    document = run(tmp_path, "--task", "lm", "--methods", "adam")
    assert document["settings"]["dataset"] == "tinyshakespeare"
    assert document["settings"]["models"] == ["transformer"]
    assert document["settings"]["batch_size"] == 32
    for one in document["comparisons"][0]["runs"]:
        assert one["losses"][-1] < one["losses"][0]
        assert 0 < one["score"] < 2 * math.log(5)
    assert "nats" in capsys.readouterr().out
    assert (tmp_path / "quickstart.png").read_bytes().startswith(PNG)


def test_the_language_model_is_run_with_methods_that_suit_it():
    flags = quickstart.parser().parse_args(["--dataset", "tinyshakespeare"])
    settings = quickstart.settle(flags, letters())
    assert settings.methods == ("adam", "kfac", "newton_muon")
    assert settings.models == ("transformer",)


def test_the_transformer_sees_no_later_token():
    task = Task(letters(), "transformer")
    model = task.init(jax.random.key(0))
    ids = task.train[0][0]
    changed = np.where(np.arange(LENGTH) < 10, ids, 0)
    before, after = model(ids), model(changed)
    assert before.shape == (LENGTH, 5) and before.dtype == np.float32
    np.testing.assert_allclose(before[:10], after[:10], rtol=1e-5, atol=1e-6)
    assert not np.allclose(before[10:], after[10:], atol=1e-2)


def test_the_score_of_a_text_is_that_of_windows_spread_over_it():
    task = Task(letters(test=1300 * LENGTH + 1), "transformer")
    assert task.test[0].shape == task.test[1].shape == (434, LENGTH)
    np.testing.assert_array_equal(task.test[0][:, 1:], task.test[1][:, :-1])
    uniform = lambda ids: np.zeros((LENGTH, 5), np.float32)
    assert evaluate(uniform, task) == pytest.approx(math.log(5), rel=1e-5)


def test_the_autoencoder_reproduces_pixels():
    task = Task(images(), "autoencoder")
    model = task.init(jax.random.key(0))
    x, pixels = batch = tuple(array[:4] for array in task.train)
    assert x.shape == (4, 8, 8) and pixels.shape == (4, 64) and task.rows == 64
    assert task.train[1].min() == 0 and task.train[1].max() == 1  # the images go beyond both
    params, objective = task.objective.bind(model)
    assert objective.check(params, batch).shape == (4, 64)
    # Sigmoids of zero are grey, and an image is one event.
    grey = lambda x: np.zeros(64, np.float32)
    wanted = math.sqrt(((task.test[1] - 0.5) ** 2).mean())
    assert evaluate(grey, task) == pytest.approx(wanted, rel=1e-5)
    assert 0.5 < float(objective.value(params, batch)) / (64 * math.log(2)) < 2


def test_the_autoencoder_runs_alone(tmp_path, capsys):
    document = run(tmp_path, "--model", "autoencoder", "--methods", "adam", "--no-plot")
    assert document["comparisons"][0]["rows"][0]["score"] < 1
    assert "RMSE" in capsys.readouterr().out


def test_a_new_recipe_needs_no_more_than_its_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(quickstart.RECIPES, "another", quickstart.RECIPES["adam"])
    document = run(tmp_path, "--model", "mlp", "--methods", "adam", "another")
    assert [row["method"] for row in document["comparisons"][0]["rows"]] == ["adam", "another"]
    assert len({style(method) for method in quickstart.RECIPES}) == len(quickstart.RECIPES)


def test_a_run_that_diverges_is_shown_as_such(tmp_path, capsys, monkeypatch):
    grid = quickstart.RECIPES["adam"]
    wild = type(grid)(grid.build, (0.0, 1e38, 2e38), grid.settings)
    monkeypatch.setitem(quickstart.RECIPES, "adam", wild)
    document = run(tmp_path, "--model", "mlp", "--methods", "adam")
    (comparison,) = document["comparisons"]
    assert all(one["diverged"] for one in comparison["runs"])
    assert comparison["rows"][0]["final"] is None
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "yacht", "--model", "cnn"], "--model cnn: it takes images"),
        (["--task", "lm", "--model", "mlp"], "--model mlp: it takes numbers"),
        (["--model", "transformer"], "--model transformer: it takes text, and fashion-mnist"),
        (["--model", "mlp", "autoencoder"], "run autoencoder alone"),
        (["--task", "lm", "--dataset", "yacht"], "it is not for --task lm; use tinyshakespeare"),
        (["--task", "lm", "--batch-size", "35"], "tinyshakespeare has 34 examples"),
        (["--batch-size", "500"], "--batch-size 500: fashion-mnist has 400 examples"),
        (["--methods", "ggn_direct"], "parameters, and dense curvature is for at most"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    assert quickstart.main(["--out", str(tmp_path), "--batch-size", "32", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "0"],
        ["--methods", "sgd"],
        ["--dataset", "mnist"],
        ["--seeds", "-1"],
        ["--task", "rl"],
    ],
)
def test_flags_that_make_no_sense(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_data_that_cannot_be_had_are_one_message(monkeypatch, capsys, tmp_path):
    def load(name):
        raise data.DataUnavailable(f"{name} is nowhere [to be had]")

    monkeypatch.setattr(quickstart, "load", load)
    assert quickstart.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "error: fashion-mnist is nowhere [to be had]"


def test_an_interrupt_is_no_traceback(monkeypatch, capsys, tmp_path):
    def load(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "load", load)
    assert quickstart.main(["--out", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for part in (
        "--task",
        "--dataset",
        "--model",
        "--methods",
        "--seeds",
        "--smoke",
        "default",
        "examples:",
    ):
        assert part in printed


def made_run(losses, rate=1.0, diverged=False):
    return Run(rate, 0, tuple(losses), (0.5,) * len(losses), 0.0, diverged, 0, 8)


def test_smoothing_is_exact_for_a_constant_and_follows_the_recursion():
    np.testing.assert_allclose(smooth((2.0,) * 30), 2.0)
    np.testing.assert_allclose(smooth((1.0, 3.0)), [1.0, (0.09 * 1 + 0.1 * 3) / 0.19])


def test_steps_and_seconds_to_a_loss():
    run = made_run([4.0, 2.0, 1.0])
    assert run.reach(4.0) == (1, 0.5)
    assert run.reach(float(run.smoothed[1])) == (2, 1.0)
    assert run.reach(0.5) == (math.inf, math.inf)


def test_the_learning_rate_that_ends_lowest_is_chosen_and_an_edge_is_marked():
    runs = (made_run([1.0], 0.1), made_run([0.5], 0.2), made_run([0.1], 0.4, diverged=True))
    assert Trial("adam", runs, 0.0).chosen == (runs[1],)
    assert not Trial("adam", runs, 0.0).at_edge
    runs = (*runs, made_run([0.2], 0.8))
    assert Trial("adam", runs, 0.0).at_edge
