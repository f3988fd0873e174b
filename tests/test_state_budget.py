"""Factors of tensors from a budget for the state."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax.methods import kl_shampoo, shampoo, soap
from tests.test_shampoo import close, random_gradients, run, same

F32 = jnp.float32
SHAPES = {"a": (256, 256), "b": (192, 320), "bias": (320,)}
# Methods, and the copies of the parameters that are kept behind them.
METHODS = {
    "soap": (soap, 0),
    "shampoo": (functools.partial(shampoo, graft=None), 1),
    "grafted": (shampoo, 1),
    "kl_shampoo": (kl_shampoo, 0),
}


def structs(shapes, dtype=F32):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def state_of(method, params, **options):
    return jax.eval_shape(METHODS[method][0](**options).init, params)


def of_adam(method, state, params):
    """Multiples of Adam's state in float32, with a momentum behind where one is wanted."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    floats = (x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact))
    found = sum(x.size * x.dtype.itemsize for x in floats)
    return (found / 4 + METHODS[method][1] * size) / (2 * size)


def columns(state, path):
    """Of each side of a leaf: 0 for none, else the columns of its basis or factor."""
    sides = state.tensors[f"['{path}']"][0].sides
    shape = lambda side: side.sketch.shape if hasattr(side, "sketch") else side.factor.shape
    return [0 if side is None else shape(side)[2] for side in sides]


@pytest.mark.parametrize(
    ("method", "budget", "least"),
    [
        ("soap", 0.8, 0.75),
        ("soap", 1.0, 0.92),
        ("soap", 1.5, 1.39),
        ("shampoo", 0.7, 0.65),
        ("shampoo", 1.0, 0.93),
        ("grafted", 1.3, 1.25),
        ("kl_shampoo", 2.0, 1.5),
    ],
)
def test_a_state_is_within_its_budget(method, budget, least):
    params = structs(SHAPES)
    state = state_of(method, params, state_budget=f"{budget}x adam")
    assert least < of_adam(method, state, params) <= budget
    assert all(any(columns(state, path)) for path in "ab")


@pytest.mark.parametrize("method", METHODS)
def test_a_full_rank_is_taken_where_it_fits(method):
    params = structs(SHAPES)
    full = state_of(method, params, **({} if method == "kl_shampoo" else {"rank": 1.0}))
    needed = of_adam(method, full, params)
    got = state_of(method, params, state_budget=f"{needed + 1e-6:.6f}x adam")
    same(jax.tree.map(lambda x: x.shape, got), jax.tree.map(lambda x: x.shape, full))
    assert columns(got, "b") == [192, 320]
    less = state_of(method, params, state_budget=f"{needed - 1e-3:.6f}x adam")
    assert of_adam(method, less, params) < needed and columns(less, "b") != [192, 320]


@pytest.mark.parametrize("method", METHODS)
def test_more_budget_is_never_less_of_a_state(method):
    """Small tensors among the leaves, whose factors are full whatever the rank."""
    params = structs(SHAPES | {"c": (24, 24), "d": (16, 30), "e": (32, 48), "f": (8, 8)})
    found = []
    first = {"grafted": 1.0, "kl_shampoo": 1.29}.get(method, 0.5)
    for budget in first + np.r_[np.arange(0, 0.1, 0.008), np.arange(0.1, 0.6, 0.1), 1, 2, 3, 4]:
        try:
            state = state_of(method, params, state_budget=f"{budget:.3f}x adam")
        except ValueError:
            assert not found
            continue
        used = of_adam(method, state, params)
        assert used <= budget
        found.append((used, *(n for path in "abcdef" for n in columns(state, path))))
    assert len(found) > 10 and len(set(found)) > (2 if method == "kl_shampoo" else 5)
    assert [used for used, *_ in found] == sorted(used for used, *_ in found)
    for before, after in itertools.pairwise(found):
        assert all(x <= y for x, y in zip(before, after, strict=True))


def test_tensors_with_the_largest_state_for_their_size_go_without_a_factor():
    """Of 64 × 1 full sides: Adam's own state is less."""
    shapes = {"large": (64, 64)} | {f"small{i}": (8, 8) for i in range(8)}
    params = structs(shapes)
    least = of_adam("soap", state_of("soap", params, rank=1 / 64), params)
    state = state_of("soap", params, state_budget=f"{least - 0.01:.3f}x adam")
    sides = [columns(state, path) for path in shapes]
    assert sides == [[1, 1], [8, 0]] + [[8, 8]] * 7
    state = state_of("soap", params, state_budget="0.59x adam")
    assert [columns(state, path) for path in shapes] == [[1, 1]] + [[0, 0]] * 8


def test_kl_shampoo_keeps_the_shortest_side_at_least():
    params = structs({"a": (64, 64), "b": (64, 128)})
    state = state_of("kl_shampoo", params, state_budget="2.5x adam")
    assert [columns(state, path) for path in "ab"] == [[64, 64], [64, 0]]
    state = state_of("kl_shampoo", params, state_budget="1.2x adam")
    assert [columns(state, path) for path in "ab"] == [[64, 0], [64, 0]]
    with pytest.raises(ValueError, match=r"got 1x adam, wanted at least 1\.18x"):
        state_of("kl_shampoo", params, state_budget="1.0x adam")


@pytest.mark.parametrize(
    ("method", "budget", "wanted"),
    [("soap", 0.5, 0.53), ("shampoo", 0.5, 0.52), ("grafted", 1, 1.02)],
)
def test_a_budget_that_is_too_small(method, budget, wanted):
    params = structs({"a": (256, 256)})
    with pytest.raises(ValueError) as error:
        state_of(method, params, state_budget=f"{budget}x adam")
    assert str(error.value) == (
        f"state_budget: got {budget:g}x adam, wanted at least {wanted:.2f}x: the smallest factors, "
        "and what is kept beside them, need as much."
    )
    state = state_of(method, params, state_budget=f"{wanted}x adam")
    assert columns(state, "a") == [4, 0]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_a_multiple_of_adam(method):
    with pytest.raises(ValueError, match=r"state_budget: got 'small', wanted a multiple of Adam's"):
        METHODS[method][0](state_budget="small")


@pytest.mark.parametrize(
    ("budget", "share", "small"), [("0.7x adam", 5 / 64, [6, 6]), ("0.56x adam", 1 / 64, [0, 0])]
)
def test_directions_are_those_of_the_rank_that_was_found(budget, share, small):
    params = {"w": jnp.zeros((48, 40)), "small": jnp.zeros((6, 6)), "b": jnp.zeros(6)}
    gradients = random_gradients(params, 5)
    got, states = run(soap(refresh_every=2, state_budget=budget), params, gradients)
    wanted, others = run(soap(refresh_every=2, rank=share), params, gradients)
    assert columns(states[0], "w") == columns(others[0], "w")
    assert columns(states[0], "small") == small
    close([d["w"] for d in got], [d["w"] for d in wanted])
    if not any(small):
        wanted, _ = run(soap(longest=0), params, gradients)  # Adam, but for its first step
    close([d["small"] for d in got], [d["small"] for d in wanted])


def test_what_is_masked_or_of_low_precision():
    """Only leaves that a method sees count, and those of low precision as in float32."""
    params = structs(SHAPES, jnp.bfloat16)
    state = state_of("soap", params, state_budget="1.0x adam")
    floats = jax.tree.leaves(state.tensors)
    used = sum(4 * x.size for x in floats if x.dtype == F32)
    size = sum(leaf.size for leaf in params.values())
    assert 0.9 * 8 * size < used <= 8 * size
    inner = soap(state_budget="1.0x adam")
    masked = optax.masked(inner, {"a": True, "b": False, "bias": False})
    alone = jax.eval_shape(inner.init, {"a": params["a"]}).tensors["['a']"]
    there = jax.eval_shape(masked.init, params).inner_state.tensors["['a']"]
    same(*(jax.tree.map(lambda x: x.shape, each) for each in (alone, there)))
    nothing = {"a": optax.MaskedNode()}
    assert inner.update(nothing, inner.init(nothing), nothing)[0] == nothing
    assert jax.eval_shape(inner.init, {"bias": params["bias"]}).tensors == {}


def test_numbers_can_be_traced_and_states_be_mapped():
    params = {"w": jnp.zeros((48, 40)), "small": jnp.zeros((6, 6)), "b": jnp.zeros(6)}
    gradients = random_gradients(params, 3)
    options = {"refresh_every": 2, "state_budget": "0.56x adam"}
    static = {"refresh_every", "block_size", "merge", "longest"}
    inner = soap(b1=0.5, **options)
    wanted, states = run(inner, params, gradients)
    with jax.numpy_dtype_promotion("standard"):
        injected = optax.inject_hyperparams(soap, static_args=static)(b1=0.5, **options)
        got, _ = run(injected, params, gradients)
    close(got, wanted, rtol=1e-6, atol=1e-6)
    mapped = optax.tree_map_params(inner, lambda leaf: leaf + 1, states[0])
    same(mapped.rest.mu["b"], jnp.ones(6))
    same(mapped.tensors, states[0].tensors)
    same(jax.jit(inner.init)(params), states[0])
