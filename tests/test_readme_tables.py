"""What README.md says in numbers is what the code gives."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_agrees(tables):
    assert tables.main(["--check"]) == 0


def test_a_row_of_the_table_counted_by_hand(tables):
    """Llama-7B: 32 layers of 32 heads of width 128. H2O keeps 819 tokens, its main slots with position and score."""
    kept, heads, window = 819, 32 * 32, 409
    # And 20 bytes for the row's length, the ring, the step and a key of noise.
    size = heads * kept * (2 * 128 * 2 + 4)  # keys and values in bfloat16, a score
    size += heads * (kept - window) * 4 + 32 * window * 4  # positions: of each head's slots, of the window once
    assert f"| `h2o@0.2` | 819 | {(size + 20) / 4096:,.0f} |" in tables.cache_table()


def test_a_readme_without_marks_is_refused(tables):
    with pytest.raises(ValueError, match="once each"):
        tables.written("no table here")
