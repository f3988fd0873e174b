"""Shampoo, SOAP and KL-Shampoo: equal to their papers, and what else could go wrong with them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax import eigenbasis, roots
from curvax.methods import kl_shampoo, shampoo, soap
from curvax.rules.sides import along, second_moment, with_factor
from curvax.tensors import Layouts
from tests.problems import avals
from tests.references import shampoo as reference

STEPS, RATE = 10, 0.05
METHODS = {
    "shampoo": shampoo,
    "soap": soap,
    "low_rank_soap": functools.partial(soap, rank=2),
    "kl_shampoo": kl_shampoo,
}
ROOTS = {
    "eigh": cx.EighRoot,
    "eigenbasis": cx.EigenbasisRoot,
    "newton": cx.CoupledNewtonRoot,
    "newton_schulz": cx.NewtonSchulzRoot,
}


def close(got, wanted, rtol=1e-8, atol=1e-10):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, wanted)


def same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# -- a small problem -----------------------------------------------------------------------------


def scales(size, flipped):
    values = np.linspace(0.3, 2.0, size)
    return values[::-1] if flipped else values


def gradient(theta, t, flips=None):
    """Of a quadratic, with noise whose directions have scales of their own; those are turned round
    in the middle of the path if it `flips`.
    """
    found = {}
    for i, (name, leaf) in enumerate(theta.items()):
        noise = np.random.default_rng((3, i, t)).standard_normal(leaf.shape)
        for dim, size in enumerate(leaf.shape):
            flipped = flips is not None and t >= flips
            noise = reference.multiplied(noise, np.diag(scales(size, flipped)), dim)
        found[name] = 0.3 * leaf + noise
    return found


def beginning(shapes):
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def descent(optimizer, shapes, *, steps=STEPS, flips=None, dtype=jnp.float64):
    """The directions of an Optax transformation, and its last state."""
    theta, path = beginning(shapes), []
    params = {name: jnp.asarray(leaf, dtype) for name, leaf in theta.items()}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for t in range(steps):
        grads = {k: jnp.asarray(g, dtype) for k, g in gradient(theta, t, flips).items()}
        direction, state = update(grads, state, params)
        path.append({name: np.asarray(leaf, np.float64) for name, leaf in direction.items()})
        theta = {name: leaf - RATE * path[-1][name] for name, leaf in theta.items()}
    return path, state


def expected(rules, shapes, *, steps=STEPS, flips=None):
    """Those of the references, one for each leaf."""
    theta, path = beginning(shapes), []
    for t in range(steps):
        grads = gradient(theta, t, flips)
        path.append({name: rule.step(grads[name]) for name, rule in rules.items()})
        theta = {name: leaf - RATE * path[-1][name] for name, leaf in theta.items()}
    return path


# -- products ------------------------------------------------------------------------------------


def test_moments_and_products_along_a_dimension():
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((2, 3, 4, 5))
    for dim, size in enumerate(stack.shape[1:]):
        moment = second_moment(jnp.asarray(stack), dim)
        matrix = rng.standard_normal((2, 6, size))
        product = along(jnp.asarray(stack), jnp.asarray(matrix), dim)
        turned = jnp.asarray(matrix.swapaxes(1, 2))
        close(along(jnp.asarray(stack), turned, dim, transpose=True), product)
        for i in range(2):
            rows = reference.unfolded(stack[i], dim)
            close(moment[i], jnp.asarray(rows @ rows.T))
            close(product[i], jnp.asarray(reference.multiplied(stack[i], matrix[i], dim)))


def test_dimensions_with_a_factor():
    assert with_factor((3, 9, 4), None, False) == [True, True, True]
    assert with_factor((3, 9, 4), 8, False) == [True, False, True]
    assert with_factor((4, 9, 4), None, True) == [True, False, False]
    assert with_factor((9, 4), 3, True) == [False, False]
    assert with_factor((1, 4), None, True) == [False, True]


def test_layouts_keep_an_order_and_long_dimensions_whole():
    tree = {"b": jnp.zeros(6), "c": jnp.zeros((3, 3, 4, 8)), "row": jnp.zeros((1, 6))}
    found = Layouts.of(block=5, merge=100, order=2, longest=20)(tree | {"w": jnp.zeros((6, 30))})
    by_path = {layout.path: layout for layout in found if layout is not None}
    assert set(by_path) == {"['c']", "['w']"}
    assert by_path["['c']"].sizes == (36, 8) and by_path["['c']"].blocks == ((1, 36, 5), (1, 36, 3))
    assert by_path["['w']"].blocks == ((1, 5, 30), (1, 1, 30))
    vectors = Layouts.of(merge=100)(tree)
    assert [layout.sizes for layout in vectors] == [(6,), (36, 8), (6,)]


# -- roots ---------------------------------------------------------------------------------------


def psd(stack, size, seed=0, rank=None):
    half = np.random.default_rng(seed).standard_normal((stack, size, rank or 2 * size))
    return half @ half.swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=(0, 2))
def refresh(config, matrices, exponents, states, first):
    return roots.refreshed(config, matrices, states, exponents, first)


def first_states(config, matrices):
    return [roots.first_root(config, *a.shape[:2], a.dtype) for a in matrices]


@pytest.mark.parametrize("name", ROOTS)
def test_root_is_that_of_numpy(name):
    """Of stacks of several sizes and exponents, singular ones and one of zeros among them."""
    config = ROOTS[name](ridge=1e-3)
    singular = np.concatenate([psd(1, 5, 2, rank=2), np.zeros((1, 5, 5))])
    matrices = [psd(2, 5), psd(3, 4, 1), singular, psd(1, 1), 1e-30 * psd(1, 5, 4)]
    exponents = (0.25, 0.5, 0.25, 0.5, 0.25)
    stacks = [jnp.asarray(a) for a in matrices]
    states = refresh(config, stacks, exponents, first_states(config, stacks), True)
    for a, exponent, state in zip(matrices, exponents, states, strict=True):
        for matrix, root, age in zip(a, state.root, state.age, strict=True):
            empty = not matrix.any()
            ridge = 1e-3 if name in ("eigh", "eigenbasis") else 1e-3 * approximate(matrix)
            wanted = reference.power(matrix, -exponent, ridge) if not empty else np.eye(len(matrix))
            np.testing.assert_allclose(root, wanted, rtol=1e-8, atol=1e-9 * np.abs(wanted).max())
            assert int(age) == empty
        assert not state.failures.any()


def approximate(a):
    """The largest eigenvalue by the power iteration of the products-only roots, in units of it."""
    if not a.any():
        return 1.0
    v = a[:, np.argmax(np.diag(a))]
    for _ in range(roots.POWER_STEPS):
        v = a @ (v / np.linalg.norm(v))
    v = v / np.linalg.norm(v)
    return np.linalg.norm(a @ v) / np.linalg.eigvalsh(a)[-1]


@pytest.mark.parametrize("name", ROOTS)
def test_absolute_ridge_and_single_precision(name):
    config = ROOTS[name](ridge=0.5, relative=False)
    a = psd(2, 6, 3)
    stack = [jnp.asarray(a, jnp.float32)]
    (state,) = refresh(config, stack, (0.25,), first_states(config, stack), True)
    wanted = np.stack([reference.power(each, -0.25, 0.5, relative=False) for each in a])
    assert state.root.dtype == jnp.float32
    np.testing.assert_allclose(state.root, wanted, atol=3e-6)


@pytest.mark.parametrize("name", ROOTS)
def test_root_that_fails_keeps_the_old_one(name):
    config = ROOTS[name]()
    good = [jnp.asarray(psd(2, 4)), jnp.asarray(psd(2, 4, 1))]
    states = refresh(config, good, (0.5, 0.5), first_states(config, good), True)
    bad = [good[0].at[1].set(jnp.nan), good[1]]
    after = refresh(config, bad, (0.5, 0.5), states, False)
    assert after[0].failures.tolist() == [0, 1] and after[0].age.tolist() == [0, 1]
    assert after[1].failures.tolist() == after[1].age.tolist() == [0, 0]
    same(jax.tree.map(lambda x: x[1], after[0][:2]), jax.tree.map(lambda x: x[1], states[0][:2]))
    close(after[0].root[0], states[0].root[0])
    later = refresh(config, good, (0.5, 0.5), after, False)
    assert later[0].failures.tolist() == [0, 1] and later[0].age.tolist() == [0, 0]
    close(later[0].root, states[0].root)


def test_roots_that_there_are_not():
    with pytest.raises(ValueError, match=r"exponent: got 0.3, wanted 1/p .* CoupledNewtonRoot"):
        cx.CoupledNewtonRoot().check(0.3)
    with pytest.raises(ValueError, match=r"exponent: got .*, wanted 1/2 or 1/4, which Newton"):
        cx.NewtonSchulzRoot().check(1 / 6)
    cx.CoupledNewtonRoot().check(1 / 6)
    with pytest.raises(ValueError, match=r"NewtonSchulzRoot"):
        shampoo(root=cx.NewtonSchulzRoot(), merge=0).init({"w": jnp.zeros((2, 3, 4))})


# -- eigenbases ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("tolerance", "sort"))
def turn(matrices, bases, first, tolerance=None, sort=True):
    return eigenbasis.turned([matrices], [bases], first, tolerance=tolerance, sort=sort)[0]


def test_bases_tend_to_the_eigenvectors():
    vectors = np.linalg.qr(psd(2, 6))[0]
    a = (vectors * 2.0 ** -np.arange(6)) @ vectors.swapaxes(1, 2)
    basis = jnp.asarray(np.linalg.qr(psd(2, 6, 5))[0])
    orders = []
    for _ in range(60):
        new = turn(jnp.asarray(a), basis, False)
        basis = new.basis
        orders.append(np.asarray(new.order))
        assert new.ok.all()
    assert not np.array_equal(orders[0], orders[-1])
    for matrix, q, values in zip(a, basis, eigenbasis.rayleigh(jnp.asarray(a), basis), strict=True):
        np.testing.assert_allclose(np.abs(q.T @ reference.descending(matrix)), np.eye(6), atol=1e-6)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], rtol=1e-8)


@pytest.mark.parametrize("sort", [True, False])
def test_a_turn_is_a_step_of_orthogonal_iteration(sort):
    a, q = psd(1, 7)[0], np.linalg.qr(psd(1, 7, 5)[0])[0]
    wanted, order = reference.orthogonal_step(a, q, sort)
    new = turn(jnp.asarray(a)[None], jnp.asarray(q)[None], False, sort=sort)
    assert new.order[0].tolist() == order.tolist()
    signs = np.sign(np.sum(wanted * new.basis[0], axis=0))
    np.testing.assert_allclose(np.asarray(new.basis[0]) * signs, wanted, atol=1e-10)


def test_a_basis_that_is_not_a_number_is_not_taken():
    """Of many rows: a maximum over as many drops what is not a number, on a CPU."""
    matrices = jnp.stack([jnp.diag(jnp.arange(1.0, 81.0)), jnp.full((80, 80), jnp.nan)])
    basis = jnp.broadcast_to(jnp.eye(80), (2, 80, 80))
    for first in (True, False):
        new = turn(matrices, basis, first)
        assert new.ok.tolist() == [True, False]
        np.testing.assert_array_equal(new.basis[1], np.eye(80))


def test_columns_that_all_point_to_the_largest_eigenvector(monkeypatch):
    """In float32, with a basis that is a little off: one pass or two make it orthonormal."""
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((100, 100)))[0]
    values = np.append(1.0, np.logspace(-3, -6, 99))
    a = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)[None]
    off = np.linalg.qr(vectors + 0.02 * rng.standard_normal((100, 100)))[0]
    basis = jnp.asarray(off, jnp.float32)[None]
    towards = np.abs(vectors[:, 0] @ np.asarray(a[0] @ basis[0]))
    assert np.median(towards / np.linalg.norm(a[0] @ basis[0], axis=0)) > 0.5
    monkeypatch.setattr(eigenbasis, "_PASSES", 2)
    new = eigenbasis.turned([a], [basis], False)[0]
    assert new.ok.all()
    before, after = (float(eigenbasis.off_diagonal(q, a @ q)[0]) for q in (basis, new.basis))
    assert after < 0.1 * before


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_bases_of_singular_matrices(dtype):
    """Whatever the start, Q stays orthonormal, and directions of the null space stay there."""
    a = jnp.asarray(psd(1, 40, rank=3), dtype)
    basis = jnp.asarray(np.linalg.qr(psd(1, 40, 5)[0])[0], dtype)[None]
    eps = float(jnp.finfo(dtype).eps)
    for _ in range(8):
        new = turn(a, basis, False)
        assert new.ok.all()
        basis = new.basis
        np.testing.assert_allclose(basis[0].T @ basis[0], np.eye(40), atol=2000 * eps)
    null = basis[0][:, 3:]
    assert np.abs(a[0] @ null).max() < 1e-2 * float(jnp.abs(a).max()) * eps**0.25
    again = turn(a, basis, False)
    rows = again.basis[0].T @ basis[0]
    np.testing.assert_allclose(np.abs(rows).max(axis=1), 1, atol=1e-2)
    zeros = turn(jnp.zeros_like(a), basis, False)
    assert zeros.ok.all()
    np.testing.assert_allclose(zeros.basis, basis, atol=2000 * eps)


def test_bases_that_still_fit_stay():
    a = psd(2, 5)
    q = np.stack([reference.descending(each) for each in a])
    rotation = np.linalg.qr(np.eye(5) + 0.2 * np.random.default_rng(8).standard_normal((5, 5)))[0]
    q[1] = q[1] @ rotation
    stacks = jnp.asarray(a), jnp.asarray(q)
    share = eigenbasis.off_diagonal(stacks[1], jnp.asarray(a @ q))
    for i in range(2):
        inner = q[i].T @ a[i] @ q[i]
        off = np.linalg.norm(inner - np.diag(np.diag(inner))) / np.linalg.norm(inner)
        np.testing.assert_allclose(share[i], off, rtol=1e-6, atol=1e-12)
    new = turn(*stacks, False, tolerance=0.01)
    same(new.basis[0], stacks[1][0])
    assert new.order[0].tolist() == list(range(5))
    close(new.basis[1], turn(*stacks, False).basis[1])
    same(turn(*stacks, False, tolerance=2.0).basis, stacks[1])


# -- Shampoo is that of the papers ---------------------------------------------------------------


def exact(**options):
    return cx.EighRoot(**options)


# Arguments of the method; the shapes of leaves and, for each, arguments of the reference.
SHAMPOO = {
    "matrices": ({"root": exact()}, {"w": ((4, 5), {})}, {}),
    "tensors": ({"root": exact(ridge=1e-2), "merge": 0}, {"w": ((3, 4, 5), {})}, {}),
    "sum": ({"root": exact(), "decay": 1.0}, {"w": ((4, 5), {})}, {}),
    "exponent": (
        {"root": exact(ridge=1e-4), "exponent": 0.4, "merge": 0},
        {"w": ((4, 5), {}), "t": ((2, 3, 4), {})},
        {},
    ),
    "absolute": ({"root": exact(ridge=0.01, relative=False)}, {"w": ((4, 5), {})}, {}),
    "cadences": (
        {"root": exact(), "refresh_every": 3, "statistics_every": 2, "early": False},
        {"w": ((4, 5), {})},
        {},
    ),
    "early": ({"root": exact(), "refresh_every": 6}, {"w": ((4, 5), {})}, {"early": True}),
    "one_sided": ({"root": exact(), "one_sided": True}, {"w": ((4, 5), {}), "v": ((5, 3), {})}, {}),
    "longest": ({"root": exact(), "longest": 4}, {"w": ((4, 6), {}), "v": ((6, 7), {})}, {}),
    "diagonal": (
        {"root": exact(), "longest": 4, "diagonal": True},
        {"w": ((4, 6), {}), "v": ((6, 7), {})},
        {},
    ),
    "vectors": ({"root": exact(), "vectors": True, "merge": 0}, {"w": ((4,), {})}, {}),
    "eigenbasis": (
        {"root": cx.EigenbasisRoot(ridge=1e-3), "refresh_every": 2, "early": False},
        {"w": ((4, 5), {})},
        {"bases": True},
    ),
    "newton": (
        {"root": cx.CoupledNewtonRoot(ridge=0.1, relative=False), "merge": 0},
        {"w": ((4, 5), {}), "t": ((2, 3, 4), {})},
        {},
    ),
    "newton_schulz": (
        {"root": cx.NewtonSchulzRoot(ridge=0.1, relative=False)},
        {"w": ((4, 5), {})},
        {},
    ),
}


def for_reference(options):
    """The arguments of a method as those of its reference."""
    options = dict(options)
    root = options.pop("root")
    names = {"refresh_every": "every"}
    known = {"decay", "statistics_every", "exponent", "longest", "one_sided", "diagonal", "every"}
    found = {names.get(key, key): value for key, value in options.items()}
    found = {key: value for key, value in found.items() if key in known}
    return {"ridge": root.ridge, "relative": root.relative} | found


@pytest.mark.parametrize("case", SHAMPOO)
def test_shampoo_is_that_of_the_papers(case):
    options, leaves, extra = SHAMPOO[case]
    options = {"refresh_every": 1, "graft": None} | options
    shapes = {name: shape for name, (shape, _) in leaves.items()}
    rules = {
        name: reference.Shampoo(shape, **(for_reference(options) | extra | own))
        for name, (shape, own) in leaves.items()
    }
    path, state = descent(shampoo(**options), shapes)
    close(path, expected(rules, shapes))
    assert int(state.count) == STEPS and int(state.skipped) == 0


def test_shampoo_in_blocks_and_merged():
    """Blocks with a shorter last one, long dimensions that are not cut, merged dimensions, and the
    norm of the whole tensor.
    """
    shapes = {"w": (7, 5), "long": (4, 9), "conv": (2, 3, 4)}
    options = {"root": exact(), "refresh_every": 2, "early": False}
    graft = optax.scale_by_rms(0.9, eps_in_sqrt=False, bias_correction=True)
    optimizer = shampoo(block_size=3, longest=8, merge=6, graft=graft, **options)
    one = lambda shape: reference.Shampoo(shape, every=2, longest=8)
    blocks = lambda shape: reference.Blocks(shape, 3, one, longest=8)
    rules = {
        "w": blocks((7, 5)),
        "long": blocks((4, 9)),
        "conv": reference.Merged((6, 4), blocks),
    }
    rules = {
        name: reference.Grafted(rule, reference.Elementwise("rms", b2=0.9))
        for name, rule in rules.items()
    }
    path, state = descent(optimizer, shapes)
    close(path, expected(rules, shapes))
    assert [s.sides[0].factor.shape for s in state.tensors["['conv']"]] == [(2, 3, 3), (2, 3, 3)]
    assert state.tensors["['long']"][0].sides[1] is None


@pytest.mark.parametrize("transpose", [False, True])
def test_shampoo_at_low_rank(transpose):
    """One side has 36 dimensions and a rank of 4, the other is too short for one."""
    shape = (5, 36) if transpose else (36, 5)
    optimizer = shampoo(root=exact(), rank=4, refresh_every=3, early=False, graft=None)
    path, state = descent(optimizer, {"w": shape})
    first = optimizer.init({"w": jnp.zeros(shape)}).tensors["['w']"][0].sides[transpose]
    rule = reference.LowRankShampoo((36, 5), np.asarray(first.factor.basis[0]), every=3)
    if transpose:
        step = rule.step
        rule.step = lambda g: step(g.T).T
    close(path, expected({"w": rule}, {"w": shape}))
    side = state.tensors["['w']"][0].sides[transpose]
    assert side.sketch.shape == (1, 36, 4) and side.root.root.shape == (1, 4, 4)
    assert side.root.age.tolist() == side.root.failures.tolist() == [0]
    with pytest.raises(ValueError, match="root: got EigenbasisRoot with rank=4, wanted one that"):
        shampoo(root=cx.EigenbasisRoot(), rank=4)


def test_low_rank_is_full_where_the_rest_is_flat():
    """L = USUᵀ + I: by a basis of U alone."""
    rng = np.random.default_rng(0)
    u = np.linalg.qr(rng.standard_normal((40, 3)))[0]
    half = np.linalg.cholesky((u * [30.0, 10.0, 4.0]) @ u.T + np.eye(40))
    params = {"w": jnp.zeros((40, 40))}
    noise = [np.linalg.qr(rng.standard_normal((40, 40)))[0] for _ in range(16)]
    gradients = [{"w": jnp.asarray(half @ each)} for each in noise]
    numbers = {"refresh_every": 2, "graft": None, "root": exact(), "one_sided": True, "decay": 0.5}
    wanted, _ = run(shampoo(**numbers), params, gradients)
    got, _ = run(shampoo(rank=3, **numbers), params, gradients)
    length = np.linalg.norm(wanted[-1]["w"])
    assert np.linalg.norm(got[-1]["w"] - wanted[-1]["w"]) < 0.01 * length
    far, _ = run(shampoo(rank=2, **numbers), params, gradients)
    assert np.linalg.norm(far[-1]["w"] - wanted[-1]["w"]) > 0.05 * length


GRAFTS = {
    "sgd": optax.identity(),
    "adagrad": optax.scale_by_rss(eps=1e-8),
    "rms": optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True),
    "adam": optax.scale_by_adam(),
}


@pytest.mark.parametrize("kind", GRAFTS)
def test_grafting(kind):
    shapes = {"w": (4, 5)}
    optimizer = shampoo(root=exact(), refresh_every=1, graft=GRAFTS[kind])
    rule = reference.Shampoo((4, 5))
    rules = {"w": reference.Grafted(rule, reference.Elementwise(kind))}
    close(descent(optimizer, shapes)[0], expected(rules, shapes))


# -- SOAP and KL-Shampoo are those of the papers -------------------------------------------------


# Leaves whose first moments have at most one eigenvalue of zero: a basis of a larger null space is
# anybody's choice.
SOAP = {
    "plain": ({}, {"w": (4, 5), "t": (3, 4, 5), "b": (3,)}),
    "one_sided": ({"one_sided": True, "refresh_every": 3}, {"w": (5, 4), "v": (3, 6)}),
    "longest": ({"longest": 4, "decay": 0.8, "b1": 0.8}, {"w": (6, 4), "v": (5, 6)}),
}


@pytest.mark.parametrize("case", SOAP)
def test_soap_is_that_of_the_paper(case):
    options, shapes = SOAP[case]
    options = {"refresh_every": 2} | options
    kept = {"b1", "b2", "decay", "longest", "one_sided"}
    numbers = {key: value for key, value in options.items() if key in kept}
    rules = {
        name: reference.Soap(shape, every=options["refresh_every"], **numbers)
        if len(shape) > 1
        else reference.Elementwise("adam", b1=0.95, b2=0.95)
        for name, shape in shapes.items()
    }
    path, _ = descent(soap(**options), shapes)
    assert all(not leaf.any() for name, leaf in path[0].items() if name != "b")
    close(path, expected(rules, shapes))


def test_soap_puts_its_squares_in_the_order_of_its_basis():
    """On a path on which the eigenvalues change their order."""
    shapes, steps, flips = {"w": (4, 4)}, 24, 6
    options = {"b2": 0.8, "every": 3}
    rules = [{"w": reference.Soap((4, 4), permute=permute, **options)} for permute in (True, False)]
    with_order, without = (expected(each, shapes, steps=steps, flips=flips) for each in rules)
    assert rules[0]["w"].sorted > 1
    path, _ = descent(soap(b2=0.8, refresh_every=3), shapes, steps=steps, flips=flips)
    close(path, with_order)
    assert max(np.abs(a["w"] - b["w"]).max() for a, b in zip(path, without, strict=True)) > 0.1


def test_soap_in_blocks():
    shapes = {"w": (7, 4)}
    one = lambda shape: reference.Soap(shape, every=2)
    rules = {"w": reference.Blocks((7, 4), 4, one)}
    close(descent(soap(refresh_every=2, block_size=4), shapes)[0], expected(rules, shapes))


KL = {
    "plain": ({}, {"w": (4, 5), "t": (3, 4, 5)}),
    "longest": ({"longest": 4}, {"w": (4, 5)}),
    "limit": ({"limit": None, "initial": 1.0, "b1": 0.8, "b2": 0.9}, {"w": (4, 4)}),
}


@pytest.mark.parametrize("case", KL)
def test_kl_shampoo_is_that_of_the_paper(case):
    options, shapes = KL[case]
    rules = {name: reference.KLShampoo(s, every=3, **options) for name, s in shapes.items()}
    path, state = descent(kl_shampoo(refresh_every=3, **options), shapes)
    assert not path[0]["w"].any()
    close(path, expected(rules, shapes))
    assert state.tensors["['w']"][0].sides[0].age.tolist() == [0]


def test_kl_shampoo_limits_its_eigenvalues():
    """Where gradients are tiny, at (λ₁λ₂)^−½ = 100."""
    optimizer = kl_shampoo(refresh_every=2, initial=0.011, b1=0.0, b2=0.5)
    rule = reference.KLShampoo((3, 3), every=2, initial=0.011, b1=0.0, b2=0.5)
    rng, params = np.random.default_rng(0), {"w": jnp.zeros((3, 3))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(6):
        g = 1e-4 * rng.standard_normal((3, 3))
        direction, state = update({"w": jnp.asarray(g)}, state, params)
        close(direction["w"], jnp.asarray(rule.step(g)), atol=1e-14)
    np.testing.assert_allclose(state.tensors["['w']"][0].values[0], 0.01)


# -- what else could go wrong --------------------------------------------------------------------


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    if request.param == "low_rank_soap":
        monkeypatch.setattr("curvax.taps.blocks.WHOLE", 1)
    return request.param


def random_gradients(params, steps, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return [jax.tree.map(draw, params) for _ in range(steps)]


def run(optimizer, params, gradients):
    """The directions for some gradients, and the states."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    directions, states = [], [state]
    for grads in gradients:
        direction, state = update(grads, state, params)
        directions.append(direction)
        states.append(state)
    return directions, states


def test_layers_in_one_array_are_as_apart(method):
    optimizer = METHODS[method](refresh_every=2, axes={"layers": "layers ..."})
    params = {"layers": jnp.zeros((3, 4, 5))} | {str(i): jnp.zeros((4, 5)) for i in range(3)}
    gradients = random_gradients(params, 4)
    gradients = [g | {str(i): g["layers"][i] for i in range(3)} for g in gradients]
    directions, _ = run(optimizer, params, gradients)
    for direction in directions:
        for i in range(3):
            close(direction["layers"][i], direction[str(i)])
    assert all(leaf.any() for leaf in jax.tree.leaves(directions[1:]))


def test_bad_gradients_are_as_none(method):
    """NaN in the first step, and where a refresh is due."""
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(3)}
    good = random_gradients(params, 5)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), good[0])
    huge = {"w": 1e200 * good[1]["w"], "b": good[1]["b"]}
    optimizer = METHODS[method](refresh_every=2)
    wanted, states = run(optimizer, params, good)
    got, after = run(optimizer, params, [bad, *good[:2], huge, bad, *good[2:]])
    same([got[i] for i in (1, 2, 5, 6, 7)], wanted)
    assert not any(leaf.any() for i in (0, 3, 4) for leaf in jax.tree.leaves(got[i]))
    assert (int(after[-1].count), int(after[-1].skipped)) == (8, 3)
    same(after[-1]._replace(count=states[-1].count, skipped=states[-1].skipped), states[-1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_degenerate_gradients(method, dtype):
    """Zero, of rank one, tiny, huge, and of matrices of one row or one column."""
    options = {"vectors": True} if method == "shampoo" else {}
    optimizer = METHODS[method](refresh_every=2, **options)
    shapes = {"zero": (3, 5), "one": (3, 5), "row": (1, 5), "column": (5, 1), "tiny": (5, 3)}
    params = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    gradients = random_gradients(params, 6)
    for i, g in enumerate(gradients):
        outer = g["row"] * g["column"].T[:, :3].T
        g |= {"zero": jnp.zeros((3, 5), dtype), "one": outer, "tiny": g["tiny"] * 1e-12}
        if i == 3:
            g["one"] = 1e6 * outer
    directions, states = run(optimizer, params, gradients)
    for direction in directions:
        assert all(leaf.dtype == dtype for leaf in direction.values())
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in direction.values())
        assert not direction["zero"].any()
    assert all(leaf.any() for name, leaf in directions[-1].items() if name != "zero")
    assert avals(states[0]) == avals(states[-1])
    wide = {leaf.dtype for leaf in jax.tree.leaves(states[-1].tensors)}
    assert wide == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    failures = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(states[-1].tensors)
        if ".failures" in jax.tree_util.keystr(path)
    ]
    assert failures and not any(leaf.any() for leaf in failures)


def test_low_precision_is_near(method):
    params = {"w": jnp.zeros((4, 5))}
    gradients = random_gradients(params, 6)
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients)
    exact = jax.tree.map(lambda g: g.astype(jnp.float64), low)
    optimizer = METHODS[method](refresh_every=2)
    wanted, _ = run(optimizer, params, exact)
    got, _ = run(optimizer, {"w": params["w"].astype(jnp.bfloat16)}, low)
    for a, b in zip(got, wanted, strict=True):
        error = np.linalg.norm(np.asarray(a["w"], np.float64) - b["w"])
        assert error <= 0.02 * np.linalg.norm(b["w"])


def roots_of(state):
    """What a refresh changes."""
    sides = state.tensors["['w']"][0].sides
    return [side.root.root if hasattr(side, "root") else side.basis for side in sides]


# The steps, from 0 on, in which a refresh every third step is done.
REFRESHED = dict.fromkeys(METHODS, (1, 4, 7)) | {"shampoo": (0, 1, 2, 3, 6)}


def test_cadence(method):
    params = {"w": jnp.zeros((4, 5))}
    _, states = run(METHODS[method](refresh_every=3), params, random_gradients(params, 8))
    changed = []
    for t in range(8):
        before, after = roots_of(states[t]), roots_of(states[t + 1])
        moved = [not np.array_equal(*pair) for pair in zip(before, after, strict=True)]
        assert len(set(moved)) == 1
        changed += [t] if moved[0] else []
    assert tuple(changed) == REFRESHED[method]


@functools.cache
def alone(method):
    """Gradients of a matrix, and what a method makes of them."""
    params = {"w": jnp.zeros((3, 4))}
    gradients = random_gradients(params, 4)
    inner = METHODS[method](refresh_every=2)
    return params, gradients, inner, run(inner, params, gradients)[0]


@pytest.mark.parametrize("wrapper", ["masked", "partition", "multi_steps"])
def test_wrapped(method, wrapper):
    """The same directions as without."""
    params, gradients, inner, wanted = alone(method)
    if wrapper == "multi_steps":
        pairs = [jax.tree.map(lambda g, k=k: k * g, g) for g in gradients for k in (0.5, 1.5)]
        optimizer = optax.MultiSteps(inner, 2).gradient_transformation()
        with jax.numpy_dtype_promotion("standard"):  # which it needs
            directions, _ = run(optimizer, params, pairs)
        assert not any(leaf.any() for leaf in jax.tree.leaves(directions[::2]))
        close(directions[1::2], wanted, rtol=1e-6, atol=1e-6)
        return
    labels = {"w": "mine", "v": "others"}
    optimizer = {
        "masked": optax.masked(inner, {"w": True, "v": False}),
        "partition": optax.partition({"mine": inner, "others": optax.identity()}, labels),
    }[wrapper]
    both = [g | {"v": g["w"].T} for g in gradients]
    got, _ = run(optimizer, params | {"v": params["w"].T}, both)
    close([{"w": direction["w"]} for direction in got], wanted)
    same([direction["v"] for direction in got], [g["v"] for g in both])


class Unreliable(roots.AbstractInverseRoot):
    """Fails where a trace is above one."""

    ridge: float = 1e-6
    relative: bool = eqx.field(static=True, default=True)

    def compute(self, matrices, exponents, memories, first):
        del first
        done = cx.EighRoot().compute(matrices, exponents, memories, True)
        fails = [jnp.trace(a, axis1=1, axis2=2)[:, None, None] > 1 for a in matrices]
        return [
            (jnp.where(bad, jnp.nan, root), memory)
            for bad, (root, memory) in zip(fails, done, strict=True)
        ]


def test_shampoo_with_a_root_that_fails():
    """For one of two layers: it keeps the root that it has, and the other does not care."""
    optimizer = shampoo(
        root=Unreliable(), refresh_every=1, graft=None, decay=0.5, axes={"": "layers ..."}
    )
    params = {"w": jnp.zeros((2, 3, 3))}
    small, other, large = (g["w"] for g in random_gradients(params, 3))
    small, other, large = 0.1 * small, 0.1 * other, jnp.stack([100 * large[0], 0.1 * large[1]])
    directions, states = run(optimizer, params, [{"w": g} for g in (small, large, other)])
    sides = states[2].tensors["['w']"][0].sides
    before = states[1].tensors["['w']"][0].sides
    for side, old in zip(sides, before, strict=True):
        assert side.root.failures.tolist() == side.root.age.tolist() == [1, 0]
        same(side.root.root[0], old.root.root[0])
        assert not np.array_equal(side.root.root[1], old.root.root[1])
    expected = before[0].root.root[0] @ large[0] @ before[1].root.root[0]
    close(directions[1]["w"][0], expected)
    alone, _ = run(optimizer, {"w": params["w"][1:]}, [{"w": g[1:]} for g in (small, large, other)])
    close([direction["w"][1:] for direction in directions], [d["w"] for d in alone])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: shampoo(decay=1.5), r"decay: got 1.5, wanted a number in \[0, 1\], 1 for a sum"),
        (lambda: soap(b1=1.0), r"b1: got 1.0, wanted a number in \[0, 1\)"),
        (lambda: kl_shampoo(b2=-0.1), r"b2: got -0.1, wanted"),
        (lambda: soap(refresh_every=0), r"refresh_every: got 0, wanted a number of steps ≥ 1"),
        (lambda: shampoo(statistics_every=0), r"statistics_every: got 0"),
        (lambda: shampoo(exponent=-0.5), r"exponent: got -0.5, wanted a positive number"),
        (lambda: kl_shampoo(initial=0.0), r"initial: got 0.0, wanted a positive number"),
        (lambda: soap(block_size=0), r"block_size: got 0, wanted"),
    ],
)
def test_arguments_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_hyperparameters_can_be_traced(method):
    floats = ("decay",) if method == "shampoo" else ("b1", "b2")
    params = {"w": jnp.zeros((3, 3))}
    gradients = random_gradients(params, 3)
    static = {"refresh_every", "block_size", "merge", "longest"}
    static |= {"rank"} if method == "low_rank_soap" else set()
    static |= {"statistics_every"} if method == "shampoo" else set()
    numbers = dict.fromkeys(floats, 0.5)
    optimizer = optax.inject_hyperparams(METHODS[method], static_args=static)(
        refresh_every=2, **numbers
    )
    wanted, _ = run(METHODS[method](refresh_every=2, **numbers), params, gradients)
    with jax.numpy_dtype_promotion("standard"):
        got, states = run(optimizer, params, gradients)
    assert set(floats) <= set(states[0].hyperparams)
    close(got, wanted, rtol=1e-6, atol=1e-6)
