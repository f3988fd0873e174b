"""Operators and solvers over parameters and batches that eight devices share."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax import _basis
from tests.devices import printed
from tests.meshes import (
    MESHES,
    assert_same,
    assert_where,
    attention_problem,
    mlp_problem,
    places_of,
    sharded,
    split,
    start,
)

# A side of 40 has a low rank, and is shared by 8 devices; those of 7 by none, of 4 by 4.
SMALL = lambda: mlp_problem(7, 40, 4)
# The other two, where parameters are whole or the batch has an axis of its own, are in the tests of
# methods.
HERE = ("fsdp", "fsdp and tensor")
EXACT_CG = cx.CG(rtol=1e-13, max_steps=100)


def few(objective, params, batch, vector):
    """Products in the structure of the parameters."""
    gauss_newton = cx.GaussNewton(objective, params, batch)
    sketch = cx.nystrom(gauss_newton, jax.random.key(0), 4)
    return {
        "gauss_newton": gauss_newton.mv(vector),
        "hessian": cx.Hessian(objective, params, batch).mv(vector),
        "sketch": sketch.mv(vector),
        "sketch inverse": sketch.inverse(0.1).mv(vector),
    }, {}


def every(objective, params, batch, vector):
    """Products with every operator, and numbers that do not depend on where parameters are."""
    key = jax.random.key(0)
    gauss_newton = cx.GaussNewton(objective, params, batch)
    jacobian = cx.Jacobian(objective, params, batch)
    factored = cx.KroneckerFactored(objective, params, batch, key, fisher="mc")
    low_rank = cx.LowRankKronecker(objective, params, batch, rank=4, passes=1, fisher="empirical")
    corrected = cx.EigenvalueCorrected(objective, params, batch, fisher="empirical")
    damped = cx.Damped(gauss_newton, 0.1)
    # As methods do: `lx.linear_solve` forgets how arrays are sharded on a mesh of Explicit axes.
    solve = lambda solver: solver.compute(solver.init(damped, {}), vector, {})[0]
    products, numbers = few(objective, params, batch, vector)
    products |= {
        "fisher mc": cx.Fisher(objective, params, batch, key, "mc").mv(vector),
        "fisher empirical": cx.Fisher(objective, params, batch, kind="empirical").mv(vector),
        "jacobian": jacobian.T.mv(jacobian.mv(vector)),
        "diagonal": gauss_newton.diagonal(),
        "hutchinson": cx.hutchinson_diagonal(gauss_newton, key, 2),
        "kronecker": factored.inverse(0.1, "pi").mv(vector),
        "low-rank kronecker": low_rank.mv(vector),
        "corrected kronecker": corrected.mv(vector),
        "cg": solve(EXACT_CG),
        "row space": solve(cx.RowSpace()),
    }
    numbers |= {
        "gram": gauss_newton.row_gram(),
        "form": gauss_newton.quadratic_form(vector),
        "trace": factored.trace(),
        "norms": cx.gradient_norms(objective, params, batch),
    }
    return products, numbers


def check(kind):
    cases = ((every, SMALL, HERE), (few, attention_problem, HERE[1:]))
    for function, problem, meshes in cases:
        predict, params, (batch, *_) = problem()
        objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), l2=1e-3)
        program = functools.partial(function, objective)
        vector = jax.tree.map(jnp.cos, params)
        wanted = jax.jit(program)(params, batch, vector)
        for label in meshes:
            mesh, specs = MESHES[label].made(kind), MESHES[label].specs
            with jax.set_mesh(mesh):
                own, there = (sharded(tree, mesh, specs) for tree in (params, vector))
                got = jax.jit(program)(own, split(batch, mesh), there)
            if kind == "Explicit":  # else the compiler has its own mind
                for name, product in got[0].items():
                    assert_where(product, places_of(own), name)
            for a, b in zip(got, wanted, strict=True):
                for name in b:
                    assert_same(a[name], b[name], f"{name}, {label}")
        print(function.__name__, flush=True)


def check_inner_products(kind):
    """Of columns that are not sharded as the vector is: XLA, asked for a contraction of three axes,
    gives wrong numbers."""
    mesh = MESHES["fsdp and tensor"].made(kind)
    rng = np.random.default_rng(0)
    columns, vector = rng.standard_normal((3, 2, 4, 8)), rng.standard_normal((2, 4, 8))
    wanted = np.einsum("kabc,abc->k", columns, vector)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        # Explicit axes do not let them differ.
        spec = ("tensor", None, "fsdp") if kind == "Explicit" else ("tensor", "fsdp", None)
        columns = {"w": place(columns, None, "tensor", None, "fsdp")}
        got = jax.jit(_basis.products)(columns, {"w": place(vector, *spec)})
    assert_same(got, wanted)


def buffers(compiled):
    """How many numbers each result in a compiled program holds, on one device."""
    shapes = re.findall(r"f64\[([\d,]*)\]", compiled.as_text())
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def check_buffers(kind):
    """Nothing is as large as all parameters: they are never put in one vector."""
    predict, params, (batch, *_) = mlp_problem(32, 64, 8)
    objective = cx.Objective(predict, cx.SoftmaxCrossEntropy())
    damped = lambda *args: cx.Damped(cx.GaussNewton(objective, *args), 0.1)
    solver = cx.CG(max_steps=3)
    programs = {
        "product": lambda p, b, v: damped(p, b).mv(v),
        "cg": lambda p, b, v: solver.compute(solver.init(damped(p, b), {}), v, {})[0],
    }
    mesh, specs = MESHES["fsdp"].made(kind), MESHES["fsdp"].specs
    with jax.set_mesh(mesh):
        own, batch = sharded(params, mesh, specs), split(batch, mesh)
        for name, program in programs.items():
            places = places_of(own)
            compiled = jax.jit(program, out_shardings=places).lower(own, batch, own).compile()
            assert max(buffers(compiled)) <= max(leaf.size for leaf in params.values()), name


def main(kind):
    start()
    check(kind)
    check_inner_products(kind)
    check_buffers(kind)


PROGRAM = """
    from tests.test_sharded_operators import main
    main({kind!r})
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_products_are_those_of_one_device(kind):
    assert printed(PROGRAM.format(kind=kind), devices=8) == ["every", "few"]
