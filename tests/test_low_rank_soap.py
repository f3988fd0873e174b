"""SOAP at low rank: equal to a reference with complete bases, and SOAP where these are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import curvax as cx
from curvax.methods import soap, soap_muon
from curvax.rules.subspaces import SubspaceSide, mean_squares, mixed_sides, scaled
from tests.references import shampoo as reference
from tests.test_shampoo import close, descent, expected, random_gradients, run, same

# Shapes of leaves, and the dimensions that are longer than 32.
SHAPES = {
    "both": ((36, 40), (0, 1)),
    "first": ((36, 6), (0,)),
    "second": ((6, 36), (1,)),
    "tensor": ((34, 3, 36), (0, 2)),
}


@pytest.fixture
def small_sides(monkeypatch):
    """Sides of a few entries have low rank, too."""
    monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)


def sides(optimizer, shape):
    return optimizer.init({"w": jnp.zeros(shape)}).tensors["['w']"][0].sides


@pytest.mark.parametrize("case", SHAPES)
def test_low_rank_soap_is_its_reference(case):
    shape, long = SHAPES[case]
    options = {"b1": 0.8, "b2": 0.9, "decay": 0.7}
    optimizer = soap(refresh_every=2, rank=4, **options)
    first = sides(optimizer, shape)
    starts = {i: np.asarray(first[i].basis[0]) for i in long}
    assert all(hasattr(side, "sketch") == (i in long) for i, side in enumerate(first))
    rule = reference.SubspaceSoap(shape, starts, every=2, **options)
    path, state = descent(optimizer, {"w": shape})
    assert not path[0]["w"].any()
    close(path, expected({"w": rule}, {"w": shape}))
    for i in long:
        side = state.tensors["['w']"][0].sides[i]
        assert side.age.tolist() == side.failures.tolist() == [0]


@pytest.mark.parametrize("options", [{}, {"one_sided": True}, {"longest": 36}])
def test_with_full_bases_it_is_soap(options):
    """Whose mean is kept in the coordinates of the bases, and rotated along."""
    shapes = {"w": (36, 40), "t": (3, 4, 5)}
    options = {"refresh_every": 3} | options
    path, _ = descent(soap(rank=1.0, **options), shapes)
    close(path, descent(soap(**options), shapes)[0], atol=1e-9)


def test_with_one_direction_outside_it_is_soap(small_sides):
    """On gradients with the same singular vectors, whose strengths change places on the way."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((5, 5)))[0] for _ in range(2))
    strengths = np.asarray([1.0, 0.3, 0.1, 0.03, 0.01])
    gradients = []
    for t in range(120):
        now = strengths if t < 60 else strengths[[2, 0, 1, 3, 4]]
        gradients.append({"w": jnp.asarray((u * (now * rng.choice([-1, 1], 5))) @ v.T)})
    options = {"refresh_every": 1, "b2": 0.5, "b1": 0.5}
    params = {"w": jnp.zeros((5, 5))}
    wanted, _ = run(soap(**options), params, gradients)
    got, states = run(soap(rank=4, **options), params, gradients)
    for t in (*range(40, 60), *range(100, 120)):
        np.testing.assert_allclose(got[t]["w"], wanted[t]["w"], atol=1e-5)
    assert states[-1].tensors["['w']"][0].square.shape == (1, 5, 5)
    # One direction less is another method.
    far, _ = run(soap(rank=3, **options), params, gradients)
    assert np.abs(far[-1]["w"] - wanted[-1]["w"]).max() > 0.05


def test_soap_muon_takes_a_low_rank():
    params = {"w": jnp.zeros((36, 40))}
    gradients = random_gradients(params, 4)
    rule = lambda rank: cx.SubspaceAdam(rank=rank, refresh_every=2)
    wanted, _ = run(soap_muon(adam=cx.EigenbasisAdam(refresh_every=2)), params, gradients)
    close(run(soap_muon(adam=rule(1.0)), params, gradients)[0], wanted)
    got, states = run(soap_muon(adam=rule(4)), params, gradients)
    assert states[-1].tensors["['w']"][0][0].square.shape == (1, 5, 5)
    values = np.linalg.svd(got[-1]["w"], compute_uv=False) / (0.2 * 40**0.5)
    assert values.min() > 0.5 and values.max() < 1.3


def complete(basis):
    q = np.linalg.qr(basis, mode="complete")[0]
    q[:, : basis.shape[1]] = basis
    return q


def random_bases(*sizes, stack=2, seed=0):
    rng = np.random.default_rng(seed)
    return [
        np.stack([np.linalg.qr(rng.standard_normal((n, k)))[0] for _ in range(stack)])
        for n, k in sizes
    ]


@pytest.mark.parametrize("dims", [(), (1,), (0, 2), (0, 1, 2)])
def test_squares_and_scales_are_those_of_complete_bases(dims):
    shape, columns = (5, 6, 7), (2, 3, 4)
    stack = np.random.default_rng(1).standard_normal((2, *shape))
    bases = dict(zip(dims, random_bases(*((shape[d], columns[d]) for d in dims)), strict=True))
    arrays = {d: jnp.asarray(q) for d, q in bases.items()}
    squares = mean_squares(jnp.asarray(stack), arrays)
    scales = jnp.asarray(np.random.default_rng(2).uniform(1, 2, squares.shape))
    product = scaled(jnp.asarray(stack), scales, arrays)
    close(scaled(jnp.asarray(stack), jnp.full_like(scales, 3), arrays), jnp.asarray(3 * stack))
    for i, tensor in enumerate(stack):
        seen, spread = tensor, np.asarray(scales[i])
        for d, q in bases.items():
            seen = reference.multiplied(seen, complete(q[i]).T, d)
        wanted = seen**2
        for d, q in bases.items():
            inside, outside = np.split(wanted, [q.shape[2]], axis=d)
            wanted = np.concatenate([inside, outside.mean(axis=d, keepdims=True)], axis=d)
            spread = np.take(spread, np.minimum(np.arange(shape[d]), q.shape[2]), axis=d)
        close(squares[i], jnp.asarray(wanted))
        back = seen * spread
        for d, q in bases.items():
            back = reference.multiplied(back, complete(q[i]), d)
        close(product[i], jnp.asarray(back))


def test_outside_of_all_bases_there_is_one_second_moment():
    (p, q) = random_bases((6, 2), (7, 3), stack=1)
    outside = lambda basis: np.eye(len(basis[0])) - basis[0] @ basis[0].T
    g = outside(p) @ np.random.default_rng(0).standard_normal((6, 7)) @ outside(q)
    squares = mean_squares(jnp.asarray(g)[None], {0: jnp.asarray(p), 1: jnp.asarray(q)})[0]
    np.testing.assert_allclose(squares[-1, -1], (g**2).sum() / (4 * 4), rtol=1e-10)
    assert squares.ravel()[:-1].max() < 1e-10


def test_what_is_outside_is_never_taken_for_nothing():
    """In single precision, of gradients inside of the spans: rounding errors are not amplified."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((40, 4)))[0] for _ in range(2))
    params = {"w": jnp.zeros((40, 40), jnp.float32)}
    gradients = [
        {"w": jnp.asarray(u @ rng.standard_normal((4, 4)) @ v.T, jnp.float32)} for _ in range(30)
    ]
    for rank, amplified in ((4, False), (None, True)):
        directions, _ = run(soap(rank=rank, refresh_every=3), params, gradients)
        for direction in directions[10:]:  # the first bases are as far off as a ridge takes them
            step = np.asarray(direction["w"], np.float64)
            inside = u @ (u.T @ step @ v) @ v.T
            share = np.linalg.norm(step - inside) / np.linalg.norm(inside)
            assert share > 1 if amplified else share < 0.02, (rank, share)
    # Even where rounding leaves nothing at all.
    squares = mean_squares(
        jnp.eye(5, dtype=jnp.float32)[None, :, :2], {0: jnp.eye(5, 2, dtype=jnp.float32)[None]}
    )
    np.testing.assert_allclose(squares[0, 2], 128 * 2.0**-23 / 3, rtol=1e-6)


def test_bases_tend_to_the_leading_eigenvectors():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(2))
    scales = np.concatenate([[8.0, 6.0, 4.0], np.full(37, 0.2)])
    draw = lambda: (u * scales) @ np.linalg.qr(rng.standard_normal((40, 40)))[0] @ v.T
    gradients = [{"w": jnp.asarray(draw())} for _ in range(30)]
    _, states = run(soap(rank=3, refresh_every=2, decay=0.6), {"w": jnp.zeros((40, 40))}, gradients)
    left, _ = states[-1].tensors["['w']"][0].sides
    np.testing.assert_allclose(left.basis[0].T @ left.basis[0], np.eye(3), atol=1e-10)
    np.testing.assert_allclose(np.abs(u[:, :3].T @ left.basis[0]), np.eye(3), atol=1e-3)


def test_a_refresh_keeps_the_sum_of_the_squares():
    """And that of no square is lost to what is outside of a basis."""
    shape, k = (36, 40), 5
    params = {"w": jnp.zeros(shape)}
    _, states = run(soap(rank=k, refresh_every=4), params, random_gradients(params, 6))
    before, after = (state.tensors["['w']"][0] for state in states[5:7])
    assert not np.array_equal(before.sides[0].basis, after.sides[0].basis)
    times = np.multiply.outer(*(np.r_[np.ones(k), n - k] for n in shape))
    rule = cx.SubspaceAdam(rank=k, refresh_every=4)
    (fresh,) = jax.jit(rule.refresh)([before], jnp.asarray(5))
    assert not np.allclose(fresh.square, before.square, rtol=1e-3)
    sums = [np.sum(times * state.square[0]) for state in (fresh, before)]
    np.testing.assert_allclose(*sums, rtol=1e-10)
    assert (fresh.square > 0).all()


def test_columns_that_change_places_take_their_squares_along():
    rng = np.random.default_rng(0)
    (q,) = random_bases((6, 3), stack=1)
    sketch = q * np.asarray([1.0, 4.0, 9.0])  # of F = Q diag(1, 4, 9) Qᵀ
    count = jnp.zeros((1,), jnp.int32)
    side = SubspaceSide(jnp.asarray(q), jnp.asarray(sketch), count, count)
    (new,) = mixed_sides([side], jnp.asarray(False))
    close(jnp.abs(new.side.basis), jnp.abs(jnp.asarray(q[..., ::-1])))
    squares = rng.uniform(1, 2, (1, 4, 5))
    close(new.reordered(jnp.asarray(squares), 0), jnp.asarray(squares[:, [2, 1, 0, 3]]))


def test_a_basis_that_cannot_be_made_stays():
    """Of one layer of two."""
    (q,) = random_bases((6, 3))
    sketch = np.random.default_rng(1).standard_normal((2, 6, 6))
    sketch = sketch @ sketch.swapaxes(1, 2) @ q
    sketch[1, 0, 0] = np.nan
    count = jnp.zeros((2,), jnp.int32)
    side = SubspaceSide(jnp.asarray(q), jnp.asarray(sketch), count, count)
    for first in (False, True):
        (new,) = mixed_sides([side], jnp.asarray(first))
        assert new.side.age.tolist() == new.side.failures.tolist() == [0, 1]
        same(new.side.basis[1], side.basis[1])
        same(new.side.sketch[1, 1:], side.sketch[1, 1:])
        np.testing.assert_allclose(new.shares[1], np.eye(4), atol=1e-12)
        assert np.abs(new.side.basis[0] - side.basis[0]).max() > 0.1


def test_state_is_what_the_documentation_says():
    """One copy of the parameters and thin matrices, with two counters for each side."""
    m, n, k = 64, 96, 8
    params = {"w": jax.ShapeDtypeStruct((m, n), jnp.float32)}
    state = jax.eval_shape(soap(rank=k).init, params)
    found = sum(leaf.size for leaf in jax.tree.leaves(state.tensors))
    assert found == m * n + (k + 1) ** 2 + 2 * k * (m + n) + 4
    shares = jax.eval_shape(soap(rank=0.45).init, params).tensors["['w']"][0].sides
    assert [side.basis.shape[2] for side in shares] == [28, 32]  # 28, and 43 in whole tiles
    large = {"w": jax.ShapeDtypeStruct((9000, 40), jnp.float32)}
    long, short = (
        jax.eval_shape(soap(rank=k, longest=None, block_size=None).init, large)
        .tensors["['w']"][0]
        .sides
    )
    assert long is None and short.basis.shape == (1, 40, 8)
    low = {"w": jax.ShapeDtypeStruct((32, 33), jnp.bfloat16)}
    full, thin = jax.eval_shape(soap(rank=k).init, low).tensors["['w']"][0].sides
    assert full.basis.shape == (1, 32, 32) and thin.basis.shape == (1, 33, 8)
    assert thin.basis.dtype == jnp.float32


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars if hasattr(var.aval, "shape"))
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_no_square_matrix_of_a_side_is_formed():
    params = {"w": jnp.zeros((48, 40))}
    for rank, some in ((4, False), (None, True)):
        optimizer = soap(rank=rank)
        state = optimizer.init(params)
        closed = jax.make_jaxpr(optimizer.update)(params, state, params)
        found = set(shapes_in(closed.jaxpr))
        assert any(shape[-2:] in ((48, 48), (40, 40)) for shape in found) == some
        assert (1, 48, 40) in found


def test_masked_leaves_and_several_of_a_form():
    """Two leaves of one form are turned together, and are as each alone; init on shapes."""
    optimizer = soap(rank=4, refresh_every=2)
    params = {"a": jnp.zeros((36, 40)), "b": jnp.zeros((40, 36)), "c": jnp.zeros((36, 40))}
    gradients = random_gradients(params, 5)
    together, states = run(optimizer, params, gradients)
    for name in params:
        alone, _ = run(optimizer, {name: params[name]}, [{name: g[name]} for g in gradients])
        close([{name: d[name]} for d in together], alone)
    same(optimizer.init(jax.eval_shape(lambda: params)), states[0])


@pytest.mark.parametrize("rank", [0, 1.5, -0.1])
def test_a_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank: got {rank}, wanted a share in"):
        soap(rank=rank)
