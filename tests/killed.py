"""A training run that is killed at chosen moments and resumed: `python -m tests.killed FOLDER`.

Each life of the run is a process of its own, forked before anything has started a thread, which
OPENBLAS_NUM_THREADS=1 in the environment is for. After each a line says what was left; a promise
that is broken ends the program.
"""

import os
import signal
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax as cx

STEPS = 30
# When the run kills itself: while files of that step are written; when all are, but not yet shown
# as a checkpoint; with an earlier checkpoint half deleted; with a checkpoint in the making that
# `save` has returned from. Or it is killed from outside, at any moment after that step.
FATES = ("write:4", "commit:7", "delete:7", "beside:12", "outside:15")
KEPT = 2


def start():
    """A run before its first step, and what makes a step of it."""
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    x, y = batch(0)
    objective = cx.Objective(lambda m, x: m(x), cx.SoftmaxCrossEntropy(), example=(x, y))
    method = cx.methods.kfac(objective, refresh_every=5, fisher="mc")
    optimizer = optax.chain(method, optax.trace(0.9), optax.scale_by_learning_rate(0.05))
    step = cx.make_step(optimizer, method)
    key = jax.random.key(1)
    # Some megabytes, so that a write takes a while.
    ballast = jnp.arange(2.0**20)
    run = {"model": model, "state": step.init(model), "key": key, "position": 0, "rest": ballast}
    return run, step


def batch(position):
    x = np.random.default_rng(position).standard_normal((16, 4))
    return x, np.argmax(x[:, :3], axis=1)


def advanced(run, step):
    key, use = jax.random.split(run["key"])
    model, state, _ = step(run["model"], run["state"], batch(run["position"]), use)
    new = {"model": model, "state": state, "key": key, "position": run["position"] + 1}
    return new | {"rest": run["rest"] + 1}


def live(folder, fate):
    kind, _, at = fate.partition(":")
    doom(kind, int(at or -1))
    # The programs are those of the first life.
    jax.config.update("jax_compilation_cache_dir", f"{folder}-compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    run, step = start()
    with cx.Checkpoints(folder, keep=KEPT) as checkpoints:
        if checkpoints.latest() is not None:
            run = checkpoints.restore(run)
        assert run["position"] == last_complete(folder), "not the last complete checkpoint"
        while run["position"] < STEPS:
            run = advanced(run, step)
            checkpoints.save(run["position"], run)
            if fate == f"beside:{run['position']}":
                os.kill(os.getpid(), signal.SIGKILL)
    whole, step = start()
    while whole["position"] < STEPS:
        whole = advanced(whole, step)
    same = jax.tree.map(bits, eqx.filter(run, eqx.is_array_like))
    assert same == jax.tree.map(bits, eqx.filter(whole, eqx.is_array_like)), "not bit for bit"
    print("finished", flush=True)


def bits(leaf):
    key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()


def doom(kind, at):
    """Kills this process when the interpreter is about to do something."""
    deleting = []

    def hook(event, args):
        hit = False
        if (kind, event) == ("write", "open"):
            hit = f"/{at}.orbax-checkpoint-tmp" in str(args[0]) and "_METADATA" in str(args[0])
        elif (kind, event) == ("commit", "os.rename"):
            hit = str(args[1]).endswith(f"/{at}")
        elif (kind, event) == ("delete", "shutil.rmtree"):
            deleting.append(str(args[0]).endswith(f"/{at}"))
        elif (kind, event) == ("delete", "os.remove") and any(deleting):
            deleting.append(True)
            hit = sum(deleting) > 3
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def last_complete(folder):
    return max((int(each) for each in os.listdir(folder) if each.isdigit()), default=0)


def main(folder):
    os.makedirs(folder)
    delays = np.random.default_rng(0)
    for fate in (*FATES, "none"):
        child = os.fork()
        if child == 0:
            try:
                live(folder, fate)
            except BaseException as error:
                print(f"{fate}: {error!r}", flush=True)
                os._exit(1)
            os._exit(0)
        if fate.startswith("outside"):
            while last_complete(folder) < int(fate.partition(":")[2]):
                time.sleep(0.005)
            time.sleep(delays.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if fate == "none" else -signal.SIGKILL), (fate, status)
        partial = sum("orbax-checkpoint-tmp" in each for each in os.listdir(folder))
        print(fate, last_complete(folder), partial, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
