"""Checkpoints of a training run, written and read by orbax, with a schema that is compared first.

A checkpoint holds one tree: parameters, optimizer state, keys, the position in the data. Orbax
writes it beside the training, shows it only when it is complete, and reads arrays onto the devices
that they are wanted on. The schema, kept as metadata of the checkpoint, says what is in it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import curvax
from curvax import _tree
from curvax._checks import check_count
from curvax._schema import (
    FUNCTION,
    PLAIN,
    Entry,
    difference,
    entries,
    is_key,
    leaf_entry,
    placed,
    sharding,
)

# The layout of curvax's states in a checkpoint. To be raised, with an entry in MIGRATIONS, whenever
# a release renames, moves, adds or reshapes a leaf of a state, puts blocks into other stacks, or
# changes what the numbers of a leaf mean.
VERSION = 1

# Makes the leaves of one version of the schema, arrays and plain values by their path, into those
# of the next.
Migration = Callable[[dict[str, Any]], dict[str, Any]]

# By the version that they start from.
MIGRATIONS: dict[int, Migration] = {}


class Checkpoints:
    """A folder of checkpoints: `with cx.Checkpoints("runs/mlp") as checkpoints:`.

    **Arguments:**

    - `folder`: where each checkpoint is a folder named by its step. One run writes to it; its
      processes share it.
    - `keep`: how many of the last ones stay; None for all. An old one is deleted when a new one
      is complete.
    - `migrations`: functions for checkpoints of older versions of the schema, by the version that
      they start from, beside those of curvax itself. Each is given the leaves, arrays and plain
      values in a dictionary by their path, and returns those of the next version.

    A tree may hold arrays of JAX and NumPy, typed keys, numbers, strings and None in any pytree.
    Functions in it, such as the activations of a model, are not written: they come from the program
    that restores. Of a sharded array each device writes its part. Inverses, roots and eigenbases of
    factors are written, too. They belong to the factors and the damping of an earlier step, and
    making them anew would change the run.

    !!! Example

        ```python
        with cx.Checkpoints("runs/mlp", keep=3) as checkpoints:
            run = {"model": model, "state": step.init(model), "key": key, "position": 0}
            if checkpoints.latest() is not None:
                run = checkpoints.restore(run)
            ...
            checkpoints.save(run["position"], run)
        ```

    **Raises** `ImportError` where orbax is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        migrations: Mapping[int, Migration] | None = None,
    ):
        if keep is not None:
            check_count("keep", keep)
        self._orbax = _orbax()
        name = os.path.expanduser(os.fspath(folder))
        # Addresses such as gs://bucket/runs are absolute already.
        self.folder = name if "://" in name else os.path.abspath(name)
        self._keep = keep
        self._migrations = {**MIGRATIONS, **(migrations or {})}
        self._manager: Any = None
        self._writes = False
        self._written: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()

    def steps(self) -> tuple[int, ...]:
        """The steps that have a complete checkpoint, in order."""
        manager = self._opened()
        manager.reload()
        return tuple(sorted(manager.all_steps()))

    def latest(self) -> int | None:
        """The step of the last complete checkpoint; None before the first."""
        return max(self.steps(), default=None)

    def save(self, step: int, tree: PyTree[Any]) -> None:
        """Writes a checkpoint. When it returns, `tree` may be changed or donated; what remains is
        done beside the training, until the next `save`, `wait`, or the end of the `with` block.

        Of several processes all call it, with the same numbers and strings in their trees.

        **Raises** `ValueError` for a step that is not after the last one, and for a leaf that
        cannot be written; `OSError` if this checkpoint or the one before it was not written, which
        changes neither `tree` nor the checkpoints that are complete: `save` may be tried again.
        """
        found = list(entries(tree))
        arrays = {entry.path: _stored(leaf) for entry, leaf in found if _on_disk(entry)}
        if not arrays:
            raise ValueError("tree: got no array in it, wanted at least one.")
        self.wait()
        last = self.latest()
        if last is not None and step <= last:
            raise ValueError(
                f"step: got {step}, wanted one after {last}, which is in {self.folder}. To go on "
                "from an earlier checkpoint, use a new folder, or delete the later checkpoints."
            )
        schema = {
            "schema": VERSION,
            "curvax": curvax.__version__,
            "tree": [list(entry) for entry, _ in found],
            "values": {entry.path: leaf for entry, leaf in found if _is_plain(entry, leaf)},
            "keys": {e.path: str(jax.random.key_impl(leaf)) for e, leaf in found if is_key(leaf)},
        }
        self._written = step
        with self._writing():
            args = self._orbax.args.PyTreeSave(arrays)
            self._opened(write=True).save(step, args=args, custom_metadata=schema, force=True)

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        **Raises** `OSError` if it was not written.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends what runs beside the training. The end of a `with` block calls it."""
        try:
            self.wait()
        finally:
            self._closed()

    def restore(self, like: PyTree[Any], step: int | None = None) -> PyTree[Any]:
        """The tree of a checkpoint, by default the last complete one.

        **Arguments:**

        - `like`: a tree as it was saved, such as that of a run that begins; it is not changed. Its
          arrays may be `jax.ShapeDtypeStruct`s. What comes back has their shardings, whatever mesh
          and number of devices wrote it. Where they have none, an array is on the default device
          and free to follow others.
        - `step`: one of `steps()`.

        **Raises** `FileNotFoundError` if there is no such checkpoint; `ValueError` if it is that of
        another tree, with the first path that differs, or of a version without a migration; and
        `OSError` if it cannot be read.
        """
        self.wait()
        steps = self.steps()
        step = max(steps, default=None) if step is None else step
        if step is None or step not in steps:
            which = "" if step is None else f" of step {step}"
            raise FileNotFoundError(
                f"{self.folder}: got no complete checkpoint{which}, wanted one to restore. There "
                f"are: {', '.join(map(str, steps)) or 'none'}."
            )
        with self._reading(step):
            schema = self._opened().metadata(step).custom_metadata or {}
        if "schema" not in schema:
            raise ValueError(
                f"{self._named(step)}: got no schema, wanted one of curvax.Checkpoints."
            )
        wanted = list(entries(like))
        if schema["schema"] == VERSION:
            saved = [Entry(*each) for each in schema["tree"]]
            self._compare(step, saved, [entry for entry, _ in wanted])
            leaves = self._leaves(step, schema, {entry.path: leaf for entry, leaf in wanted})
        else:
            leaves = self._migrated(step, schema, wanted)
        values = [
            leaf if entry.what == FUNCTION else placed(leaves[entry.path], leaf)
            for entry, leaf in wanted
            if leaf is not None
        ]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def _leaves(self, step: int, schema: Any, like: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays and plain values by their path: on their devices if `like` wants them on several,
        else on the host.
        """
        ocp = self._orbax
        leaves, how = dict(schema["values"]), {}
        for entry in (Entry(*each) for each in schema["tree"]):
            if _on_disk(entry):
                devices = None if entry.path in schema["keys"] else sharding(like.get(entry.path))
                several = devices is not None and len(devices.device_set) > 1
                how[entry.path] = (
                    ocp.ArrayRestoreArgs(sharding=devices)
                    if several
                    else ocp.RestoreArgs(restore_type=np.ndarray)
                )
            elif entry.shape is not None:
                leaves[entry.path] = np.zeros(entry.shape, jnp.dtype(entry.what))
        with self._reading(step):
            args = ocp.args.PyTreeRestore(dict.fromkeys(how, 0), restore_args=how)
            leaves |= self._opened().restore(step, args=args)
        for path, kind in schema["keys"].items():
            leaves[path] = jax.random.wrap_key_data(jnp.array(leaves[path]), impl=kind)
        return leaves

    def _migrated(self, step: int, schema: Any, wanted: list[Any]) -> dict[str, Any]:
        version, writer = schema["schema"], schema["curvax"]
        where = f"{self._named(step)}: got version {version} of the schema, of curvax {writer}"
        if version > VERSION:
            raise ValueError(
                f"{where}, wanted at most {VERSION}: install curvax {writer} or later."
            )
        for each in range(version, VERSION):
            if each not in self._migrations:
                raise ValueError(
                    f"{where}, wanted {VERSION}, and there is no migration from {each}. Go on with "
                    f"curvax {writer}, or pass migrations={{{each}: …}}, a function of the leaves "
                    "by their path; or restore the parameters with it, and begin a new state."
                )
        leaves = self._leaves(step, schema, {})
        for each in range(version, VERSION):
            leaves = self._migrations[each](leaves)
        made = [leaf_entry(path, leaf) for path, leaf in leaves.items()]
        asked = [e for e, leaf in wanted if leaf is not None and e.what != FUNCTION]
        order = {entry.path: i for i, entry in enumerate(asked)}
        made.sort(key=lambda entry: order.get(entry.path, len(order)))
        self._compare(step, made, asked)
        return leaves

    def _compare(self, step: int, saved: list[Entry], wanted: list[Entry]) -> None:
        found = difference(saved, wanted)
        if found is not None:
            raise ValueError(
                f"{self._named(step)}: got another tree than `like`: {found}. Restore it with the "
                "model, optimizer and method that it was written with."
            )

    def _opened(self, write: bool = False) -> Any:
        """Orbax's manager. One that only reads leaves alone what a run is writing there."""
        ocp = self._orbax
        if self._manager is None or (write and not self._writes):
            self._closed()
            options = ocp.CheckpointManagerOptions(
                create=write,
                cleanup_tmp_directories=write,
                preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
            )
            handler = ocp.PyTreeCheckpointHandler()
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handler
            )
            self._writes = write
        return self._manager

    def _closed(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # The next one counts what is there, and clears away what was begun.
            with contextlib.suppress(Exception):
                self._closed()
            raise OSError(
                f"{self._named(self._written)}: it was not written; the checkpoints of "
                f"{', '.join(map(str, self.steps())) or 'no step'} are complete, and nothing in "
                f"memory has changed. Is there space left? It said: {_first_line(error)}"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            others = [str(each) for each in self.steps() if each != step]
            raise OSError(
                f"{self._named(step)}: it cannot be read. There are also: "
                f"{', '.join(others) or 'none'}. It said: {_first_line(error)}"
            ) from error

    def _named(self, step: int | None) -> str:
        return f"checkpoint {self.folder}/{step}"


def _on_disk(entry: Entry) -> bool:
    """Orbax writes no array without entries; such a one is its shape."""
    return entry.shape is not None and 0 not in entry.shape


def _is_plain(entry: Entry, leaf: Any) -> bool:
    return entry.shape is None and leaf is not None and entry.what in PLAIN


def _stored(leaf: Any) -> Any:
    """An array as orbax takes it."""
    leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if not _tree.is_array(leaf):  # a scalar of NumPy
        return np.asarray(leaf)
    if isinstance(leaf, jax.Array) and jax.process_count() > 1 and leaf.is_fully_addressable:
        # Every process has its own, and they are equal: the first writes it.
        return np.asarray(leaf)
    return leaf


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            'checkpoints need orbax: pip install "curvax[checkpoints]" (or orbax-checkpoint)'
        ) from error
    return orbax.checkpoint
