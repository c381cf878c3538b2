"""The commands: what they print where, what they write, and how they fail."""

import json

import pytest

from experiments.cli import main
from experiments.lab import page
from experiments.lab.records import read_record


@pytest.fixture
def cli(coin_package, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder; returns the exit status and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(line):
        try:
            status = main(line.split(), coin_package)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err  # no terminal, no control characters
        assert "Traceback" not in out + err
        return status, out, err

    return run


def test_list(cli):
    status, out, err = cli("list")
    assert (status, err) == (0, "")
    assert "games.coin" in out
    status, out, err = cli("list --json")
    assert (status, err) == (0, "")
    (coin,) = json.loads(out)
    assert coin["name"] == "games.coin"
    assert coin["system"] == "hashml.sharing"
    assert coin["paper"].startswith("Bernoulli")
    assert coin["scales"] == ["tiny", "default"]
    assert coin["claims"][1] == {
        "id": "fewer", "text": "Fewer heads with a bias", "paper": "never", "source": "chapter 4", "unit": "",
    }  # fmt: skip


def test_a_broken_module_is_named_beside_the_list(cli, tmp_path, coin_package):
    (tmp_path / coin_package / "games" / "dice.py").write_text("import nothing_of_this_name")
    status, out, err = cli("list --json")
    assert status == 0
    assert [e["name"] for e in json.loads(out)] == ["games.coin"]
    assert "left out: games.dice cannot be imported: ModuleNotFoundError" in err
    status, out, err = cli("run games.dice")
    assert (status, out) == (2, "")
    assert err.startswith("error: games.dice cannot be imported: ModuleNotFoundError")


def test_run_writes_a_folder_and_says_what_came_out(cli, tmp_path):
    status, out, err = cli("run games.coin --scale tiny")
    folder = tmp_path / "runs" / "games.coin" / "tiny"
    assert status == 0
    assert "8/8 trials" in err
    assert "not judged" in out
    assert "scale tiny: " in out
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "environment.json", "state.json", "rows.jsonl", "page.html", "figure.png",
    }  # fmt: skip
    for name in ("page.html", "figure.png", "rows.jsonl"):
        assert f"runs/games.coin/tiny/{name}" in out
    assert page.embedded_report((folder / "page.html").read_text())[0]["runs"][0]["rows"] == 8
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_a_figure(make_package, coin_source, tmp_path, capsys):
    source = coin_source.replace("def figure(rows):", "def figure(rows):\n    raise NotEnoughRows('too few')")
    package = make_package({"games/coin.py": source.replace("import Claim,", "import Claim, NotEnoughRows,")})
    assert main(["run", "games.coin", "--scale", "tiny", "--out", str(tmp_path)], package) == 0
    assert "page.html" in capsys.readouterr().out
    assert not (tmp_path / "games.coin" / "tiny" / "figure.png").exists()


def test_run_takes_the_fields_of_the_config(cli, tmp_path):
    status, out, _ = cli("run --scale tiny games.coin --biases 0.7 0.9 1.0 --seeds 3 --fair-first --out elsewhere")
    assert status == 0
    record = read_record(tmp_path / "elsewhere" / "games.coin" / "tiny")
    assert record is not None
    assert record.config == {"biases": [0.7, 0.9, 1.0], "throws": 10, "seeds": 3, "pause": 0.0, "fair_first": True}
    assert len(record.rows) == 18
    assert "inf" in str(record.rows["odds"].max())
    assert "∞" in out


def test_run_help_shows_the_fields_with_the_defaults_of_the_scale(cli):
    status, out, _ = cli("run games.coin --scale tiny --help")
    assert status == 0
    assert "--throws INT" in out
    assert "(default: 10)" in out
    assert "Seeds that both coins share. (default: 2)" in out
    assert "--fresh" in out
    assert "A biased coin shows more heads" in out


@pytest.mark.parametrize("line", ["--help", "list --help", "run --help", "sweep --help", "report --help"])
def test_help(cli, line):
    status, out, _ = cli(line)
    assert status == 0
    assert "usage: python -m experiments" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run games.coins", "error: no experiment is called 'games.coins'; did you mean games.coin?"),
        ("report games.coins", "error: no experiment is called 'games.coins'; did you mean games.coin?"),
        ("sweep coin --seeds 1 2", "error: no experiment is called 'coin'; did you mean games.coin?"),
        ("run games.coin --scale paper", "error: games.coin has no scale 'paper'; it has tiny, default"),
        ("run games.coin --scale huge", "huge"),
        ("run games.coin --seed 3", "--seeds"),
        ("run games.coin --seeds many", "many"),
        ("run games.coin --seeds 0", "seeds must be positive, got 0"),
        ("run", "NAME"),
        ("run --scale tiny", "NAME"),
        ("sweep games.coin --seeds 3", "error: sweep needs several values for a field"),
        ("ruin games.coin", "ruin"),
        ("", "Missing subcommand"),
    ],
)
def test_errors_of_the_user(cli, tmp_path, line, message):
    before = set(tmp_path.iterdir())
    status, out, err = cli(line)
    assert status == 2
    assert message in err
    assert out == ""
    assert set(tmp_path.iterdir()) == before


def test_another_config_needs_fresh(cli):
    assert cli("run games.coin --scale tiny")[0] == 0
    status, _, err = cli("run games.coin --scale tiny --seeds 3")
    assert status == 2
    assert "seeds is 2 there and 3 now" in err
    assert "--fresh" in err
    assert cli("run games.coin --scale tiny --seeds 3 --fresh")[0] == 0
    status, _, err = cli("run games.coin --scale tiny --seeds 3")
    assert status == 0
    assert "12 were in the record" in err


def test_a_data_set_that_is_missing_is_no_traceback(cli, make_package, coin_source, capsys):
    missing = (
        "    from experiments.data.files import DataNotFound\n    raise DataNotFound('no criteo; get it')\n    yield"
    )
    package = make_package(
        {"games/coin.py": coin_source.replace("def run(config):", f"def run(config):\n{missing}\n")}
    )
    assert main(["run", "games.coin"], package) == 2
    assert "error: no criteo; get it" in capsys.readouterr().err


def test_sweep_runs_every_combination(cli, tmp_path):
    line = "sweep games.coin --scale tiny --throws 10 20 --fair-first True False --biases 0.7 0.9 --seeds=3"
    status, out, _ = cli(line)
    assert status == 0
    folders = sorted((tmp_path / "runs" / "games.coin").iterdir())
    configs = [json.loads((folder / "config.json").read_text())["fields"] for folder in folders]
    assert {(c["throws"], c["fair_first"]) for c in configs} == {(t, f) for t in (10, 20) for f in (True, False)}
    assert all(c["biases"] == [0.7, 0.9] and c["seeds"] == 3 for c in configs)
    assert len(folders) == 4
    assert all(str(folder.relative_to(tmp_path)) in out for folder in folders)
    header = next(text for text in out.splitlines() if "throws" in text)
    assert "fair_first" in header
    assert "biases" not in header  # the same everywhere
    assert out.count("more") == 4
    before = {folder: (folder / "rows.jsonl").read_bytes() for folder in folders}
    assert cli(line)[0] == 0
    assert {folder: (folder / "rows.jsonl").read_bytes() for folder in folders} == before


def test_a_point_of_a_sweep_that_is_the_scale_itself_shares_its_folder(cli, tmp_path):
    assert cli("run games.coin --scale tiny")[0] == 0
    status, _, err = cli("sweep games.coin --scale tiny --seeds 2 3")
    assert status == 0
    assert "8 were in the record" in err
    assert {path.name for path in (tmp_path / "runs" / "games.coin").iterdir()} == {"tiny", "tiny+seeds=3"}


def test_report_writes_both_files(cli, tmp_path):
    cli("run games.coin --out results")
    for name in ("page.html", "figure.png"):
        (tmp_path / "results" / "games.coin" / "default" / name).unlink()
    status, out, _ = cli("report --results results --out-dir .")
    assert (status, out.split()) == (0, ["RESULTS.md", "results.html"])
    assert "| **holds** |" in (tmp_path / "RESULTS.md").read_text()
    (coin,) = page.embedded_report((tmp_path / "results.html").read_text())
    status, out, err = cli("report --json --results results")
    assert (status, err) == (0, "")
    assert json.loads(out) == [coin]
    assert cli("report games.coin --json --results results")[1] == out
    assert [claim["verdict"] for claim in coin["claims"]] == ["holds", "fails"]


def test_report_of_one_writes_nothing(cli, tmp_path):
    cli("run games.coin --out results")
    before = set(tmp_path.iterdir())
    status, out, _ = cli("report games.coin --results results")
    assert status == 0
    assert "holds" in out
    assert "60% *" in out
    assert set(tmp_path.iterdir()) == before
    status, out, _ = cli("report games.coin --results nowhere")
    assert status == 0
    assert "no committed rows" in out


def test_report_without_results(cli, tmp_path):
    assert cli("report --results nowhere --out-dir .")[0] == 0
    assert "No rows are committed yet." in (tmp_path / "RESULTS.md").read_text()


def test_report_refuses_a_damaged_record(cli, tmp_path):
    cli("run games.coin --scale tiny --out results")
    rows = tmp_path / "results" / "games.coin" / "tiny" / "rows.jsonl"
    rows.write_bytes(b"garbage\n" + rows.read_bytes())
    status, _, err = cli("report --results results --out-dir .")
    assert status == 2
    assert "rows.jsonl, line 1, is not a row" in err
    assert not (tmp_path / "RESULTS.md").exists()
