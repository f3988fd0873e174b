"""What holds for every test: float64, no silent rank promotion, reproducible examples."""

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("curvax", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("curvax")
