"""Notebooks are text that runs, and what is committed as their rendering is a rendering of that text."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from experiments.data.files import DataNotFound

ROOT = Path(__file__).resolve().parent.parent
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
RENDERINGS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000

each_rendering = pytest.mark.parametrize("path", RENDERINGS, ids=[path.stem for path in RENDERINGS])


class Script(NamedTuple):
    """A notebook's text after it ran as a script."""

    path: Path
    names: dict[str, Any]
    printed: str


@pytest.fixture(scope="module", params=TEXTS, ids=[path.stem for path in TEXTS])
def script(request) -> Script:
    pytest.importorskip("matplotlib", reason="notebooks draw with matplotlib, of the extra [experiments]")
    pytest.importorskip("IPython", reason="notebooks show their figures with IPython, of the extra [notebooks]")
    try:
        return run(request.param)
    except DataNotFound as error:
        pytest.skip(str(error))


def run(path: Path) -> Script:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(str(path), run_name="__main__")
    return Script(path, names, printed.getvalue())


def outputs(path: Path) -> list[dict[str, Any]]:
    """All outputs of a rendering, in order."""
    return [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", ())]


def texts(path: Path) -> Iterator[str]:
    """Whatever a rendering shows as text: sources, prints, tables."""
    for cell in json.loads(path.read_text())["cells"]:
        yield "".join(cell["source"])
    for output in outputs(path):
        yield "".join(output.get("text", ""))
        yield from ("".join(shown) for kind, shown in output.get("data", {}).items() if kind.startswith("text/"))


def test_every_text_has_a_rendering():
    assert TEXTS
    assert [path.stem for path in TEXTS] == [path.stem for path in RENDERINGS]


def test_the_script_prints_what_its_rendering_shows(script):
    """A rendering of an older library would show other slots and other bytes."""
    rendered = outputs(script.path.with_suffix(".ipynb"))
    shown = ["".join(output["text"]) for output in rendered if output["output_type"] == "stream"]
    assert shown
    printed = script.printed
    for lines in shown:
        _, found, printed = printed.partition(lines)
        assert found, f"not printed: {lines!r}; run `make notebooks`"


@each_rendering
def test_a_rendering_ran_from_top_to_bottom(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "error" not in {output["output_type"] for output in outputs(path)}
    assert "stderr" not in {output.get("name") for output in outputs(path)}


@each_rendering
def test_a_rendering_has_a_picture_and_is_small(path):
    assert any("image/png" in output.get("data", {}) for output in outputs(path))
    assert path.stat().st_size < MOST_BYTES


@each_rendering
def test_a_rendering_tells_nothing_of_the_machine(path):
    folders = map(re.escape, (str(ROOT), sys.prefix, f"{tempfile.gettempdir()}/"))
    found = re.compile("|".join((*folders, "/home/", "/Users/", "/root/", r"\bat 0x[0-9a-f]{6}")))
    assert [text for text in texts(path) if found.search(text)] == []


# --- the notebook robe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def robe(script) -> dict[str, Any]:
    if script.path.stem != "robe":
        pytest.skip("about another notebook")
    return script.names


def test_robe_variances_follow_the_law(robe):
    for point in robe["variances"].iter_rows(named=True):
        # One block a row: nothing falls together, and only rounding is left of the variance.
        assert abs(point["variance"] - point["law"]) <= 4 * point["standard error"] + 1e-12, point


@pytest.mark.parametrize("wrap", ["circular", "none"])
@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_robe_law_counts_the_coincidences_of_all_placements(robe, block_size, wrap):
    """Two blocks are put at every pair of starts, and the slots of their coordinates compared."""
    budget, features, x, y = (robe[name] for name in ("budget", "features", "x", "y"))
    starts = np.arange(budget if wrap == "circular" else budget - block_size + 1)
    slots = (starts[:, None] + np.arange(block_size)) % budget
    chance = np.zeros((block_size, block_size))
    for s in range(block_size):
        for t in range(block_size):
            chance[s, t] = (slots[:, s, None] == slots[None, :, t]).mean()
    expected = 0.0
    for i in range(features):
        for j in range(features):
            if i // block_size != j // block_size:
                meet = chance[i % block_size, j % block_size]
                expected += meet * (x[i] ** 2 * y[j] ** 2 + x[i] * y[i] * x[j] * y[j])
    assert robe["law"](x, y, block_size, wrap) == pytest.approx(expected, rel=1e-12)


# --- the tool -------------------------------------------------------------------------------------------


def render(*arguments: object) -> subprocess.CompletedProcess[str]:
    for module in ("jupytext", "nbclient", "ipykernel", "tyro"):
        pytest.importorskip(module, reason=f"tools/render_notebooks.py needs {module}, of the extra [notebooks]")
    command = [sys.executable, str(ROOT / "tools" / "render_notebooks.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


def test_texts_and_renderings_agree():
    checked = render("--check")
    assert checked.returncode == 0, checked.stderr


def test_check_tells_every_rendering_of_another_text(tmp_path):
    title, code, more = ("markdown", "A title"), ("code", "print(1)"), ("code", "print(2)")
    renderings = {"same": [title, code], "other": [title, more], "longer": [title, code, more], "shorter": [title]}
    files = [tmp_path / f"{name}.py" for name in (*renderings, "missing")]
    for path in files:
        path.write_text("# %% [markdown]\n# A title\n\n# %%\nprint(1)\n")
        if path.stem in renderings:
            path.with_suffix(".ipynb").write_text(json.dumps(notebook(renderings[path.stem])))
    checked = render("--check", *files)
    assert checked.returncode == 1
    assert checked.stderr.splitlines() == [
        f"{tmp_path}/other.ipynb differs from other.py from cell 1 on",
        f"{tmp_path}/longer.ipynb differs from longer.py from cell 2 on",
        f"{tmp_path}/shorter.ipynb differs from shorter.py from cell 1 on",
        f"{tmp_path}/missing.ipynb is missing",
        "run `make notebooks`",
    ]


def notebook(cells: list[tuple[str, str]]) -> dict[str, Any]:
    """A notebook of nbformat 4.5 without outputs."""
    made: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells):
        code = {"outputs": [], "execution_count": None} if kind == "code" else {}
        made.append({"cell_type": kind, "id": f"c{number}", "metadata": {}, "source": source, **code})
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_what_runs_is_rendered_and_what_fails_or_warns_is_not(tmp_path):
    sources = {
        "good": "# %% [markdown]\n# A title\n\n# %%\nprint(6 * 7)\n",
        "raises": "# %%\nraise ValueError('budget is 0')\n",
        "warns": "# %%\nimport warnings\n\nwarnings.warn('deprecated')\n",
    }
    files = [tmp_path / f"{name}.py" for name in sources]
    for path, text in zip(files, sources.values(), strict=True):
        path.write_text(text)
        path.with_suffix(".ipynb").write_text("before")
    done = render(*files)
    assert done.returncode == 1
    assert "budget is 0" in done.stderr
    assert "deprecated" in done.stderr
    assert [path.with_suffix(".ipynb").read_text() for path in files[1:]] == ["before", "before"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix not in (".py", ".ipynb")) == []

    cells = json.loads((tmp_path / "good.ipynb").read_text())["cells"]
    assert [cell["id"] for cell in cells] == ["good-0", "good-1"]
    assert [cell["metadata"] for cell in cells] == [{}, {}]
    assert cells[1]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["42\n"]}]
