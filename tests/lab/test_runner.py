"""A row is on the disk before the next is measured; another process goes on from there."""

import dataclasses
import functools
import io
import json

import pytest
from rich.console import Console

from experiments.lab import Trial, runner
from experiments.lab.experiment import Experiment
from experiments.lab.records import RecordError, read_json
from experiments.lab.runner import execute


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 4
    rate: float = 0.5


class Bench:
    """An experiment that counts its measurements, and a folder to run it into."""

    def __init__(self, folder):
        self.folder = folder
        self.measured = []
        self.trials = self.seeds
        self.console = Console(file=io.StringIO(), width=200)

    def seeds(self, config):
        for seed in range(config.seeds):
            yield Trial({"seed": seed}, functools.partial(self.measure, seed, config))

    def measure(self, seed, config):
        self.measured.append(seed)
        return {"auc": seed * config.rate}

    def run(self, config=None, fresh=False):
        experiment = Experiment(
            name="games.bench",
            title="",
            description="",
            paper="",
            system="",
            scales={"default": Config()},
            run=lambda config: self.trials(config),
            claims=(),
            figure=lambda rows: pytest.fail("a run draws nothing"),
            table=None,
            count=None,
        )
        self.measured.clear()
        return execute(
            experiment, config or Config(), scale="default", folder=self.folder, fresh=fresh, console=self.console
        )

    def rows(self):
        lines = (self.folder / "rows.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("_")} for line in lines]


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "runs" / "bench" / "default")


ALL = [{"seed": seed, "auc": seed * 0.5} for seed in range(4)]


def test_programs_are_forgotten_after_every_measured_trial(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(runner, "forget_programs", lambda: asked.append(len(bench.measured)))
    bench.run()
    assert asked == [1, 2, 3, 4]
    bench.run()
    assert asked == [1, 2, 3, 4]


def test_each_row_is_written_before_the_next_trial_is_asked_for(bench):
    seen = []

    def trials(config):
        for seed in range(3):
            yield Trial({"seed": seed}, lambda: {"auc": 0.5})
            seen.append(len(bench.rows()))

    bench.trials = trials
    bench.run()
    assert seen == [1, 2, 3]


def test_a_run_is_recorded(bench):
    record = bench.run()
    assert bench.rows() == ALL
    assert record.complete
    assert record.key == ("seed",)
    assert record.config == {"seeds": 4, "rate": 0.5}
    assert record.rows.drop("_seconds").to_dicts() == ALL
    assert record.rows["_seconds"].min() >= 0
    assert read_json(bench.folder / "config.json") == {
        "experiment": "games.bench", "scale": "default", "fields": {"seeds": 4, "rate": 0.5},
    }  # fmt: skip
    environment = read_json(bench.folder / "environment.json")
    assert environment is not None
    assert {"date", "commit", "dirty", "python", "jax", "jaxlib", "flax", "numpy", "hashml"} <= environment.keys()
    assert {"platform", "device", "cpu", "cores"} <= environment.keys()
    assert "games.bench: 4 trials" in bench.console.file.getvalue()


def test_a_failure_keeps_the_rows_and_the_next_run_goes_on(bench):
    def fail_at_two(seed, config):
        if seed == 2:
            raise ZeroDivisionError
        return Bench.measure(bench, seed, config)

    bench.measure = fail_at_two
    with pytest.raises(ZeroDivisionError):
        bench.run()
    assert bench.rows() == ALL[:2]
    del bench.measure
    record = bench.run()
    assert bench.measured == [2, 3]
    assert bench.rows() == ALL
    assert record.complete


def test_a_run_without_its_last_mark_is_not_complete_until_it_is_run_again(bench):
    bench.run()
    (bench.folder / "state.json").unlink()
    (bench.folder / "environment.json").unlink()
    record = bench.run()
    assert (bench.measured, record.complete) == ([], True)


def test_running_a_complete_run_again_touches_nothing(bench):
    bench.run()
    before = {path.name: path.read_bytes() for path in bench.folder.iterdir()}
    assert bench.run().complete
    assert bench.measured == []
    assert {path.name: path.read_bytes() for path in bench.folder.iterdir()} == before


def test_a_row_that_is_deleted_is_measured_again(bench):
    bench.run()
    path = bench.folder / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[2:]))
    record = bench.run()
    assert bench.measured == [1]
    assert record.rows["seed"].to_list() == [0, 2, 3, 1]
    assert record.complete


def test_another_config_is_refused_and_named(bench):
    bench.run()
    with pytest.raises(RecordError) as error:
        bench.run(Config(rate=0.25))
    assert "rows of another config: rate is 0.5 there and 0.25 now" in str(error.value)
    assert "--fresh" in str(error.value)
    assert bench.rows() == ALL


def test_fresh_measures_anew(bench):
    bench.run()
    record = bench.run(Config(rate=0.25), fresh=True)
    assert bench.measured == [0, 1, 2, 3]
    assert record.config == {"seeds": 4, "rate": 0.25}
    assert bench.rows() == [{"seed": seed, "auc": seed * 0.25} for seed in range(4)]


def test_fresh_helps_where_everything_is_damaged(bench):
    bench.run()
    for path in bench.folder.iterdir():
        path.write_text("damaged\n")
    with pytest.raises(RecordError, match=r"rows\.jsonl, line 1, is not a row .* --fresh"):
        bench.run()
    assert bench.run(fresh=True).complete
    assert bench.rows() == ALL


def test_a_folder_without_rows_takes_any_config(bench):
    bench.trials = lambda config: iter(())
    assert bench.run().rows.is_empty()
    bench.trials = bench.seeds
    assert bench.run(Config(seeds=2)).complete


def test_rows_that_the_run_does_not_have_are_refused(bench):
    bench.run()
    bench.trials = lambda config: (Trial({"seed": s}, dict) for s in (0, 1, 3))
    with pytest.raises(RecordError, match=r"has 1 rows that this run does not have, such as \{'seed': 2\}"):
        bench.run()


def test_rows_of_another_key_are_refused(bench):
    bench.run()
    bench.trials = lambda config: iter([Trial({"method": "robe", "seed": 0}, dict)])
    with pytest.raises(RecordError, match="line 1, has no field 'method' of the trials' key"):
        bench.run()


def test_a_key_that_stands_twice_in_the_file_is_refused(bench):
    bench.run()
    path = bench.folder / "rows.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(RecordError, match="line 5, repeats a key"):
        bench.run()


def test_two_trials_of_one_key_are_refused(bench):
    bench.trials = lambda config: (Trial({"seed": s}, lambda: {"auc": 1.0}) for s in (0, 1, 0))
    with pytest.raises(ValueError, match=r"two trials have the key \{'seed': 0\}"):
        bench.run()
    assert len(bench.rows()) == 2


def test_keys_of_different_fields_are_refused(bench):
    bench.trials = lambda config: (Trial({name: 0}, lambda: {"auc": 1.0}) for name in ("seed", "method"))
    with pytest.raises(ValueError, match=r"same key fields, got \['seed'\] and \['method'\]"):
        bench.run()


def test_going_on_elsewhere_is_written_down(bench):
    bench.run()
    path = bench.folder / "rows.jsonl"
    first = json.loads((bench.folder / "environment.json").read_text()) | {"cpu": "another one"}
    for expected in (1, 1):  # the same environment is listed once
        (bench.folder / "environment.json").write_text(json.dumps(first))
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        bench.run()
        first = json.loads((bench.folder / "environment.json").read_text())
        assert first["cpu"] == "another one"
        assert len(first["resumed"]) == expected
