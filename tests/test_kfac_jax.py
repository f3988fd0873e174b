"""K-FAC's factors are those of kfac-jax 0.0.8, layer by layer.

`data/kfac_jax_factors.npz` holds parameters, batches and kfac-jax's factors in its own conventions,
which `as_curvax` accounts for. It was made by kfac-jax as it is, with

    pip install "jax==0.9.1" kfac-jax==0.0.8
    python -m experiments.compare_kfac_jax --fixture tests/data/kfac_jax_factors.npz
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.compare_kfac_jax import FISHERS, Factors, as_curvax, cases, curvax_curvature

STORED = np.load(Path(__file__).parent / "data" / "kfac_jax_factors.npz")


@pytest.fixture(scope="module", params=("mlp", "convnet", "regression"))
def case(request):
    with jax.numpy_dtype_promotion("standard"):  # as scripts run
        made = next(case for case in cases(small=True) if case.name == request.param)
    prefix = f"{made.name}/params/"
    params = {key.removeprefix(prefix): STORED[key] for key in STORED if key.startswith(prefix)}
    params = jax.tree.map(jax.numpy.asarray, params)
    return made.with_data(params, STORED[f"{made.name}/x"], STORED[f"{made.name}/targets"])


@pytest.mark.parametrize("fisher", FISHERS)
def test_factors_are_those_of_kfac_jax(case, fisher):
    # The experiments' models add a bias to a whole batch.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        factors, _ = curvax_curvature(case, fisher)
    weights = {name for name, leaf in case.workload.params.items() if leaf.ndim > 1}
    assert factors.keys() == weights
    for name, got in factors.items():
        prefix = f"{case.name}/{name}"
        theirs = Factors(
            STORED[f"{prefix}/input"],
            STORED[f"{prefix}/output/{fisher}"],
            float(STORED[f"{prefix}/scale"]),
        )
        shape, size = case.workload.params[name].shape, len(case.workload.x)
        wanted = as_curvax(theirs, shape, size, fisher)
        np.testing.assert_allclose(got.input, wanted.input, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(got.output, wanted.output, rtol=1e-6, atol=1e-12)
