"""Stacks: arrays whose first axis counts the matrices, or whatever else is worked on at once."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def identities(stack: int, size: int, dtype: Any) -> Float[Array, "stack n n"]:
    return jnp.zeros((stack, size, size), dtype) + jnp.eye(size, dtype=dtype)[None]


def finite_each(tree: Any) -> Bool[Array, " stack"]:
    """For each matrix of a stack, whether all of it is finite."""
    checks = [
        jnp.all(jnp.isfinite(leaf.reshape(leaf.shape[0], -1)), axis=1)
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.all(jnp.stack(checks), axis=0)


def pick(ok: Bool[Array, " stack"], new: Any, old: Any) -> Any:
    """The new matrices where they are ok, else the old."""
    return jax.tree.map(
        lambda a, b: jnp.where(ok.reshape(ok.shape + (1,) * (a.ndim - 1)), a, b), new, old
    )


def joined(stacks: Sequence[Array]) -> Array:
    """The stacks one behind the other."""
    return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def spans(stacks: Sequence[Array]) -> list[slice]:
    """Where each stack is in the joined one."""
    ends = [0]
    for stack in stacks:
        ends.append(ends[-1] + stack.shape[0])
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


class Groups:
    """Which of several trees of stacks are worked on as one: those with equal keys.

    Every array of a tree has the stack in front, as long for all of them. What is worked on may be
    other trees than these, as many and as long.
    """

    def __init__(self, keys: Iterable[Hashable], trees: Sequence[Any]):
        self._members: dict[Any, list[int]] = {}
        for i, key in enumerate(keys):
            self._members.setdefault(key, []).append(i)
        firsts = [jax.tree.leaves(tree)[0] for tree in trees]
        self._spans = [spans([firsts[i] for i in own]) for own in self._members.values()]

    @property
    def keys(self) -> list[Any]:
        """Of each group."""
        return list(self._members)

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
