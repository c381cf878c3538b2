"""A bar on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from experiments.lab import progress


def run(console, total, saved=0):
    with progress.watch(console, "games.coin", total) as watch:
        for seed in range(3):
            watch.begins({"method": "robe", "bits": None, "seed": seed})
            watch.done(saved=seed < saved)
    return console.file.getvalue()


@pytest.mark.parametrize(("total", "of"), [(3, "3/3"), (None, "3")])
def test_elsewhere_it_is_plain_lines(total, of):
    said = run(Console(file=io.StringIO()), total)
    assert said == f"games.coin: {of} trials, 0 s, done\n"
    assert run(Console(file=io.StringIO()), total, saved=2) == f"games.coin: {of} trials, 0 s, 2 were in the record\n"


def test_a_long_run_tells_what_it_is_at(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    lines = run(Console(file=io.StringIO()), 3).splitlines()
    assert lines[1] == "games.coin: 1/3 trials, 0 s, now method=robe seed=1"
    assert len(lines) == 4


def test_a_terminal_sees_a_bar():
    said = run(Console(file=io.StringIO(), force_terminal=True, width=120), 3)
    assert "3/3" in said
    assert "method=robe seed=2" in said
    assert "\x1b[" in said
