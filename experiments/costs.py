"""What a step of a method costs: in gradients, counted in operations, and in time beside Adam's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx
from curvax._jaxpr import cost, is_literal, operations, sub_jaxprs, used
from curvax.plan.quantities import Scope
from experiments.data import Arrays, batches
from experiments.recipes import Trainer
from experiments.timing import interleave
from experiments.training import Run, Task


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a trainer's steps.

    Attributes:
        gradients: Operations of each step of a cycle, as a multiple of those of one gradient, with
            one step of an inner solver.
        product: The same of each further step of it.
        milliseconds: Of a step, a median over interleaved cycles.
        adam_milliseconds: Of a step of Adam beside them.
    """

    gradients: tuple[float, ...]
    product: float
    milliseconds: float
    adam_milliseconds: float

    @property
    def in_adam_steps(self) -> float:
        """The time of a step."""
        return self.milliseconds / self.adam_milliseconds

    def of(self, run: Run) -> np.ndarray:
        """In gradients, of each step of a run."""
        steps = np.arange(len(run.losses))
        spent = np.asarray(self.gradients)[steps % len(self.gradients)]
        if run.solver_steps:
            spent = spent + self.product * np.maximum(np.asarray(run.solver_steps) - 1, 0)
        return spent


# Larger arrays are not looked at.
_FEW = 64


class _Steady:
    """A trainer in the middle of its cycles, at a learning rate of zero."""

    def __init__(self, trainer: Trainer, task: Task, batch_size: int):
        self.trainer, self.key = trainer, jax.random.key(0)
        self.model = task.init(self.key)
        self.state = trainer.init(self.model, 0.0, 1)
        (self.batch,) = batches(task.train, batch_size, seed=0, steps=1)
        self.advance(2 * trainer.cycle)

    def advance(self, steps: int) -> Any:
        for _ in range(steps):
            self.model, self.state, _ = self.trainer(self.model, self.state, self.batch, self.key)
        return self.state


def measure(
    trainer: Trainer, adam: Trainer, task: Task, batch_size: int, seconds: float = 2.0
) -> Cost:
    """The cost on a task, timed for about `seconds`."""
    steady, reference = _Steady(trainer, task, batch_size), _Steady(adam, task, batch_size)
    gradients, product = _in_gradients(steady, task.objective)
    steps = trainer.cycle
    timed = interleave(
        {"adam": lambda: reference.advance(steps), "own": lambda: steady.advance(steps)},
        seconds=seconds,
        least=3,
    )
    own, base = (1e3 * timed[name].median / steps for name in ("own", "adam"))
    return Cost(gradients, product, own, base)


def _in_gradients(steady: _Steady, objective: cx.Objective) -> tuple[tuple[float, ...], float]:
    """Operations of the steps of a cycle, and of a product of the solver, in gradients."""
    trainer, batch = steady.trainer, steady.batch
    params, bound = objective.bind(steady.model)
    gradient = jax.make_jaxpr(jax.value_and_grad(bound.value))(params, batch)
    unit, _ = cost(gradient.jaxpr)
    traces: dict[Any, Any] = {}
    counts = []
    for step in range(trainer.cycle):
        phase = trainer.phase(step)
        if phase not in traces:
            traces[phase] = _trace(steady, phase)
        held = jax.tree.leaves(eqx.filter((steady.model, steady.state), eqx.is_array))
        inputs = [_as_known(leaf) for leaf in held]
        inputs += [None] * (len(traces[phase].invars) - len(inputs))  # the batch and the key
        flops, _ = count(traces[phase], inputs)
        counts.append(flops / unit)
        steady.advance(1)
    return tuple(counts), _product(trainer.method, steady.model, batch, steady.key) / unit


def _trace(steady: _Steady, phase: Any) -> Any:
    arrays, static = eqx.partition((steady.model, steady.state), eqx.is_array)

    def step(arrays: Any, batch: Arrays, key: Any) -> Any:
        model, state = eqx.combine(arrays, static)
        made = steady.trainer.pure(model, state, batch, key, phase)
        return eqx.filter(made, eqx.is_array)

    return jax.make_jaxpr(step)(arrays, steady.batch, steady.key).jaxpr


def _product(method: cx.Method | None, model: Any, batch: Arrays, key: Any) -> float:
    if method is None or method.solver is None:
        return 0.0
    params, objective = method.objective.bind(model)
    quantity = method.curvature

    def operator(p: Any, batch: Arrays, then: Any) -> Any:
        made = quantity.compute(Scope(objective, p, batch, key))
        return eqx.filter((made, then(made, p)), eqx.is_array)

    both, alone = (
        jax.make_jaxpr(lambda p, batch, then=then: operator(p, batch, then))(params, batch)
        for then in (lambda made, p: made.mv(p), lambda made, p: None)
    )
    return cost(both.jaxpr)[0] - cost(alone.jaxpr)[0]


def count(jaxpr: Any, known: Sequence[Any]) -> tuple[float, list[Any]]:
    """Operations of a jaxpr some of whose inputs are known (None: not known), and those of its
    outputs that follow from them.

    As `curvax._jaxpr.cost`, but of a `cond` whose predicate is known only its branch counts: a
    method that decides by its count of steps whether to refresh does not refresh in each.
    """
    values = {var: x for var, x in zip(jaxpr.invars, known, strict=True) if x is not None}
    read = lambda atom: _as_known(atom.val) if is_literal(atom) else values.get(atom)
    total = 0.0
    for eqn in used(jaxpr):
        inputs, inner = [read(atom) for atom in eqn.invars], sub_jaxprs(eqn)
        flops, outputs = _count_one(eqn, inner, inputs)
        total += flops
        pairs = zip(eqn.outvars, outputs, strict=True)
        values.update({var: x for var, x in pairs if x is not None})
    return total, [read(atom) for atom in jaxpr.outvars]


def _count_one(eqn: Any, inner: list[Any], inputs: list[Any]) -> tuple[float, list[Any]]:
    name, unknown = eqn.primitive.name, [None] * len(eqn.outvars)
    if name == "cond":
        index, *rest = inputs
        chosen = inner if index is None else [inner[min(max(int(index), 0), len(inner) - 1)]]
        done = [count(branch, rest) for branch in chosen]
        return max(flops for flops, _ in done), done[0][1] if len(done) == 1 else unknown
    if name == "platform_index":
        return 0.0, [_platform(eqn.params["platforms"])]
    if len(inner) == 1 and len(inner[0].invars) == len(inputs) and name != "scan":
        return count(inner[0], inputs)
    if inner:
        repeats = eqn.params["length"] if name == "scan" else 1
        return repeats * sum(count(each, [None] * len(each.invars))[0] for each in inner), unknown
    outputs = _follows(eqn, inputs)
    return (operations(eqn), unknown) if outputs is None else (0.0, outputs)


def _follows(eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """The outputs of an equation of whole numbers and flags, if they follow from what is known.

    What is computed is taken to be finite: a step that is not made costs less, but is rare.
    """
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    if name == "is_finite":
        return [np.broadcast_to(True, aval.shape)]
    if not inputs or not _is_whole(aval):
        return None
    if all(x is not None for x in inputs):
        made = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        return list(made) if eqn.primitive.multiple_results else [made]
    # Either decides alone.
    decided = {"and": False, "or": True}.get(name) if aval.dtype == bool else None
    alone = [x for x in inputs if x is not None and decided is not None and np.all(x == decided)]
    return [np.full(aval.shape, decided)] if alone else None


def _platform(platforms: Sequence[Any]) -> np.ndarray:
    here = {jax.default_backend(), *({"cuda"} if jax.default_backend() == "gpu" else ())}
    fits = [i for i, each in enumerate(platforms) if each is None or here & set(each)]
    return np.asarray(fits[0], np.int32)


def _as_known(leaf: Any) -> Any:
    """The leaf if it has whole numbers or flags, which a predicate may follow from."""
    return leaf if _is_whole(jax.typeof(jnp.asarray(leaf))) else None


def _is_whole(aval: Any) -> bool:
    kinds = jnp.issubdtype(aval.dtype, jnp.integer) or jnp.issubdtype(aval.dtype, jnp.bool_)
    return aval.size <= _FEW and kinds
