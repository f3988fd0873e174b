"""Models, batches and meshes of eight devices for tests of what is sharded.

On a mesh with Explicit axes a model says itself where its products go, as its user would: it
gathers what is shared by the axis of the batch, and adds up what is shared by "tensor".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

EXAMPLES, LENGTH, WORDS = 24, 5, 10
# Filled with an event for each program that is compiled.
COMPILED = []


class Mesh(NamedTuple):
    """The lengths of the axes, and for each leaf which of them share its axes, where they can. The
    batch is shared along the first."""

    axes: dict[str, int]
    specs: dict[str, tuple]

    def made(self, kind):
        kinds = (AxisType[kind],) * len(self.axes)
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=kinds)


MESHES = {
    "data": Mesh({"data": 8}, {}),
    "fsdp": Mesh(
        {"fsdp": 8},
        {
            "w1": ("fsdp",),
            "b1": ("fsdp",),
            "w2": (None, "fsdp"),
            "table": (None, "fsdp"),
            "scale": ("fsdp",),
            "qkv": (None, None, None, "fsdp"),
            "out": (None, None, "fsdp"),
            "layers": (None, "fsdp"),
            "kernel": (None, None, None, "fsdp"),
        },
    ),
    "data and tensor": Mesh(
        {"data": 4, "tensor": 2},
        {
            "w1": ("tensor",),
            "b1": ("tensor",),
            "w2": (None, "tensor"),
            "qkv": (None, "tensor"),
            "out": ("tensor",),
        },
    ),
    "fsdp and tensor": Mesh(
        {"fsdp": 4, "tensor": 2},
        {
            "w1": ("tensor", "fsdp"),
            "b1": ("tensor",),
            "w2": ("fsdp", "tensor"),
            "table": (None, "fsdp"),
            "scale": ("fsdp",),
            "qkv": (None, "tensor", "fsdp"),
            "out": ("tensor", "fsdp"),
            "layers": (None, "fsdp"),
            "kernel": (None, None, None, "fsdp"),
        },
    ),
}


def sharded(params, mesh, specs):
    """The parameters on a mesh: an axis that does not divide evenly is on each device whole."""

    def place(name, leaf):
        pairs = zip(specs.get(name, ()), leaf.shape, strict=False)
        fits = P(*(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in pairs))
        return jax.device_put(leaf, NamedSharding(mesh, fits))

    return {name: place(name, leaf) for name, leaf in params.items()}


def split(batch, mesh):
    """A batch, shared by the devices along the first axis."""
    spread = NamedSharding(mesh, P(mesh.axis_names[0]))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, spread), batch)


def places_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_where(tree, places, name=""):
    for x, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(wanted, x.ndim), (name, x.sharding, wanted)


def assert_same(got, wanted, where=""):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        b = np.asarray(b)
        size = max(np.abs(b).max(initial=0), 1e-30)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * size, err_msg=where)


def start():
    """What a program does first."""
    jax.config.update("jax_enable_x64", True)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: COMPILED.append(event) if "backend_compile" in event else None
    )


# -- models ----------------------------------------------------------------------------------------


def _explicit(w):
    return AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types


def whole(w):
    """A parameter, gathered but along "tensor"."""
    if not _explicit(w):
        return w
    kept = (axis if axis == "tensor" else None for axis in jax.typeof(w).sharding.spec)
    return jax.sharding.reshard(w, P(*kept))


def einsum(equation, *operands):
    if not _explicit(operands[0]):
        return jnp.einsum(equation, *operands)
    inputs, output = equation.split("->")
    axes = {}
    for letters, x in zip(inputs.split(","), operands, strict=True):
        pairs = zip(letters, jax.typeof(x).sharding.spec, strict=True)
        axes.update({letter: axis for letter, axis in pairs if axis})
    return jnp.einsum(equation, *operands, out_sharding=P(*map(axes.get, output)))


def mlp(p, x):
    h = jnp.tanh(einsum("oi,i->o", whole(p["w1"]), x) + whole(p["b1"]))
    return einsum("oi,i->o", whole(p["w2"]), h) + whole(p["b2"])


def attention(p, x):
    table = whole(p["table"])
    h = table.at[x].get(out_sharding=P()) if _explicit(table) else table[x]
    h = h * whole(p["scale"])
    q, k, v = einsum("chdi,ti->chtd", whole(p["qkv"]), h)
    mixed = einsum("htu,hud->thd", jax.nn.softmax(einsum("htd,hud->htu", q, k)), v)
    h = h + einsum("thd,hdo->to", mixed, whole(p["out"]))

    def layer(h, w):
        return h + jnp.tanh(einsum("oi,ti->to", whole(w), h)), None

    h, _ = jax.lax.scan(layer, h, p["layers"])
    return einsum("ti,oi->to", h, whole(p["head"]))


def convolution(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = whole(p["kernel"])
    h = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers)
    h = jnp.mean(jnp.tanh(h[0] + whole(p["b1"])), axis=(0, 1))
    return einsum("oi,i->o", whole(p["w2"]), h) + whole(p["b2"])


def draw(shapes):
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(0.4 * rng.standard_normal(shape)) for k, shape in shapes.items()}


def mlp_problem(inputs, hidden, outputs):
    """Model, parameters, and three batches."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (hidden, inputs), "b1": (hidden,), "w2": (outputs, hidden), "b2": (outputs,)}
    batches = [
        (
            jnp.asarray(rng.standard_normal((EXAMPLES, inputs))),
            jnp.asarray(rng.integers(0, outputs, EXAMPLES)),
        )
        for _ in range(3)
    ]
    return mlp, draw(shapes), batches


def attention_problem():
    rng = np.random.default_rng(1)
    shapes = {
        "table": (WORDS, 8),
        "scale": (8,),
        "qkv": (3, 2, 4, 8),
        "out": (2, 4, 8),
        "layers": (2, 8, 8),
        "head": (WORDS, 8),
    }
    words = lambda: jnp.asarray(rng.integers(0, WORDS, (EXAMPLES, LENGTH)))
    return attention, draw(shapes), [(words(), words()) for _ in range(3)]


def convolution_problem():
    rng = np.random.default_rng(1)
    shapes = {"kernel": (3, 3, 2, 8), "b1": (8,), "w2": (6, 8), "b2": (6,)}
    batches = [
        (
            jnp.asarray(rng.standard_normal((EXAMPLES, 6, 6, 2))),
            jnp.asarray(rng.integers(0, 6, EXAMPLES)),
        )
        for _ in range(3)
    ]
    return convolution, draw(shapes), batches
