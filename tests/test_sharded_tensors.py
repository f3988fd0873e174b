"""The methods for tensors on eight devices: parameters that are sharded in several ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import curvax as cx
from curvax.tensors import Layouts
from tests.devices import printed
from tests.meshes import COMPILED, assert_where, places_of, sharded, start
from tests.problems import avals

STEPS, EVERY = 12, 6

# Matrices are square where both sides have a full factor: of one that is not, that of the longer
# side is singular after a step, and which basis its null space has is a matter of rounding. Sides
# of 12 and 36 are shared by 4 devices, but not by 8; low rank is for more than 32.
SQUARE = {"w1": (12, 12), "b1": (12,), "w2": (16, 16)}
LONG = {"w1": (40, 36), "b1": (36,), "w2": (36, 48)}
METHODS = {
    "shampoo": (lambda m: m.shampoo(refresh_every=EVERY), SQUARE),
    "shampoo at low rank": (lambda m: m.shampoo(rank=8, refresh_every=EVERY), LONG),
    "soap": (lambda m: m.soap(refresh_every=EVERY), SQUARE),
    "soap at low rank": (lambda m: m.soap(rank=8, refresh_every=EVERY), LONG),
    "kl_shampoo of blocks": (lambda m: m.kl_shampoo(block_size=4, refresh_every=EVERY), SQUARE),
    "muon": (lambda m: m.muon(), LONG),
    "soap_muon": (lambda m: m.soap_muon(adam=cx.EigenbasisAdam(one_sided=True)), LONG),
    "psgd_kron": (lambda m: m.psgd_kron(probability=0.5), LONG),
}
# For each mesh the lengths of its axes, and which of them share the axes of a leaf, where they can.
MESHES = {
    "replicated": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {"w1": ("fsdp",), "b1": ("fsdp",), "w2": (None, "fsdp")}),
    "both": (
        {"fsdp": 4, "tensor": 2},
        {"w1": ("fsdp", "tensor"), "b1": ("tensor",), "w2": ("tensor", "fsdp")},
    ),
}


def gradients_of(shapes):
    """Well-conditioned matrices, with singular values that are apart."""
    rng = np.random.default_rng(0)

    def draw(shape):
        if len(shape) == 1:
            return rng.standard_normal(shape)
        u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
        return u * np.linspace(1, 2, min(shape[-2:])) @ vt

    return [{name: draw(shape) for name, shape in shapes.items()} for _ in range(STEPS)]


def assert_sharded_along(state, leaf):
    """What is kept of a leaf that is one tensor, in its shape."""
    spec = (None, *jax.typeof(leaf).sharding.spec)
    for x in jax.tree.leaves(state):
        assert x.shape != (1, *leaf.shape) or tuple(jax.typeof(x).sharding.spec) == spec


def updates_of(optimizer, gradients, given=None):
    """With the state where it is `given` to be, or where `init` puts it."""
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state = jax.jit(optimizer.init, out_shardings=given)(params)
    types, places = avals(state), places_of(state)
    ahead = None if given is None else (places_of(params), places)
    step = jax.jit(optimizer.update, out_shardings=ahead)
    results = []
    for count, gradient in enumerate(gradients):
        COMPILED.clear()
        updates, state = step(gradient, state, params)
        assert len(COMPILED) == (1 if count == 0 else 0), (count, COMPILED)
        assert avals(state) == types
        assert_where(state, places)
        assert_where(updates, places_of(params))
        results.append(updates)
    assert int(state.skipped) == 0
    return jax.tree.map(np.asarray, results), state


def check(kind):
    for name, (build, shapes) in METHODS.items():
        optimizer, gradients = build(cx.methods), gradients_of(shapes)
        wanted, _ = updates_of(optimizer, [jax.tree.map(jnp.asarray, each) for each in gradients])
        for label, (axes, specs) in MESHES.items():
            kinds = (AxisType[kind],) * len(axes)
            mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)
            with jax.set_mesh(mesh):
                split = [sharded(each, mesh, specs) for each in gradients]
                # Explicit axes say where a state is. Others leave it to the compiler, which is of
                # another mind after the first step, unless it is given.
                given = None
                if kind == "Auto":
                    keep = "own" if label == "both" else "all"
                    given = cx.state_sharding(optimizer, split[0], mesh, keep=keep)
                got, state = updates_of(optimizer, split, given)
                if given is None and shapes is LONG:
                    assert_sharded_along(state, split[0]["w1"])
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max())
            print(f"{name}, {label}", flush=True)


def main(kind):
    start()
    check(kind)


@pytest.mark.parametrize(
    ("text", "shape", "leaf", "wanted"),
    [
        ("...", (8, 4), ("a", "b"), (None, "a", "b")),
        ("in layers out", (8, 3, 4), ("a", None, "b"), (None, "b", "a")),
        ("layers in out out", (4, 8, 2, 4), ("a", "b", "c", None), ("a", "c", "b")),
        ("layers in out out", (4, 8, 2, 4), (None, "b", None, "c"), (None, None, "b")),
        ("layers in out out", (4, 8, 1, 4), ("a", None, None, "c"), ("a", "c", None)),
    ],
)
def test_where_a_stack_is(text, shape, leaf, wanted):
    (layout,) = Layouts.of({"": text})([jax.ShapeDtypeStruct(shape, jnp.float32)])
    assert layout.spec(leaf) == wanted


PROGRAM = """
    from tests.test_sharded_tensors import main
    main({kind!r})
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_updates_are_those_of_one_device(kind):
    """Nothing is compiled after the first step, and the state stays where it is."""
    wanted = " ".join(f"{name}, {label}" for name in METHODS for label in MESHES)
    assert " ".join(printed(PROGRAM.format(kind=kind), devices=8)) == wanted
