"""The comparison of all methods, end to end on data made here; what it costs and what it keeps."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from experiments import costs, grid, methods, models
from experiments.costs import Cost, count
from experiments.recipes import RECIPES, Recipe, Setting, Size
from experiments.store import Store
from experiments.training import Run, Task
from tests.toys import columns, images, letters

METHODS = ("adam", "muon", "ggn_cg", "kfac")
SIZE = Size(parameters=10**6, batch=256, examples=60000, outputs=10, events=1)


@pytest.fixture(autouse=True)
def _small_data(monkeypatch):
    made = {"fashion-mnist": images(), "yacht": columns()}
    monkeypatch.setattr(methods, "load", made.__getitem__)
    monkeypatch.setattr(costs, "interleave", once)


def once(variants, **_):
    """In the place of `timing.interleave`, which takes seconds."""
    for run in variants.values():
        jax.block_until_ready(run())
    return {name: type("Timing", (), {"median": 0.5}) for name in variants}


def run(out, *flags, task="uci-yacht", names=("adam", "muon")):
    flags = ("--smoke", "--task", task, "--out", str(out), "--methods", *names, *flags)
    code = methods.main(flags)
    path = out / f"{task}.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def lines(out, task="uci-yacht"):
    return [json.loads(line) for line in (out / f"{task}.jsonl").read_text().splitlines()]


def counted(monkeypatch):
    """The runs that are made from here on."""
    made, train = [], grid.train

    def watched(trainer, task, **options):
        made.append((options["learning_rate"], options["seed"]))
        return train(trainer, task, **options)

    monkeypatch.setattr(grid, "train", watched)
    return made


def test_every_method_has_a_recipe():
    assert set(cx.methods.list()) <= set(RECIPES)
    assert len(RECIPES["adam"].learning_rates) == max(
        len(r.learning_rates) for r in RECIPES.values()
    )


def test_table_numbers_and_plot(tmp_path, capsys):
    names = (*METHODS, "lbfgs", "ggn_direct")
    code, document = run(tmp_path, task="fashion-mnist-mlp", names=names)
    assert code == 0
    (comparison,) = document["comparisons"]
    rows = {row["method"]: row for row in comparison["rows"]}
    assert set(rows) == set(METHODS)
    adam = rows["adam"]
    assert adam["to_adam_ratio"] == adam["to_adam_time"] == adam["state_ratio"] == 1
    assert 1 < adam["gradients"] < 1.2
    assert rows["muon"]["state_ratio"] == pytest.approx(0.5, abs=0.02)
    # One product costs at most 4/3 of a gradient; two steps of CG, and one for the warm start.
    assert 2 < rows["ggn_cg"]["gradients"] < 1 + 4 * 4 / 3
    first, *others = document["costs"]["kfac"]["gradients"]
    assert len(others) == 9 and first > 1.2 * max(others) and min(others) == max(others)
    assert set(comparison["left_out"]) == {"lbfgs", "ggn_direct"}
    table = (tmp_path / "fashion-mnist-mlp.md").read_text()
    assert "| ggn_direct |" in table and "dense curvature is for at most 4000" in table
    assert "made for full batches, and one here has 64 of 400 examples" in table
    head = table.splitlines()[0]
    for column in (
        "learning rate",
        "final loss",
        "test acc. %",
        "steps × Adam",
        "time a step × Adam",
    ):
        assert column in head
    assert table.splitlines()[0] in capsys.readouterr().out
    assert (tmp_path / "fashion-mnist-mlp.png").read_bytes().startswith(b"\x89PNG")
    losses = [row["final"] for row in sorted(comparison["rows"], key=lambda row: row["final"])]
    shown = [float(line.split("|")[3]) for line in table.splitlines()[2:6]]
    np.testing.assert_allclose(shown, losses, rtol=1e-3)


def test_nothing_is_run_twice(tmp_path, monkeypatch):
    _, first = run(tmp_path)
    made = counted(monkeypatch)
    monkeypatch.setattr(grid, "compile_seconds", None)  # would be called
    _, again = run(tmp_path)
    assert made == [] and again["comparisons"] == first["comparisons"]


def test_a_line_that_was_cut_short_is_one_run(tmp_path, monkeypatch):
    _, first = run(tmp_path)
    path = tmp_path / "uci-yacht.jsonl"
    text = path.read_text()
    path.write_text(text[:-50])
    made = counted(monkeypatch)
    _, again = run(tmp_path)
    assert len(made) == 1
    assert again["comparisons"] == first["comparisons"]
    made.clear()
    run(tmp_path)
    assert made == []


def test_what_is_killed_goes_on(tmp_path, monkeypatch, capsys):
    train, calls = grid.train, []

    def killed(*args, **options):
        calls.append(options)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(grid, "train", killed)
    assert run(tmp_path)[0] == 130
    assert "goes on where it was" in capsys.readouterr().err
    monkeypatch.setattr(grid, "train", train)
    made = counted(monkeypatch)
    code, document = run(tmp_path)
    entries = [entry["of"] for entry in lines(tmp_path)]
    assert code == 0 and len(made) == sum(of["of"] == "run" for of in entries) - 2
    assert len(document["comparisons"][0]["rows"]) == 2


def test_other_settings_are_other_runs(tmp_path, monkeypatch):
    run(tmp_path, names=("adam",))
    made = counted(monkeypatch)
    run(tmp_path, "--steps", "5", names=("adam",))
    assert len(made) >= 3
    made.clear()
    recipe = RECIPES["adam"]
    other = Recipe(recipe.build, recipe.learning_rates, "other settings")
    monkeypatch.setitem(grid.RECIPES, "adam", other)
    run(tmp_path, names=("adam",))
    assert len(made) >= 3


def test_more_seeds_run_at_the_best_rate_alone(tmp_path, monkeypatch):
    made = counted(monkeypatch)
    _, document = run(tmp_path, "--seeds", "0", "1", "2", names=("adam",))
    (row,) = document["comparisons"][0]["rows"]
    *searched, _, _, _, _, _ = seeds = [seed for _, seed in made]
    assert seeds == [0] * len(searched) + [1, 2, 0, 1, 2]
    assert {rate for rate, seed in made[len(searched) :]} == {row["learning_rate"]}
    runs = document["comparisons"][0]["runs"]
    assert [(r["learning_rate"], r["seed"]) for r in runs] == made
    assert [r["steps"] for r in runs] == [10] * (len(runs) - 3) + [6] * 3
    short = sorted(r["final"] for r in runs[-3:])
    assert row["short"] == short[1] and row["sooner"] is False


@pytest.mark.parametrize(
    ("name", "best", "wanted"),
    [
        ("muon", 4, [1, 2, 4, 8]),
        ("muon", 0.5, [1, 2, 0.5, 0.25]),
        ("muon", 1000, [1, 2, 4, 8]),
        ("muon", 2.1, [1, 2, 4, 2.8]),
        ("adam", 1000, [1, 2, 4, 8, 16, 32]),
        ("adam", 2.1, [1, 2, 4, 8, 2.8]),
    ],
)
def test_a_grid_grows_around_its_best(name, best, wanted, monkeypatch):
    """To as many rates as Adam's begins with, and Adam's to two more, not too near."""
    begin = {"adam": (1.0, 2.0, 4.0, 8.0), "muon": (1.0, 2.0)}

    def run(self, name, trainer, rate, seed, steps=None):
        made.append((rate, steps))
        return Run(rate, seed, (abs(math.log(rate / best)),), (1.0,), 0.0, False, 0, 8)

    made = []
    monkeypatch.setattr(grid, "_rates", lambda name, smoke: begin[name])
    monkeypatch.setattr(grid.Search, "_run", run)
    store = Store()
    store.get = lambda key: {"compile_seconds": 1.0, "cost": None}
    args = methods.parser().parse_args(["--task", "uci-yacht", "--methods", "adam", name])
    task = Task(columns(), "mlp")
    settings, _ = methods.settle(args, task)
    search = grid.Search(settings, task, methods.Console(), store, grid.Study(1.0, 0.5))
    trial = search._trial(name)
    found = min(wanted, key=lambda rate: abs(math.log(rate / best)))
    assert made == [*((rate, None) for rate in wanted), (found, settings.steps // 2)]
    assert trial.chosen[0].learning_rate == found and len(trial.short) == 1


def test_what_fails_or_takes_too_long_is_left_out(tmp_path, monkeypatch):
    def build(setting):
        raise NotImplementedError("not for this one\nand more")

    monkeypatch.setitem(grid.RECIPES, "muon", Recipe(build, (0.1,), ""))
    _, document = run(tmp_path)
    left_out = document["comparisons"][0]["left_out"]
    assert left_out == {"muon": "NotImplementedError: not for this one"}
    _, document = run(tmp_path / "other", "--minutes", "0.001", names=("adam",))
    assert "minutes a run, and the limit is 0.001" in document["comparisons"][0]["left_out"]["adam"]


def test_full_batches_are_for_all(tmp_path):
    task = Task(columns(), "mlp")
    args = methods.parser().parse_args(["--task", "uci-yacht", "--batch-size", "1000"])
    settings, left_out = methods.settle(args, task)
    assert settings.batch_size == 400 and {"lbfgs", "gauss_newton", "ggn_direct"} <= set(
        settings.methods
    )
    assert set(left_out) <= {"kfac_full"}


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("newton_direct", SIZE, "1000000 parameters"),
        ("newton_direct", SIZE._replace(parameters=100), None),
        ("egn", SIZE, "2560 rows"),
        ("minsr", SIZE, None),
        ("minsr", SIZE._replace(events=64), "16384 rows"),
        ("lbfgs", SIZE, "256 of 60000 examples"),
        ("kfac", SIZE, None),
    ],
)
def test_what_a_method_is_not_for(name, size, reason):
    found = RECIPES[name].unfit(size)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


@pytest.mark.parametrize("model", models.AXES)
def test_names_of_axes_fit_the_models(model):
    task = Task(letters() if model == "transformer" else images(), model)
    trainer = RECIPES["muon"].build(Setting(task.objective, axes=task.axes))
    state = jax.eval_shape(lambda: trainer.init(task.init(jax.random.key(0)), 0.1, 10))
    tensors = optax.tree_utils.tree_get(state, "tensors")
    matrices = [path for path in tensors if "head" not in path]
    if model == "cnn":
        assert len(matrices) == 2 and any("head" in path for path in tensors)
    else:
        assert len(matrices) == len(tensors) == 2 * 6  # of two blocks


# -- costs -------------------------------------------------------------------------------------


def test_only_the_branch_that_is_taken_counts():
    a = jnp.ones((16, 16))

    def step(count, x):
        due = (count % 10 == 0) & jnp.all(jnp.isfinite(x))
        heavy = lambda: a @ (a @ x)
        return count + 1, jax.lax.cond(due, heavy, lambda: x)

    jaxpr = jax.make_jaxpr(step)(0, a).jaxpr
    product = 2 * 16**3
    lazy, (after, _) = count(jaxpr, [3, None])
    assert lazy < product and int(after) == 4
    assert 2 * product <= count(jaxpr, [10, None])[0] < 2.5 * product
    assert 2 * product <= count(jaxpr, [None, None])[0] < 2.5 * product


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda a: jnp.linalg.cholesky(a), 20**3 / 3),
        (lambda a: jnp.linalg.eigh(a)[1], 9 * 20**3),
        (lambda a: jax.lax.scan(lambda x, _: (a @ x, None), a, None, length=7)[0], 14 * 20**3),
        (lambda a: (a @ a, a)[1], 0),
        (jax.jit(lambda a: a @ a), 2 * 20**3),
    ],
)
def test_operations(function, wanted):
    a = jnp.eye(20)
    flops, _ = count(jax.make_jaxpr(function)(a).jaxpr, [None])
    assert wanted <= flops <= wanted + 10 * 20**2


def test_methods_of_gradients_refresh_once_in_a_cycle():
    task = Task(images(), "mlp")
    trainer = RECIPES["shampoo"].build(Setting(task.objective))
    cost = costs.measure(trainer, trainer, task, 32)
    assert len(cost.gradients) == trainer.cycle == 10
    usual = min(cost.gradients)
    assert [x > 2 * usual for x in cost.gradients].count(True) == 1


def test_steps_of_a_solver_count():
    made = Run(0.1, 0, (1.0,) * 5, (0.1,) * 5, 0.0, False, 0, 8, (3, 1, 0, -1, 2))
    cost = Cost((2.0, 4.0), 0.5, 1.0, 1.0)
    np.testing.assert_allclose(cost.of(made), [3, 4, 2, 4, 2.5])


# -- what is kept ------------------------------------------------------------------------------


def test_a_store_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "kept.jsonl"
    store = Store(path)
    assert store.get({"a": 1}) is None
    put = store.put({"a": 1, "b": "ß"}, {"x": (1 / 3, math.inf), "n": 2})
    assert put == {"x": [0.333333, None], "n": 2}
    for each in (store, Store(path)):
        assert each.get({"b": "ß", "a": 1}) == put and each.get({"a": 1}) is None
    path.write_text(path.read_text() + '{"of": {"c"')
    later = Store(path)
    later.put({"c": 3}, 4)
    assert Store(path).get({"c": 3}) == 4 and Store(path).get({"b": "ß", "a": 1}) == put


def test_data_that_cannot_be_had_are_one_message(monkeypatch, capsys, tmp_path):
    def load(name):
        raise methods.DataUnavailable(f"{name} is nowhere")

    monkeypatch.setattr(methods, "load", load)
    assert methods.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "error: fashion-mnist is nowhere"
