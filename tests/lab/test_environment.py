"""What a run was measured with."""

import subprocess

import pytest

from experiments.lab import environment


@pytest.fixture
def checkout(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    (tmp_path / "robe.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path


def test_the_commit_and_whether_it_is_all(checkout):
    clean = environment.collect(checkout)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (checkout / "experiments" / "results" / "games.coin").mkdir(parents=True)
    (checkout / "experiments" / "results" / "games.coin" / "rows.jsonl").touch()
    (checkout / "RESULTS.md").touch()
    assert environment.collect(checkout)["dirty"] is False
    (checkout / "new.py").touch()
    assert environment.collect(checkout)["dirty"] is True


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.collect(tmp_path)["commit"] is None
    monkeypatch.setenv("PATH", "")
    found = environment.collect(tmp_path)
    assert (found["commit"], found["dirty"]) == (None, None)


def test_environments_differ_in_more_than_their_date():
    here = environment.collect()
    assert not environment.differs(here, here | {"date": "2000-01-01T00:00:00Z", "resumed": []})
    assert environment.differs(here, here | {"jax": "0.1"})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"backend": "cpu", "device": "cpu", "cpu": "EPYC", "cores": 2}, "EPYC, 2 cores"),
        ({"backend": "gpu", "device": "NVIDIA H200", "devices": 1}, "NVIDIA H200"),
        ({"backend": "tpu", "device": "TPU v5e", "devices": 8}, "8 × TPU v5e"),
        ({"backend": "gpu", "device": "A", "resumed": [{"device": "A"}, {"device": "B"}]}, "A, then B"),
        ({}, "unknown device"),
    ],
)
def test_the_device_in_words(found, words):
    assert environment.describe_device(found) == words
