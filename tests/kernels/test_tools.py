"""The bench tells right from wrong and writes what it measures; the compilation gate keeps its table."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml_kernels.problem import Problem, every_problem

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels"

CHIPS = {"NVIDIA H200": "cuda", "TPU v5 lite": "tpu"}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    """`bench` and `aot` are programs beside the package, not parts of it."""
    monkeypatch.syspath_prepend(str(KERNELS))


# --- bench ----------------------------------------------------------------------------------------


def doubling(wrong: str | None = None, terms: int = 1) -> Problem:
    """An op that doubles a vector, with a fault in the implementation ``wrong``."""

    def call(implementation, values, _):
        return values * (2.001 if implementation == wrong else 2)

    return Problem(
        op="double",
        case="small",
        direction="forward",
        arguments=(jax.ShapeDtypeStruct((100,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)),
        draw=lambda rng: (rng.standard_normal(100, np.float32), rng.integers(0, 9, 3, np.int32)),
        call=call,
        kernels={},
        refusal=lambda _: None,
        bytes=800,
        flops=100,
        terms=terms,
        table_rows=None,
    )


def rows_of(problem: Problem, **device):
    from bench import measure
    from bench.roofline import Device

    chip = Device(
        **({"platform": "cpu", "kind": "test", "bandwidth": 1e9, "flops": None, "source": "given"} | device)
    )
    return {row["implementation"]: row for row in measure.measure(problem, chip, samples=3, seed=0)}


def test_rows_relate_the_median_to_the_bound():
    rows = rows_of(doubling())
    assert set(rows) == {"auto", "xla", "reference"}
    for row in rows.values():
        assert row["failure"] is None
        assert row["max_error"] == 0.0
        assert row["bound_seconds"] == 800 / 1e9
        assert row["of_bound"] == row["bound_seconds"] / row["seconds"]
        assert row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
        assert json.loads(json.dumps(row)) == row
    assert rows["xla"]["over_xla"] == pytest.approx(1.0)


def test_arithmetic_can_bind():
    assert rows_of(doubling(), flops=1e6)["xla"]["bound_seconds"] == 100 / 1e6


@pytest.mark.parametrize("terms", [1, 3])
def test_a_wrong_result_is_not_timed(terms):
    from bench import table

    rows = rows_of(doubling(wrong="xla", terms=terms))
    assert rows["xla"]["failure"] == "differs from reference"
    assert rows["xla"]["seconds"] is None
    assert rows["auto"]["failure"] is None
    assert "differs from reference" in table.text(list(rows.values()))


def test_a_failing_implementation_leaves_the_others():
    def call(implementation, values, _):
        if implementation == "auto":
            raise NotImplementedError("no such unit")
        return values

    rows = rows_of(doubling()._replace(call=call))
    assert rows["auto"]["failure"] == "NotImplementedError: no such unit"
    assert rows["xla"]["failure"] is None


def test_several_calls_a_program_are_told_apart():
    """On an accelerator a program makes several calls; the time is that of one."""
    rows = rows_of(doubling(), platform="tpu")
    assert set(rows) == {"xla", "reference"}
    assert {row["calls"] for row in rows.values()} == {16}


def test_the_command_writes_rows_and_a_table(tmp_path):
    out = tmp_path / "rows.jsonl"
    run = subprocess.run(
        [sys.executable, "-m", "bench", "hash_gather", "--case", "ragged", "--samples", "2", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": str(KERNELS), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["direction"], row["implementation"]) for row in rows] == [
        (direction, name) for direction in ("forward", "backward") for name in ("auto", "xla", "reference")
    ]
    assert all(row["failure"] is None and row["platform"] == "cpu" for row in rows)
    assert run.stdout.count("ragged") == len(rows)
    assert "GB/s (a copy measured now)" in run.stdout


def test_the_command_names_what_it_does_not_know():
    run = subprocess.run(
        [sys.executable, "-m", "bench", "--case", "huge"],
        env=os.environ | {"PYTHONPATH": str(KERNELS), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert "case is 'huge'" in run.stderr


def test_kept_rows_are_of_known_problems():
    known = {(p.op, p.case, p.direction) for p in every_problem()}
    files = sorted((KERNELS / "results").glob("*.jsonl"))
    assert files
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert rows
        assert {(row["op"], row["case"], row["direction"]) for row in rows} <= known
        assert all(row["failure"] is None and row["seconds"] > 0 for row in rows)


# --- the compilation gate -------------------------------------------------------------------------


def compiled(**changes):
    row = {
        "chip": "NVIDIA H200",
        "op": "sort",
        "case": "small",
        "direction": "forward",
        "bytes": 3 * 2**20,
        "refusal": None,
        "kernels": [{"name": "sort", "kernel": True, "registers": 40, "spills": 0, "on_chip_bytes": 2048}],
        "temporary_bytes": 0,
        "failures": [],
    }
    return row | changes


def test_the_table_replaces_what_is_between_its_markers(tmp_path):
    from aot import table

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    rows = [compiled(), compiled(direction="backward", kernels=[], refusal="n is 3; it must be even")]
    table.write(rows, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n| chip")
    assert text.endswith(f"|\n{table.END}\nafter\n")
    assert "| NVIDIA H200 | sort | small | forward | 3.0 MiB | sort | 40 | 0 | 2 KiB | 0 B |" in text
    assert "| XLA (n is 3) |" in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_check_looks_past_what_a_compiler_version_moves(tmp_path):
    from aot import table

    readme = tmp_path / "README.md"
    readme.write_text(f"{table.BEGIN}\n{table.END}")
    table.write([compiled()], readme)
    more = [{**compiled()["kernels"][0], "registers": 44}]
    assert table.differences([compiled(kernels=more)], readme) == []
    lost = table.differences([compiled(kernels=[], refusal="n is 3")], readme)
    assert len(lost) == 2
    assert "only in README.md" in lost[0]
    assert "XLA (n is 3)" in lost[1]


def test_a_readme_without_markers_is_refused(tmp_path):
    from aot import table

    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="markers"):
        table.write([compiled()], readme)
    assert readme.read_text() == "nothing"


def test_the_kept_table_agrees_with_what_the_kernels_serve():
    lines = [line for line in (KERNELS / "README.md").read_text().splitlines() if line.startswith("| ")]
    kept = {tuple(cell.strip() for cell in line.strip("| ").split("|")[:6]) for line in lines}
    for problem in every_problem():
        for chip, platform in CHIPS.items():
            kernel = problem.kernels.get(platform)
            refusal = "no kernel" if kernel is None else problem.refusal(kernel)
            found = [row[5] for row in kept if row[:4] == (chip, problem.op, problem.case, problem.direction)]
            assert len(found) == 1, (chip, problem.case, problem.direction)
            assert found[0].startswith("XLA (") == (refusal is not None)
