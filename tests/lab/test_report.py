"""RESULTS.md, results.html and the JSON say the same, and nothing in them is taken for markup."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import polars as pl
import pytest

from experiments.lab import markdown, page, report
from experiments.lab.experiment import discover
from experiments.lab.records import ROWS, STATE, RecordError, read_json, write_json
from experiments.lab.runner import execute
from experiments.lab.terminal import console

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Checks that tags close, and keeps the text, the attributes and the tables."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def measured(tmp_path, coin_package):
    """The experiments of the package, `games.coin` among them with rows at two scales; and the folder."""
    found, _ = discover(coin_package)
    results = tmp_path / "results"
    for scale in ("default", "tiny"):
        folder = results / "games.coin" / scale
        config = found[0].scales[scale]
        execute(found[0], config, scale=scale, folder=folder, fresh=False, console=console(stderr=True))
    return found, results


@pytest.fixture
def sections(measured):
    return report.collect(*measured)


def test_json_has_what_list_has_and_the_verdicts(sections):
    described = json.loads(report.to_json([report.describe_section(s) for s in sections]))
    (coin,) = described
    listed = report.describe_experiment(sections[0].experiment)
    assert listed["name"] == "games.coin"
    assert {name: coin[name] for name in listed if name != "claims"} == {
        n: v for n, v in listed.items() if n != "claims"
    }
    rows = sections[0].runs[0].record.rows
    difference = rows.filter(method="biased")["heads"].to_numpy() - rows.filter(method="fair")["heads"].to_numpy()
    for claim, of_list, verdict in zip(coin["claims"], listed["claims"], ["holds", "fails"], strict=True):
        assert of_list.items() <= claim.items()
        assert claim["value"] == pytest.approx(difference.mean())
        assert claim["interval"][0] < claim["value"] < claim["interval"][1]
        assert (claim["verdict"], claim["scale"], claim["note"]) == (verdict, "default", "10 pairs")
    assert [run["scale"] for run in coin["runs"]] == ["default", "tiny"]
    assert [claim["verdict"] for claim in coin["runs"][1]["claims"]] == ["not judged"] * 2


def test_markdown_shows_every_claim_with_both_numbers(sections):
    text = markdown.render(sections)
    run = sections[0].runs[0]
    value = report.describe_section(sections[0])["claims"][0]
    ours = f"{value['value']:.4g} \\[{value['interval'][0]:.4g}, {value['interval'][1]:.4g}] heads; 10 pairs"
    assert f"| More heads \\| with a bias &lt;b&gt; (abstract) | 60% \\* | {ours} | **holds** |" in text
    assert "| **fails** |" in text
    assert "`python -m experiments run games.coin --scale tiny`" in text
    assert f"Scale default: {run.device} · {run.date} · 20 rows" in text
    assert "Bernoulli \\| Ars &lt;Conjectandi&gt;, 1713" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_page_shows_every_claim_with_both_numbers(sections):
    html = page.render(sections, "results")
    reader = Reader(html)
    run = sections[0].runs[0]
    claims = report.describe_section(sections[0])["claims"]
    lines = [line for line in reader.cells if len(line) == 8 and line[0] == "games.coin"]
    assert len(lines) == 4  # two claims at two scales
    _, text, paper, ours, verdict, scale, device, date = lines[0]
    assert text.startswith("More heads | with a bias <b>")
    assert (paper, verdict, scale, device, date) == ("60% *", "holds", "default", run.device, run.date)
    low, high = claims[0]["interval"]
    assert ours.startswith(f"{claims[0]['value']:.4g} [{low:.4g}, {high:.4g}] heads")
    assert [line[4] for line in lines] == ["holds", "fails", "not judged", "not judged"]
    assert "Bernoulli | Ars <Conjectandi>, 1713" in reader.text
    assert "<code>every</code> bias in (0.5, 1] &amp; &lt; always &gt;" in html


def test_the_page_is_self_contained(sections):
    reader = Reader(page.render(sections, "results"))
    sources = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(value.startswith(("#", "data:image/svg+xml,")) for value in sources)
    targets = {value for _, name, value in reader.attributes if name == "id"}
    assert {value[1:] for value in sources if value.startswith("#")} <= targets
    assert "url(" not in page.STYLE.read_text()
    assert "@import" not in page.STYLE.read_text()
    images = [value for tag, name, value in reader.attributes if (tag, name) == ("img", "src")]
    texts = [value for tag, name, value in reader.attributes if (tag, name) == ("img", "alt")]
    assert len(images) == len(texts) == 2
    assert texts[0] == "Figure of games.coin at scale default: heads against bias; lines: biased, fair"


def test_the_page_carries_the_report_that_made_it(sections):
    html = page.render(sections, "results")
    described = [report.describe_section(s) for s in sections]
    assert page.embedded_report(html) == json.loads(json.dumps(described))
    with pytest.raises(ValueError, match="no embedded report"):
        page.embedded_report(html.replace('id="report"', ""))


def test_text_cannot_leave_its_place(make_package, coin_source):
    evil = "</script></style><script>alert(1)</script>\\\"'"
    source = coin_source.replace('"never"', repr(evil)).replace("Bernoulli | Ars", evil.replace('"', ""))
    found, broken = discover(make_package({"games/coin.py": source}))
    assert broken == {}
    html = page.render(report.collect(found), evil)
    assert evil in Reader(html).text
    assert html.count("<script") == 1
    assert [claim["paper"] for claim in page.embedded_report(html)[0]["claims"]] == ["60% *", evil]


def test_rendering_twice_gives_the_same(measured):
    first, second = (report.collect(*measured) for _ in range(2))
    assert markdown.render(first) == markdown.render(second)
    assert page.render(first, "results") == page.render(second, "results")


def test_without_results_there_are_pages_too(tmp_path, coin_package):
    found, _ = discover(coin_package)
    for sections in ((), report.collect(found, tmp_path / "nowhere")):
        assert "No rows are committed yet." in markdown.render(sections)
        assert "No rows are committed yet." in Reader(page.render(sections, "results")).text
    sections = report.collect(found, tmp_path / "nowhere")
    assert "- `games.coin`: A biased coin" in markdown.render(sections)
    (described,) = (report.describe_section(s) for s in sections)
    assert [(c["value"], c["verdict"], c["note"]) for c in described["claims"]] == [
        (None, "not judged", "no committed rows")
    ] * 2


def test_a_run_that_is_not_complete_is_not_judged(measured):
    found, results = measured
    folder = results / "games.coin" / "default"
    lines = (folder / ROWS).read_bytes().splitlines(keepends=True)
    (folder / ROWS).write_bytes(b"".join(lines[:7]) + lines[7][:10])
    sections = report.collect(found, results)
    assert [j.note for j in sections[0].judgements] == ["the run is not complete"] * 2
    assert "7 rows" in markdown.render(sections)
    assert "not complete" in markdown.render(sections)
    assert page.render(sections, "results").count("<img") == 1  # of scale tiny


def test_fields_that_were_changed_are_in_the_command(measured):
    found, results = measured
    config = dataclasses.replace(found[0].scales["default"], biases=(0.6, 0.9), fair_first=True)
    folder = results / "games.coin" / "default"
    execute(found[0], config, scale="default", folder=folder, fresh=True, console=console(stderr=True))
    run = report.collect(found, results)[0].runs[0]
    assert run.changed == {"biases": [0.6, 0.9], "fair_first": True}
    assert run.command == "python -m experiments run games.coin --biases 0.6 0.9 --fair-first"


def test_results_that_would_be_lost_are_an_error(measured):
    found, results = measured
    with pytest.raises(report.ReportError, match=r"games\.coin has results, but the experiment cannot be imported"):
        report.collect([], results, broken=["games.coin"])
    report.check_owned(report.collect(found, results), results)
    with pytest.raises(report.ReportError, match=r"games\.coin.default belongs to no experiment and scale"):
        report.check_owned((), results)
    (results / "games.coin" / "huge").mkdir()
    with pytest.raises(report.ReportError, match=r"huge belongs to no experiment and scale"):
        report.check_owned(report.collect(found, results), results)


def test_a_damaged_record_is_an_error(measured):
    found, results = measured
    (results / "games.coin" / "tiny" / ROWS).write_text("no row\n")
    with pytest.raises(RecordError, match="line 1, is not a row"):
        report.collect(found, results)


def test_an_experiment_may_bring_its_own_table_and_no_figure(make_package, coin_source, tmp_path):
    source = coin_source.replace("def figure(rows):", "def figure(rows):\n    raise NotEnoughRows('too few <rows>')")
    source = source.replace("import Claim,", "import Claim, NotEnoughRows,")
    source += (
        "\n\ndef table(rows):\n    return rows.group_by('bias', maintain_order=True).agg(most=rows['heads'].max())\n"
    )
    found, _ = discover(make_package({"games/coin.py": source}))
    folder = tmp_path / "games.coin" / "tiny"
    execute(found[0], found[0].scales["tiny"], scale="tiny", folder=folder, fresh=False, console=console(stderr=True))
    (run,) = report.collect(found, tmp_path)[0].runs
    assert run.table().columns == ["bias", "most"]
    reader = Reader(page.render(report.collect(found, tmp_path), "results"))
    assert "img" not in {tag for tag, _, _ in reader.attributes}
    assert ["bias", "most"] in reader.cells


def test_a_number_that_is_nan_is_null_in_json_and_not_judged(make_package, coin_source, tmp_path):
    source = coin_source.replace('"heads": heads.mean()', '"heads": float("nan")')
    found, _ = discover(make_package({"games/coin.py": source}))
    folder = tmp_path / "games.coin" / "default"
    config = found[0].scales["default"]
    execute(found[0], config, scale="default", folder=folder, fresh=False, console=console(stderr=True))
    sections = report.collect(found, tmp_path)
    claim = json.loads(report.to_json(report.describe_section(sections[0])))["claims"][0]
    assert (claim["value"], claim["interval"], claim["verdict"]) == (None, [None, None], "not judged")
    assert claim["note"] == "10 of 10 pairs are not finite"


def test_the_state_has_to_know_of_every_row(measured):
    found, results = measured
    state = results / "games.coin" / "default" / STATE
    write_json(state, (read_json(state) or {}) | {"rows": 19})
    assert not report.collect(found, results)[0].runs[0].record.complete
    assert isinstance(report.collect(found, results)[0].runs[0].table(), pl.DataFrame)
