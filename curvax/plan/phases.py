"""What each kind of step costs on the devices of a mesh, as compiled for them; nothing is run."""

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from curvax import _tree
from curvax._ownership import working_on
from curvax._tables import table
from curvax.batch import Batch
from curvax.placement import state_sharding
from curvax.plan.plan import Due, Plan
from curvax.plan.traffic import KINDS, Traffic, traffic

if TYPE_CHECKING:
    from curvax.step import Step


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    **Arguments:**

    - `flops`: floating-point operations.
    - `bandwidth`: bytes from and to its memory.
    - `link`: bytes that it sends to other devices.
    """

    flops: float
    bandwidth: float
    link: float

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                got = getattr(self, field.name)
                raise ValueError(f"{field.name}: got {got!r}, wanted a number above 0.")

    def seconds(self, work: Traffic) -> float:
        """Arithmetic and memory at once, then the links: what is sent is waited for."""
        inside = max(work.flops / self.flops, work.accessed / self.bandwidth)
        return inside + work.wire() / self.link


class Phase(NamedTuple):
    """A kind of step: what is due, and what a device does, holds and sends."""

    label: str
    count: int
    """The first step of this kind."""
    steps: int
    """How many steps of a cycle are of this kind; 0 for a first step unlike all others."""
    traffic: Traffic
    arguments: int
    """Bytes of parameters, state and batch."""
    temporary: int
    """Bytes of what is between."""

    @property
    def live(self) -> int:
        return self.arguments + self.temporary


def phases(
    step: "Step",
    model: PyTree[Any],
    batch: Batch,
    key: PRNGKeyArray,
    mesh: Mesh,
    state_sharding: PyTree[Any] = None,
) -> list[Phase]:
    """Every kind of step, compiled for a mesh whose devices exist.

    **Arguments:**

    - `model`, `batch`: arrays or `jax.ShapeDtypeStruct`s. A leaf that is sharded over the mesh
      stays so. Others are replicated, and those of a batch are divided along their first axis over
      the axis of the mesh called "data", or else its first.
    - `state_sharding`: of the state of the method, or of the optimizer that `step` was made of: a
      tree of shardings, which may end early. By default that of
      [`state_sharding`][curvax.state_sharding].

    Buffers of model and state are donated, as in training, and come back sharded as they were.

    **Raises** `ValueError` for an array on another mesh, and a batch that cannot be divided.
    """
    model = placed(model, mesh)
    batch = _batch_placed(batch, mesh)
    key_shape = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=_replicated(mesh))
    explicit = AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        state = _state_placed(step, model, mesh, state_sharding)
        arrays, static = eqx.partition(model, _is_shape)

        def run(arrays: Any, state: Any, batch: Any, key: Any, phase: tuple[Due, ...]) -> Any:
            whole = eqx.combine(arrays, static)
            with working_on(mesh):
                new, state, metrics = step.pure(whole, state, batch, key, phase=phase)
            return eqx.filter(new, eqx.is_array), state, metrics

        where = (_shardings(arrays), _shardings(state), _replicated(mesh))
        compiled = jax.jit(
            run,
            static_argnums=4,
            donate_argnums=(0, 1),
            # With Explicit axes the types of the results say where they are.
            out_shardings=None if explicit else where,
        )
        found = []
        for label, count, steps in kinds(step.method.plan):
            phase = step.method.plan.phase(count)
            made = compiled.lower(arrays, state, batch, key_shape, phase).compile()
            memory = made.memory_analysis()
            sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes) if memory else (0, 0)
            found.append(Phase(label, count, steps, traffic(made), *sizes))
    return found


def kinds(plan: Plan) -> list[tuple[str, int, int]]:
    """The label, the first step and the steps in a cycle of each pattern of what is due."""
    period = plan.period
    # The first cycle differs: what has to be there from the start is computed in step 0.
    counts = [*range(period, 2 * period), 0]
    seen: dict[tuple[Due, ...], int] = {}
    steps: dict[int, int] = {}
    for count in counts:
        at = seen.setdefault(plan.phase(count), count)
        steps[at] = steps.get(at, 0) + (count != 0)
    found = []
    for phase, count in seen.items():
        pairs = zip(plan.entries, phase, strict=True)
        due = [entry.quantity.label for entry, due in pairs if due and entry.period > 1]
        label = " + ".join(due) if due else "nothing due" if period > 1 else "every step"
        found.append(
            ("first: " + label if count == 0 and period > 1 else label, count, steps[count])
        )
    return sorted(found, key=lambda kind: -kind[2])


def lines(found: list[Phase], mesh: Mesh, rates: Rates | None) -> list[str]:
    """The table of the phases."""
    kinds = [kind for kind in KINDS if any(kind in each.traffic.counts() for each in found)]
    heading = ["step", "of a cycle", *kinds, "sent", "GFLOP", "accessed", "temporary", "live"]
    rows = [tuple(heading + (["ms"] if rates else []))]
    for each in found:
        counts, sizes = each.traffic.counts(), each.traffic.nbytes()
        cells = [each.label, f"{each.steps}" if each.steps else "first"]
        for kind in kinds:
            cells.append(f"{counts[kind]} × {_bytes(sizes[kind])}" if kind in counts else "")
        cells.append(_bytes(each.traffic.wire()) + ("" if each.traffic.counted else " or more"))
        cells.append(f"{each.traffic.flops / 1e9:.3g}")
        cells += [_bytes(each.traffic.accessed), _bytes(each.temporary), _bytes(each.live)]
        rows.append(tuple(cells + ([f"{1e3 * rates.seconds(each.traffic):.3g}"] if rates else [])))
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    title = f"each of {mesh.size} devices ({axes}), as compiled for {mesh.devices.flat[0].platform}"
    return [f"{title}: operations × bytes of all their results", *table(rows)]


def placed(tree: PyTree[Any], mesh: Mesh) -> PyTree[Any]:
    """The shapes of the arrays of a tree, sharded as they are, or else replicated."""

    def place(path: Any, leaf: Any) -> Any:
        own = _own(leaf, mesh, jax.tree_util.keystr(path)) if _is_array(leaf) else None
        return _shape(leaf, own or _replicated(mesh)) if _is_array(leaf) else leaf

    return jax.tree_util.tree_map_with_path(place, tree)


def _batch_placed(batch: Batch, mesh: Mesh) -> Batch:
    axis = "data" if "data" in mesh.shape else mesh.axis_names[0]

    def place(path: Any, leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        own = _own(leaf, mesh, jax.tree_util.keystr(path))
        if own is None and leaf.ndim and leaf.shape[0] % mesh.shape[axis]:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)}: got {leaf.shape[0]} examples, wanted a "
                f"multiple of {mesh.shape[axis]}, the length of the axis {axis!r} of the mesh."
            )
        divided = NamedSharding(mesh, PartitionSpec(*[axis][: leaf.ndim]))
        return _shape(leaf, own or divided)

    return jax.tree_util.tree_map_with_path(place, batch)


def _state_placed(step: "Step", model: PyTree[Any], mesh: Mesh, wanted: PyTree[Any]) -> Any:
    state = jax.eval_shape(step.init, model)
    if wanted is not None:
        spread = jax.tree.map(
            lambda sharding, part: jax.tree.map(lambda leaf: _shape(leaf, sharding), part),
            wanted,
            state.optimizer,
        )
        return placed(state._replace(optimizer=spread), mesh)
    where = state_sharding(step, model, mesh)
    return jax.tree.map(_shape, state, where)


def _own(leaf: Any, mesh: Mesh, path: str) -> NamedSharding | None:
    """Where an array is on the mesh; None if it is on one device, or nowhere yet."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    if sharding.mesh.shape != mesh.shape:
        other = dict(sharding.mesh.shape)
        raise ValueError(f"mesh: got {dict(mesh.shape)}, but {path or 'an array'} is on {other}.")
    return NamedSharding(mesh, sharding.spec)


def _is_array(leaf: Any) -> bool:
    return _tree.is_array(leaf) or _is_shape(leaf)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shardings(tree: PyTree[Any]) -> PyTree[Any]:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _bytes(number: float) -> str:
    power = min(int(math.log10(max(number, 1.0)) // 3), 4)
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
