"""Operators and solvers over parameters and batches that eight devices share."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import curvax as cx
from curvax import _tree
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
from tests.problems import EXACT_CG

# Sides of 40 have a low rank, and are shared by 8 devices; those of 7 by none, of 6 by 2.
LARGE = lambda: mlp_problem(7, 40, 6)
BOTH = ("fsdp and tensor",)


def products(objective, params, batch, vector):
    """Of every operator, in the structure of the parameters."""
    key = jax.random.key(0)
    gauss_newton = cx.GaussNewton(objective, params, batch)
    jacobian = cx.Jacobian(objective, params, batch)
    factored = cx.KroneckerFactored(objective, params, batch)
    low_rank = cx.LowRankKronecker(objective, params, batch, rank=4)
    sketch = cx.nystrom(gauss_newton, key, 4)
    damped = cx.Damped(gauss_newton, 0.1)
    # As methods do: `lx.linear_solve` forgets how arrays are sharded on a mesh of Explicit axes.
    solve = lambda solver: solver.compute(solver.init(damped, {}), vector, {})[0]
    return {
        "gauss_newton": gauss_newton.mv(vector),
        "hessian": cx.Hessian(objective, params, batch).mv(vector),
        "fisher mc": cx.Fisher(objective, params, batch, key, "mc").mv(vector),
        "fisher empirical": cx.Fisher(objective, params, batch, kind="empirical").mv(vector),
        "jacobian": jacobian.T.mv(jacobian.mv(vector)),
        "damped": damped.mv(vector),
        "diagonal": gauss_newton.diagonal(),
        "hutchinson": cx.hutchinson_diagonal(gauss_newton, key, 2),
        "kronecker": factored.mv(vector),
        "kronecker inverse": factored.inverse(0.1).mv(vector),
        "low-rank kronecker": low_rank.inverse(0.1, "pi").mv(vector),
        "sketch": sketch.mv(vector),
        "sketch inverse": sketch.inverse(0.1).mv(vector),
        "cg": solve(EXACT_CG),
        "row space": solve(cx.RowSpace()),
    }


def others(objective, params, batch, vector):
    """Numbers that do not depend on where the parameters are."""
    gauss_newton = cx.GaussNewton(objective, params, batch)
    factored = cx.KroneckerFactored(objective, params, batch)
    return {
        "gram": gauss_newton.row_gram(),
        "matrix": cx.Fisher(objective, params, batch, kind="empirical").row_gram(),
        "form": gauss_newton.quadratic_form(vector),
        "trace": cx.hutchinson_trace(gauss_newton, jax.random.key(0)),
        "kronecker trace": factored.trace(),
        "norms": cx.gradient_norms(objective, params, batch),
        "eigenvalues": cx.nystrom(gauss_newton, jax.random.key(0), 4).values,
    }


def check(kind):
    for problem, meshes in ((LARGE, MESHES), (attention_problem, BOTH)):
        predict, params, (batch, *_) = problem()
        objective = cx.Objective(predict, cx.SoftmaxCrossEntropy(), l2=1e-3)
        both = lambda *args, f=objective: (products(f, *args), others(f, *args))
        vector = jax.tree.map(jnp.cos, params)
        wanted = jax.jit(both)(params, batch, vector)
        for label in meshes:
            mesh, specs = MESHES[label].made(kind), MESHES[label].specs
            with jax.set_mesh(mesh):
                own, there = (sharded(tree, mesh, specs) for tree in (params, vector))
                got = jax.jit(both)(own, split(batch, mesh), there)
            if kind == "Explicit":  # else the compiler has its own mind
                for name, product in got[0].items():
                    assert_where(product, places_of(own), name)
            for a, b in zip(got, wanted, strict=True):
                for name in b:
                    try:
                        assert_same(a[name], b[name], f"{name}, {label}")
                    except AssertionError as e:
                        print("DIFF", name, str(e)[:80].replace("\n", " "))
            print(f"{label}", flush=True)


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
            print(kind, name, max(buffers(compiled)), _tree.size(params))
            assert max(buffers(compiled)) <= max(leaf.size for leaf in params.values()), name


def main(kind):
    start()
    check(kind)
    check_buffers(kind)


PROGRAM = """
    from tests.test_sharded_operators import main
    main({kind!r})
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_products_are_those_of_one_device(kind):
    printed(PROGRAM.format(kind=kind), devices=8)
