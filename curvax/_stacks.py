"""Stacks: arrays whose first axis counts the matrices, or whatever else is worked on at once."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from curvax._ownership import over_devices

# Times that a factorisation is tried, each with ten times the ridge of the one before.
ATTEMPTS = 4


def identities(stack: int, size: int, dtype: Any) -> Float[Array, "stack n n"]:
    return jnp.zeros((stack, size, size), dtype) + jnp.eye(size, dtype=dtype)[None]


def finite_each(tree: Any) -> Bool[Array, " stack"]:
    """For each matrix of a stack, whether all of it is finite."""
    checks = [
        jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.all(jnp.stack(checks), axis=0)


def pick(ok: Bool[Array, " stack"], new: Any, old: Any) -> Any:
    """The new matrices where they are ok, else the old."""
    return jax.tree.map(
        lambda a, b: jnp.where(ok.reshape(ok.shape + (1,) * (a.ndim - 1)), a, b), new, old
    )


def escalated(
    attempt: Callable[[list[Array]], list[Any]], ridges: list[Array]
) -> list[tuple[Any, Bool[Array, " stack"]]]:
    """`attempt(ridges)`, with a ridge ten times as large for each matrix that came to nothing."""

    def again(carry: Any) -> Any:
        ridges, results, oks, tries = carry
        new = attempt(ridges)
        fine = [finite_each(each) for each in new]
        results = [
            pick(now & ~ok, each, result)
            for now, ok, each, result in zip(fine, oks, new, results, strict=True)
        ]
        ridges = [
            jnp.where(now, ridge, 10 * ridge) for now, ridge in zip(fine, ridges, strict=True)
        ]
        return ridges, results, [ok | now for ok, now in zip(oks, fine, strict=True)], tries + 1

    def more(carry: Any) -> Array:
        _, _, oks, tries = carry
        return ~jnp.all(jnp.concatenate(oks)) & (tries < ATTEMPTS)

    empty = [
        jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), each)
        for each in jax.eval_shape(attempt, ridges)
    ]
    begin = (ridges, empty, [jnp.zeros(r.shape, bool) for r in ridges], jnp.zeros((), jnp.int32))
    _, results, oks, _ = jax.lax.while_loop(more, again, begin)
    return list(zip(results, oks, strict=True))


def joined(stacks: Sequence[Array]) -> Array:
    """The stacks one behind the other."""
    return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def spans(stacks: Sequence[Array]) -> list[slice]:
    """Where each stack is in the joined one."""
    ends = [0]
    for stack in stacks:
        ends.append(ends[-1] + stack.shape[0])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def places(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Where each key stands."""
    found: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return found


class Groups:
    """Which of several trees of stacks are worked on as one: those with equal keys.

    Every array of a tree has the stack in front, as long for all of them. What is worked on may be
    other trees than these, as many and as long.
    """

    def __init__(self, keys: Iterable[Hashable], trees: Sequence[Any]):
        self._members = places(keys)
        firsts = [jax.tree.leaves(tree)[0] for tree in trees]
        self._spans = [spans([firsts[i] for i in own]) for own in self._members.values()]

    @property
    def keys(self) -> list[Any]:
        """Of each group."""
        return list(self._members)

    def map(self, function: Callable[..., list[Any]], *lists: Sequence[Any]) -> list[Any]:
        """One tree for each member, from `function(keys, *lists)` on whole groups: with each matrix
        on one device, if a mesh is set.
        """
        return self.apart(over_devices(function, self.keys, *map(self.together, lists)))

    def together(self, trees: Sequence[Any]) -> list[Any]:
        """One tree for each group: the stacks of its members one behind the other."""
        join = lambda *stacks: joined(stacks)
        return [jax.tree.map(join, *(trees[i] for i in own)) for own in self._members.values()]

    def apart(self, wholes: Sequence[Any]) -> list[Any]:
        """One tree for each member, from one for each group."""
        found: dict[int, Any] = {}
        for own, cuts, whole in zip(self._members.values(), self._spans, wholes, strict=True):
            for i, span in zip(own, cuts, strict=True):
                found[i] = jax.tree.map(lambda leaf, span=span: leaf[span], whole)
        return [found[i] for i in range(len(found))]
