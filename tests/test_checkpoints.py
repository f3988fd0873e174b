"""A run goes on from its checkpoint bit for bit, wherever it was killed; no other one is taken."""

import functools
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax import _schema as schema
from curvax import checkpoints as module
from tests import killed
from tests.devices import printed
from tests.problems import predict, problem

ocp = pytest.importorskip("orbax.checkpoint")

ROOT = pathlib.Path(__file__).parents[1]


class Pair(NamedTuple):
    first: Any
    second: Any


class Triple(NamedTuple):
    first: Any
    second: Any
    third: Any


class Holder(eqx.Module):
    array: jax.Array
    width: int = eqx.field(static=True)


def everything():
    """One of each kind that a run may hold."""
    return {
        "model": eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)),
        "nodes": (Pair(jnp.arange(3), None), optax.MaskedNode(), [], Holder(jnp.ones(2), 7)),
        "plain": [3, 2**70, -0.0, float("nan"), float("inf"), True, "Kâr\n"],
        "keys": (jax.random.split(jax.random.key(1), 2), jax.random.key(2, impl="rbg")),
        "raw key": jax.random.PRNGKey(5),
        "a/b.c": jnp.asarray([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "empty": jnp.zeros((2, 0)),
        "weak": (jnp.asarray(0.1), jnp.full((2,), 3)),
        "host": (np.arange(4, dtype=np.uint8), np.float32(0.1)),
        "narrow": (jnp.ones(2, jnp.float32), jnp.asarray(True), jnp.int8(3), jnp.ones(2, complex)),
    }


def data(leaf):
    typed = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if typed else leaf


def same(got, wanted):
    """Equal to the last bit, of the same types, and as free to move."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert type(a) is type(b)
        if isinstance(b, jax.Array):
            assert jax.typeof(a) == jax.typeof(b)  # dtype, shape, weak type
            assert a.committed == b.committed and a.sharding == b.sharding
            assert np.asarray(data(a)).tobytes() == np.asarray(data(b)).tobytes()
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
        else:
            assert a is b or repr(a) == repr(b)


def written(folder, tree, step=1, **options):
    with cx.Checkpoints(folder, **options) as checkpoints:
        checkpoints.save(step, tree)
    return tree


# -- what comes back ---------------------------------------------------------------------------


def test_all_that_a_tree_may_hold(tmp_path):
    tree = written(tmp_path, everything())
    other = jax.tree.map(lambda leaf: leaf + leaf if type(leaf) is int else leaf, everything())
    with cx.Checkpoints(tmp_path) as checkpoints:
        same(checkpoints.restore(other), tree)


def test_structs_stand_for_arrays(tmp_path):
    tree = written(tmp_path, {"key": jax.random.key(3), "w": jnp.ones((2, 3)), "at": 4})
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    got = cx.Checkpoints(tmp_path).restore(
        {"key": jax.eval_shape(lambda: tree["key"]), "w": struct((2, 3), jnp.float64), "at": 0}
    )
    assert got["w"].sharding == sharding and got["w"].committed and not got["key"].committed
    same({**got, "w": jnp.array(np.asarray(got["w"]))}, tree)


@pytest.fixture
def all_sides_low_rank(monkeypatch):
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)


def optimizers():
    p = problem(seed=3)
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), example=p.batch)
    learned = cx.LevenbergMarquardt(1.0, every=2)
    return p, {
        "kfac": cx.methods.kfac(
            objective, rank=2, refresh_every=4, stagger=2, damping=learned, fisher="mc"
        ),
        "ekfac": cx.methods.ekfac(objective, refresh_every=3),
        "soap": cx.methods.soap(refresh_every=3),
    }


@pytest.mark.parametrize("name", ["kfac", "ekfac", "soap"])
def test_resumed_is_never_stopped(name, tmp_path, all_sides_low_rank):
    """Between refreshes, with arrays donated at once, and nothing compiled again."""
    p, methods = optimizers()
    method = methods[name]
    optimizer = optax.chain(method, optax.trace(0.5), optax.scale_by_learning_rate(0.1))
    if isinstance(method, cx.Method):
        step = cx.make_step(optimizer, method, donate=True)
        init, compiled = step.init, step._compiled
    else:
        init = optimizer.init

        def step(params, state, batch, key):
            updates, state = optimizer.update(jax.grad(p.objective.value)(params, batch), state)
            return optax.apply_updates(params, updates), state, key

        step = compiled = jax.jit(step, donate_argnums=(0, 1))

    def start(init=init):
        params = jax.tree.map(jnp.array, p.params)
        return {"params": params, "state": init(params), "key": jax.random.key(4), "position": 0}

    def go(run, steps):
        while run["position"] < steps:
            i = run["position"]
            use = jax.random.fold_in(run["key"], i)
            params, state, _ = step(run["params"], run["state"], p.batch, use)
            run = run | {"params": params, "state": state, "position": i + 1}
        return run

    checkpoints = cx.Checkpoints(tmp_path)
    run = go(start(), 6)
    checkpoints.save(6, run)
    run = go(run, 9)
    checkpoints.close()
    count = compiled._cache_size()
    like = start(lambda params: eqx.filter_eval_shape(init, params))
    again = go(cx.Checkpoints(tmp_path).restore(like), 9)
    assert compiled._cache_size() == count
    leaves = zip(jax.tree.leaves(again), jax.tree.leaves(run), strict=True)
    assert all(np.asarray(data(a)).tobytes() == np.asarray(data(b)).tobytes() for a, b in leaves)


MESHES = """
    import jax
    jax.config.update("jax_enable_x64", True)
    import curvax as cx
    from tests import killed
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    shardings = lambda run: jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), run)

    def spread(run, sizes, kind):
        \"""As many axes of each array over a mesh as they can be split.\"""
        mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(kind,) * 2)

        def over(leaf):
            if not isinstance(leaf, jax.Array):
                return leaf
            axes = zip(leaf.shape, sizes, mesh.axis_names)
            spec = [name if length % size == 0 else None for length, size, name in axes]
            return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

        run = jax.tree.map(over, run)
        assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(run["state"]))
        return run

    def main(folder, sizes):
        run, _ = killed.start()
        with cx.Checkpoints(folder) as checkpoints:
            for kind in AxisType.Explicit, AxisType.Auto:
                like = spread(run, sizes, kind)
                found = checkpoints.restore(like)
                assert shardings(found) == shardings(like)
            checkpoints.save(checkpoints.latest() + 1, found)
"""


def test_other_meshes(tmp_path):
    """From one device to eight, to four in another shape, and back: as if it had not moved."""
    run, step = killed.start()
    for _ in range(2):
        run = killed.advanced(run, step)
    written(tmp_path, run)
    printed(f"{MESHES}\n    main({str(tmp_path)!r}, (4, 2))", devices=8)
    printed(f"{MESHES}\n    main({str(tmp_path)!r}, (2, 2))", devices=4)
    for at in (2, 3):
        same(cx.Checkpoints(tmp_path).restore(killed.start()[0], at), run)


TWO_PROCESSES = """
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P

    rank, folder, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import curvax as cx

    sharding = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
    whole = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    keys = lambda: jax.random.split(jax.random.key(7), 4)
    tree = {
        "sharded": jax.make_array_from_callback((8, 3), sharding, lambda at: whole[at]),
        "keys": jax.jit(keys, out_shardings=sharding)(),
        "of each": jnp.arange(3),
        "position": 5,
    }
    with cx.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.save(2, tree)
        checkpoints.wait()
        assert checkpoints.steps() == (2,)
        got = checkpoints.restore(tree)
    for name in ("sharded", "keys"):
        assert got[name].sharding == sharding
    for shard in got["sharded"].addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    print("fine")
"""


def test_two_processes(tmp_path):
    """Each writes and reads its own part; one process reads all of it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    program, folder = textwrap.dedent(TWO_PROCESSES), str(tmp_path / "run")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), folder, port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        for rank in (0, 1)
    ]
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out.split()[-1:] == ["fine"], errors[-3000:]
    like = {
        "sharded": jnp.zeros((8, 3), jnp.float32),
        "keys": jax.random.split(jax.random.key(0), 4),
        "of each": jnp.zeros(3, jnp.int32),
        "position": 0,
    }
    got = cx.Checkpoints(folder).restore(like)
    whole = jnp.arange(24, dtype=jnp.float32).reshape(8, 3)
    keys = jax.random.split(jax.random.key(7), 4)
    of_each = jnp.arange(3, dtype=jnp.int32)
    same(got, {"sharded": whole, "keys": keys, "of each": of_each, "position": 5})


# -- the schema --------------------------------------------------------------------------------

KEY = jax.random.key(0)
TREE = {
    "a": Pair(jnp.ones(3), jnp.ones((2, 2))),
    "model": eqx.nn.Linear(2, 3, key=KEY),
}
OTHERS = {
    "shape": (
        TREE | {"model": eqx.nn.Linear(2, 4, key=KEY)},
        r"\['model'\].weight is float64\[3, 2\] there, and float64\[4, 2\] in `like`",
    ),
    "dtype": (
        TREE | {"a": Pair(jnp.ones(3, jnp.float32), jnp.ones((2, 2)))},
        r"\['a'\].first is float64\[3\] there, and float32\[3\] in",
    ),
    "field": (
        TREE | {"a": Triple(jnp.ones(3), jnp.ones((2, 2)), 0)},
        r"\['a'\] is Pair there, and Triple in",
    ),
    "leaf": (TREE | {"b": 1}, r"\['b'\] is nothing there, and int in"),
    "no leaf": ({"a": TREE["a"]}, r"\['model'\] is Linear there, and nothing in"),
    "kind": (
        TREE | {"a": Pair(1.0, jnp.ones((2, 2)))},
        r"\['a'\].first is float64\[3\] .* float in",
    ),
    "root": (jnp.ones(3), r"the root is dict there, and float64\[3\] in"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_first_difference_is_named(name, tmp_path):
    written(tmp_path, TREE)
    other, message = OTHERS[name]
    with pytest.raises(ValueError, match=f"checkpoint {tmp_path}/1: got another tree.* {message}"):
        cx.Checkpoints(tmp_path).restore(other)
    same(cx.Checkpoints(tmp_path).restore(TREE), TREE)


def test_field_of_a_state_that_is_new(tmp_path):
    was, now = (
        NamedTuple("State", [(name, Any) for name in names])  # pyright: ignore
        for names in (("count", "trace"), ("count", "level", "trace"))
    )
    written(tmp_path, {"inner": was(jnp.ones(2), jnp.ones(2))})
    with pytest.raises(ValueError, match=r"'\].level is nothing there, and float64\[3\] in"):
        cx.Checkpoints(tmp_path).restore({"inner": now(jnp.ones(2), jnp.ones(3), jnp.ones(2))})


def test_stacks_of_other_blocks(tmp_path):
    """Layers of one shape are a stack: in another order its numbers would be those of others."""
    p, methods = optimizers()
    state = written(tmp_path, methods["ekfac"].init(p.params))
    name, memory = next(iter(state.preconditioner.items()))
    other = state._replace(
        preconditioner=state.preconditioner | {name: memory.with_(parts=(("elsewhere", 1),))}
    )
    with pytest.raises(ValueError, match=r"is EigenMemory of .* × 1 there.* of elsewhere × 1"):
        cx.Checkpoints(tmp_path).restore(other)


def layouts():
    """Path and type of all that the states of some methods hold, in text."""
    p, methods = optimizers()
    objective = methods["ekfac"].objective
    diagonal = cx.DiagonalPreconditioner(every=3)
    methods |= {
        "kfac, full": cx.methods.kfac(objective, rank=None, diagonal=("w2",)),
        "shampoo": cx.methods.shampoo(),
        "ggn_cg": cx.methods.ggn_cg(objective, warm_start=0.9, preconditioner=diagonal),
    }
    lines = []
    for name, method in sorted(methods.items()):
        lines += ["", f"# {name}"]
        lines += [f"{e.path} | {e}" for e, _ in schema.entries(method.init(p.params))]
    return "\n".join(lines[1:]) + "\n"


def test_layout_of_this_version(all_sides_low_rank):
    """Where this fails, states of the last release cannot be read: raise `VERSION` in
    curvax/checkpoints.py, add a migration, and write the new layout into a file beside this one.
    """
    file = ROOT / "tests" / "data" / f"state_layout_{module.VERSION}.txt"
    assert layouts() == file.read_text(encoding="utf-8")


def test_versions(tmp_path, monkeypatch):
    tree = written(tmp_path, {"old": jnp.arange(4.0), "empty": jnp.zeros((0, 2)), "at": 3})
    like = {"new": jnp.zeros(4), "empty": jnp.zeros((0, 2)), "more": jnp.zeros(()), "at": 0}
    monkeypatch.setattr(module, "VERSION", 3)
    with pytest.raises(ValueError, match=r"version 1 .* of curvax 0.*no migration from 1\. Go"):
        cx.Checkpoints(tmp_path).restore(like)

    def renamed(leaves):
        return {"['new']" if path == "['old']" else path: x for path, x in leaves.items()}

    with pytest.raises(ValueError, match="no migration from 2"):
        cx.Checkpoints(tmp_path, migrations={1: renamed}).restore(like)
    monkeypatch.setitem(module.MIGRATIONS, 2, lambda leaves: leaves | {"['more']": np.ones(())})
    got = cx.Checkpoints(tmp_path, migrations={1: renamed}).restore(like)
    same(got, {"new": tree["old"], "empty": tree["empty"], "more": jnp.ones(()), "at": 3})
    with pytest.raises(ValueError, match=r"\['old'\] is float64\[4\] there, and nothing in"):
        cx.Checkpoints(tmp_path, migrations={1: dict}).restore(like)
    monkeypatch.setattr(module, "VERSION", 0)
    with pytest.raises(ValueError, match=r"got version 1 .*wanted at most 0: install curvax"):
        cx.Checkpoints(tmp_path).restore(like)


def test_what_is_not_ours(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave({"a": jnp.ones(2)}))
    with pytest.raises(ValueError, match="got no schema"):
        cx.Checkpoints(tmp_path).restore({"a": jnp.ones(2)})


# -- what is wrong -----------------------------------------------------------------------------


def test_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="keep: got 0"):
        cx.Checkpoints(tmp_path, keep=0)
    checkpoints = cx.Checkpoints(tmp_path / "none", keep=None)
    assert checkpoints.latest() is None and checkpoints.steps() == ()
    with pytest.raises(FileNotFoundError, match=r"got no complete checkpoint, .* There are: none"):
        checkpoints.restore(TREE)
    assert not (tmp_path / "none").exists()
    for step in range(5):
        checkpoints.save(step, TREE)
    checkpoints.wait()
    assert checkpoints.steps() == (0, 1, 2, 3, 4)
    with pytest.raises(FileNotFoundError, match=r"of step 7, .* There are: 0, 1, 2, 3, 4"):
        checkpoints.restore(TREE, 7)
    for step in (4, 3):
        with pytest.raises(ValueError, match=f"step: got {step}, wanted one after 4"):
            checkpoints.save(step, TREE)
    with pytest.raises(ValueError, match=r"got a Generator at \['r'\], wanted arrays"):
        checkpoints.save(5, {"r": np.random.default_rng()})
    with pytest.raises(ValueError, match="got no array"):
        checkpoints.save(5, {"a": 1})
    checkpoints.close()
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "curvax\[checkpoints\]"'):
        cx.Checkpoints(tmp_path)


def test_readers_leave_writers_alone(tmp_path):
    reader = cx.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        written(tmp_path, TREE, step, keep=2)
        assert reader.latest() == step
    partial = tmp_path / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "3", partial)
    with cx.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == (2, 3)
        same(checkpoints.restore(TREE), TREE)
        assert partial.exists()
        checkpoints.save(5, TREE)
    assert not partial.exists()


def test_damage_is_no_reason_to_take_another(tmp_path):
    tree = {"a": jnp.arange(5.0)}  # one read: orbax does not wait for others when one has failed
    for step in (1, 2):
        written(tmp_path, tree, step)
    for file in (tmp_path / "2").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with pytest.raises(OSError, match=f"{tmp_path}/2: it cannot be read. There are also: 1"):
        cx.Checkpoints(tmp_path).restore(tree)
    same(cx.Checkpoints(tmp_path).restore(tree, 1), tree)


def test_full_disk(tmp_path):
    """No file may grow beyond some size: what is there and what is in memory stay, and a later
    write goes through.
    """
    small, large = {"a": jnp.arange(8.0)}, {"a": jax.random.normal(jax.random.key(0), (2**19,))}
    before = np.array(large["a"])
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with cx.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
            message = rf"checkpoint {tmp_path}/2: it was not written; the checkpoints of 1 are"
            with pytest.raises(OSError, match=message):
                checkpoints.save(2, large)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        np.testing.assert_array_equal(large["a"], before)
        assert checkpoints.steps() == (1,)
        same(checkpoints.restore(small), small)
        checkpoints.save(3, large)
        checkpoints.wait()
        assert os.listdir(tmp_path) == ["3"]  # what was begun takes no space
        same(checkpoints.restore(large), large)


def test_killed_at_any_moment(tmp_path):
    """Six lives of one run, which ends as one that was never killed (see `tests/killed.py`)."""
    env = {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | env,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    words = [line.split() for line in done.stdout.splitlines()]
    ends = {line[0]: int(line[1]) for line in words if len(line) == 3}
    left = {line[0]: int(line[2]) for line in words if len(line) == 3}
    assert tuple(ends) == (*killed.FATES, "none")
    assert ends["write:4"] == 3 and left["write:4"] == 1
    assert ends["commit:7"] == 6 and left["commit:7"] == 1
    assert ends["delete:7"] == 7 + killed.KEPT
    assert ends["beside:12"] in (11, 12)
    assert ends["outside:15"] >= 15 and ends["none"] == killed.STEPS
    assert left["none"] == 0 and words[-2] == ["finished"]
