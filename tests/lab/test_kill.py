"""kill -9 at any moment, and `run` again: the rows are those of a run that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = 40


def command(package, out, *options):
    line = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from experiments.cli import main; sys.exit(main(sys.argv[2:], sys.argv[1]))"
    )
    return [sys.executable, "-c", line, package, "run", "games.coin", "--out", str(out), *options]


@pytest.fixture
def start(tmp_path, coin_package):
    """Start a run of 40 rows, 20 ms each."""
    paths = [ROOT, ROOT / "kernels", tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "JAX_PLATFORMS": "cpu"}

    def start(out):
        options = ("--seeds", "10", "--pause", "0.02")
        return subprocess.Popen(
            command(coin_package, tmp_path / out, *options),
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def rows_of(path):
    return [{k: v for k, v in json.loads(x).items() if k != "_seconds"} for x in path.read_bytes().splitlines()]


def wait_for_rows(path, process, number):
    """Until the file has so many lines; fails where the process ends before."""
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_rows(start, tmp_path):
    alone = start("alone")
    moments = random.Random(0)
    path = tmp_path / "killed" / "games.coin" / "default" / "rows.jsonl"
    for at_least in (0, 3, 21):
        process = start("killed")
        wait_for_rows(path, process, at_least)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
    assert 21 <= path.read_bytes().count(b"\n") < LINES
    process = start("killed")
    said, progress = process.communicate(timeout=60)
    assert process.returncode == 0, progress
    assert "40/40 trials" in progress
    assert "were in the record" in progress
    assert alone.wait(timeout=60) == 0
    expected = rows_of(tmp_path / "alone" / "games.coin" / "default" / "rows.jsonl")
    assert len(expected) == LINES
    assert rows_of(path) == expected
    # What is said of the rows is the same too, but for the times.
    left_alone, _ = alone.communicate()
    assert said.splitlines()[1:-3] == left_alone.splitlines()[1:-3]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_says_how_to_go_on(start, tmp_path):
    process = start("stopped")
    path = tmp_path / "stopped" / "games.coin" / "default" / "rows.jsonl"
    wait_for_rows(path, process, 3)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from them" in errors
    assert "Traceback" not in said + errors
    assert "\x1b" not in said + errors
    assert 3 <= len(rows_of(path)) < LINES
