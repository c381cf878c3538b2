"""Every experiment of the family runs at its smallest scale, resumes, draws, and tells its own claims."""

import json

import polars as pl
import pytest

from experiments import cli
from experiments.lab import experiment, figures, records
from experiments.lab.claims import judge

NAMES = [
    "sharing.robe",
    "sharing.robe_speed",
    "sharing.robe_text",
    "sharing.pss",
    "sharing.roast",
    "sharing.roast_speed",
]


@pytest.fixture(scope="module", params=NAMES)
def finished(request, tmp_path_factory):
    """Name, experiment and rows of a finished run at scale tiny."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["run", request.param, "--scale", "tiny", "--out", str(out)]) == 0
    record = records.read_record(out / request.param / "tiny")
    assert record is not None
    return request.param, experiment.load(request.param), record.rows, out


def test_runs_as_many_trials_as_it_says(finished):
    _, found, rows, _ = finished
    assert len(rows) == found.count(found.scales["tiny"])


def test_the_page_and_the_figure_are_there(finished):
    name, _, _, out = finished
    folder = out / name / "tiny"
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "not judged" in (folder / "page.html").read_text()


def test_a_second_run_measures_nothing_again(finished, capsys):
    name, _, _, out = finished
    before = (out / name / "tiny" / "rows.jsonl").read_bytes()
    assert cli.main(["run", name, "--scale", "tiny", "--out", str(out)]) == 0
    assert (out / name / "tiny" / "rows.jsonl").read_bytes() == before


def test_claims_have_numbers_or_say_why_not(finished):
    _, found, rows, _ = finished
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note


def test_the_table_and_the_figure_are_functions_of_the_rows(finished):
    _, found, rows, _ = finished
    table = found.table(rows)
    assert isinstance(table, pl.DataFrame)
    assert len(table)
    assert figures.describe(figures.draw(found.figure, rows))


def test_contenders_store_no_more_than_robe(finished):
    """Equal bytes: no baseline may hold more than the budget that ROBE fills."""
    _, _, rows, _ = finished
    if "embedding_bytes" not in rows.columns:
        pytest.skip("a comparison of speed, not of quality")
    stored = rows.filter(pl.col("embedding_bytes").is_not_null() & (pl.col("method") != "full"))
    if "part" in stored.columns:
        stored = stored.filter(pl.col("part") != "law")
    budgets = stored.filter(pl.col("method") == "robe").group_by("compression").agg(pl.col("embedding_bytes").max())
    joined = stored.join(budgets, on="compression", suffix="_budget")
    assert (joined["embedding_bytes"] <= joined["embedding_bytes_budget"]).all()
    assert len(joined) == len(stored)


def test_list_names_them_all(capsys):
    assert cli.main(["list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(NAMES) <= set(listed)
    for name in NAMES:
        assert {"system", "paper", "claims", "scales"} <= listed[name].keys()
        assert all({"id", "text", "paper"} <= claim.keys() for claim in listed[name]["claims"])
