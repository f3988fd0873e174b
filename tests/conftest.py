"""What holds for every test: float64, no silent promotion of ranks or dtypes, annotations checked,
reproducible examples."""

import os

import hypothesis
import jax
import jaxtyping
import pytest

# Nearly all of the time goes into compiling small programs, which these make several times as fast.
# Flags in the environment come later, and win: "--xla_backend_optimization_level=3
# --xla_cpu_use_fusion_emitters=true" tests what users compile. A test that needs a level asks it.
FAST_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # gone since, and an unknown flag ends the process
    FAST_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*FAST_TO_COMPILE, os.environ.get("XLA_FLAGS", "")])

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# A GPU would multiply float32 in TF32, which no reference here does.
jax.config.update("jax_default_matmul_precision", "highest")

jaxtyping.install_import_hook("curvax", "beartype.beartype")  # before anything imports curvax

hypothesis.settings.register_profile("curvax", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("curvax")

# Optax's schedules divide an integer count by a float, and its Adam, which some methods have for
# what is no matrix, takes powers of one.
MIXES_DTYPES = {"test_battery", "test_experiment_methods", "test_quickstart", "test_soak"}


@pytest.fixture(autouse=True, scope="module")
def _promotion(request):
    relaxed = request.module.__name__.rpartition(".")[2] in MIXES_DTYPES
    with jax.numpy_dtype_promotion("standard" if relaxed else "strict"):
        yield


@pytest.fixture
def unchecked():
    """Annotations are not checked: for what curvax itself says of an argument of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
