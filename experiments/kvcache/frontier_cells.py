"""The cells of `experiments.kvcache.frontier`: which cache, of which size, on which model, and what it scores."""

import dataclasses
import functools
from collections.abc import Callable

from experiments.kvcache import fixtures, harness
from experiments.kvcache.contenders import POLICIES, contender
from experiments.kvcache.fixtures import DEFAULT, Protocol, Size, Trained
from experiments.lab import compare
from hashml.models.decoder import decoder_model

GROUPED = "f1_relu_gqa"
REPETITIONS = 7
"""Of a timing, after one that does not count."""


@dataclasses.dataclass(frozen=True)
class Config(Trained):
    """Models, budgets and contenders; the defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall", "stories")
    """Of f1, f1_relu_gqa (grouped queries), recall and stories, those on which all contenders are scored."""
    budgets: tuple[int, ...] = (2, 4, 8)
    """Bytes of the exact cache over those of a policy."""
    recall_budgets: tuple[int, ...] = (2, 3, 4, 8)
    together_budgets: tuple[int, ...] = (2, 4)
    """Of compositions, and of compressed prompts."""
    policies: tuple[str, ...] = ("window", "streaming", "random", "keynorm", "tova", "h2o", "keyformer", "corm",
                                 "scissorhands", "scissorhands_1")  # fmt: skip
    codecs: tuple[str, ...] = ("int8", "fp8", "int4", "int2", "kivi:4", "kivi:2", "kvquant:3", "coupled:2c8b",
                               "coupled:4c8b", "coupled:8c8b", "coupled:8c10b")  # fmt: skip
    together: tuple[str, ...] = ("scissorhands+int4", "h2o+coupled:4c8b", "window+coupled:8c8b",
                                 "random+coupled:8c8b", "h2o+coupled:8c8b",
                                 "scissorhands_1+coupled:8c8b")  # fmt: skip
    prompt: tuple[str, ...] = ("window", "random", "h2o", "snapkv", "pyramidkv", "adakv", "snapkv+think:0.4")
    """Policies of compressed prompts, beside which the exact cache and ThinK alone are shown."""
    grouped: tuple[str, ...] = ("kivi:4", "kivi:2", "coupled:2c8b", "coupled:8c8b", "window", "random", "h2o", "corm",
                                "scissorhands_1")  # fmt: skip
    """Caches of f1_relu_gqa, whose query heads share key heads in pairs; nothing where the model is one of
    ``models``."""
    timed: bool = True
    """Whether tokens a second are measured, each cache's in turns with the exact one's."""
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
    if config.grouped and GROUPED not in config.models:
        found.append(Cell(GROUPED, "decode", "full", None))
        for name in config.grouped:
            budgets = config.together_budgets if name in POLICIES else (None,)
            found += [Cell(GROUPED, "decode", name, budget) for budget in budgets]
    return found


@functools.lru_cache(maxsize=4)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All models of a contender, which share a program, and its speed, which is the same for all."""
    size, fixture, protocol = config.size, cell.fixture, cell.protocol
    common = fixtures.setting(size, fixture, protocol)
    layers = contender(cell.method, common, cell.budget)
    models = fixtures.fed_models(size, fixture, layers, config.trained(fixture))
    run = harness.compile_decode(decoder_model(common.decoder), layers, models[0], prompt=common.prompt)
    speed: dict[str, float | int | None] = dict.fromkeys(("tokens_per_second", "speed", "speed_low", "speed_high"))
    if config.timed:
        turns = {"cache": lambda: run(models[0]), "exact": _exact(size, fixture, protocol)}
        found = compare(turns, base="exact", repetitions=REPETITIONS, warmup=1)["cache"]
        said = models[0].tokens.shape[0] * (common.tokens - common.prompt)
        bounds = (found.ratio, found.ratio_high, found.ratio_low)  # of seconds
        speed |= {"tokens_per_second": said / found.seconds}
        speed |= dict(zip(("speed", "speed_low", "speed_high"), (1 / x for x in bounds), strict=True))
    return [
        fixtures.row_of(size, fixture, protocol, layers, seed, one, run(one)) | speed
        for seed, one in enumerate(models)
    ]


@functools.lru_cache(maxsize=2)
def _exact(size: Size, fixture: str, protocol: Protocol) -> Callable[[], harness.Scores]:
    """Decodes with the exact cache, on the model of the first seed."""
    common = fixtures.setting(size, fixture, protocol)
    layers = contender("full", common)
    (one,) = fixtures.fed_models(size, fixture, layers, 1)
    run = harness.compile_decode(decoder_model(common.decoder), layers, one, prompt=common.prompt)
    return lambda: run(one)
