"""The Python blocks of the pages, run in order, one namespace a page.

Those of README.md are doctests, and pytest runs them as such.
"""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(
    page for page in (ROOT / "docs").rglob("*.md") if BLOCK.search(page.read_text(encoding="utf-8"))
)


@pytest.fixture(autouse=True)
def _as_a_reader_runs_it():
    """With the defaults of JAX, not those of this test suite."""
    ranks, dtypes = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(False), ranks, dtypes:
        yield


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path):
    namespace: dict[str, object] = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        # Lines of the page, so that a traceback points at them.
        first = text.count("\n", 0, match.start(1))
        exec(compile("\n" * first + match.group(1), str(page), "exec"), namespace)


def test_pages_have_blocks():
    names = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"docs/index.md", "docs/concepts.md", "docs/extending.md"} <= names
