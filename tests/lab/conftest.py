"""Throwaway packages of experiments, made of the source of one small experiment."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

COIN = '''"""A biased coin shows more heads than a fair one, at `every` bias in (0.5, 1] & < always >."""

import dataclasses
import time

import numpy as np

from experiments.lab import Claim, Trial, new_figure, paired_difference

PAPER = "Bernoulli | Ars <Conjectandi>, 1713"
SYSTEM = "hashml.sharing"


@dataclasses.dataclass(frozen=True)
class Config:
    biases: tuple[float, ...] = (0.6, 0.8)
    """Chance of heads."""
    throws: int = 200
    seeds: int = 5
    """Seeds that both coins share."""
    pause: float = 0.0
    fair_first: bool = False

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be positive, got {self.seeds}")


SCALES = {"tiny": Config(throws=10, seeds=2), "default": Config()}


def count(config):
    return 2 * len(config.biases) * config.seeds


def run(config):
    for bias in config.biases:
        for seed in range(config.seeds):
            for coin, chance in {"biased": bias, "fair": 0.5}.items():
                yield Trial({"method": coin, "bias": bias, "seed": seed}, lambda: throw(config, chance, seed))


def throw(config, chance, seed):
    time.sleep(config.pause)
    heads = np.random.default_rng(seed).random(config.throws) < chance
    return {"heads": heads.mean(), "odds": float("inf") if heads.all() else heads.sum() / (~heads).sum()}


def gain(rows):
    return paired_difference(rows, "biased", "fair", "heads", on=["bias", "seed"])


CLAIMS = (
    Claim("more", "More heads | with a bias <b>", "60% *", gain, lambda m: m.low > 0, unit="heads"),
    Claim("fewer", "Fewer heads with a bias", "never", gain, lambda m: m.high < 0, source="chapter 4"),
)


def figure(rows):
    figure, (axes,) = new_figure()
    for (coin,), part in rows.group_by("method", maintain_order=True):
        axes.plot(part["bias"], part["heads"], label=coin)
    axes.set(xlabel="bias", ylabel="heads")
    axes.legend()
    return figure
'''
"""An experiment of 20 rows, or 8 at scale tiny; text in it has to be escaped wherever it is shown."""

MakePackage = Callable[..., str]

_numbers = itertools.count()


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePackage]:
    """``make_package({"family/module.py": source, ...})`` returns the name of an importable package.

    It lies in the folder ``tmp_path``.
    """
    made: list[str] = []

    def make(files: dict[str, str]) -> str:
        name = f"toy_experiments_{next(_numbers)}"
        for file, source in {"__init__.py": "", **files}.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.joinpath("__init__.py").touch()
            path.write_text(source)
        made.append(name)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for module in [m for m in sys.modules if m.split(".")[0] in made]:
        del sys.modules[module]


@pytest.fixture
def coin_source() -> str:
    """The source of that experiment."""
    return COIN


@pytest.fixture
def coin_package(make_package: MakePackage) -> str:
    """A package whose one experiment is ``games.coin``."""
    return make_package({"games/coin.py": COIN})
