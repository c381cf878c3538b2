"""The cells of `experiments.kvcache.frontier`: which cache, of which size, on which model, and what it scores."""

import dataclasses
import functools

from experiments.kvcache import fixtures
from experiments.kvcache.contenders import contender
from experiments.kvcache.fixtures import DEFAULT, Size


@dataclasses.dataclass(frozen=True)
class Config:
    """Models, budgets and contenders; the defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall", "stories")
    """f1, f1_relu_gqa (grouped queries), recall, stories."""
    budgets: tuple[int, ...] = (2, 4, 8)
    """Bytes of the exact cache over those of a policy."""
    recall_budgets: tuple[int, ...] = (2, 3, 4, 8)
    together_budgets: tuple[int, ...] = (2, 4)
    """Of compositions, and of compressed prompts."""
    policies: tuple[str, ...] = ("window", "streaming", "random", "keynorm", "tova", "h2o", "keyformer", "corm",
                                 "scissorhands", "scissorhands_1")  # fmt: skip
    codecs: tuple[str, ...] = ("int8", "fp8", "int4", "int2", "kivi:4", "kivi:2", "kvquant:3", "coupled:2c8b",
                               "coupled:4c8b", "coupled:8c8b")  # fmt: skip
    together: tuple[str, ...] = ("scissorhands+int4", "h2o+coupled:4c8b")
    prompt: tuple[str, ...] = ("window", "random", "h2o", "snapkv", "pyramidkv", "adakv", "snapkv+think:0.4")
    """Policies of compressed prompts, beside which the exact cache and ThinK alone are shown."""
    seeds: int = 3
    """Of each model, or of its stories."""
    size: Size = DEFAULT


@dataclasses.dataclass(frozen=True)
class Cell:
    """One contender: which model, how the cache is filled, what it is, and how large."""

    fixture: str
    protocol: fixtures.Protocol
    method: str
    budget: int | None


def cells(config: Config) -> list[Cell]:
    """All contenders."""
    found = []
    for fixture in config.models:
        budgets = config.recall_budgets if fixture == "recall" else config.budgets
        decode = [("full", None), *((name, None) for name in config.codecs)]
        decode += [(name, budget) for name in config.policies for budget in budgets]
        decode += [(name, budget) for name in config.together for budget in config.together_budgets]
        prompt: list[tuple[str, int | None]] = [("full", None), ("think:0.4", None)]
        prompt += [(name, budget) for name in config.prompt for budget in config.together_budgets]
        found += [Cell(fixture, "decode", method, budget) for method, budget in decode]
        found += [Cell(fixture, "prompt", method, budget) for method, budget in prompt]
    return found


@functools.lru_cache(maxsize=4)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All seeds of a contender, which share a program."""
    common = fixtures.setting(config.size, cell.fixture, cell.protocol)
    layers = contender(cell.method, common, cell.budget)
    return fixtures.scores(config.size, cell.fixture, cell.protocol, layers, config.seeds)
