"""The cells of `experiments.kvcache.retrieval`: its tasks, the caches that are put to them, and what these answer."""

import dataclasses
import functools
import hashlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int32

from experiments.data.counter import stream
from experiments.kvcache import counting, harness, recall
from experiments.kvcache.contenders import Setting, contender
from experiments.kvcache.language_models import kept, tell
from hashml.kvcache.calibration import calibrate_coupled
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables
from hashml.models.decoder import Params, decoder_model

Part = Literal["grid", "prompt", "aggregation"]
DEPTHS = 6
"""Parts of the places of pairs, the oldest first; both layouts divide evenly."""
OBSERVED = 8
"""Newest tokens of a prompt: SnapKV looks with them, and all keep them exact."""
ASKED_LAST = dataclasses.replace(recall.SHORT, rehearsal_places=(70, 76))
"""The four rehearsals are questions of the prompt's last tokens."""
PROMPT = ASKED_LAST.rehearsal_places[1] + 2
"""Tokens of a prompt: it ends with the blank of the last of these questions."""
CONDITIONS = ("aware", "agnostic")
"""Prompts that end with questions, and the same prompts with filler in their place."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Budgets are bytes of the exact cache over those of a policy; the defaults are those of the claims."""

    lengths: tuple[int, ...] = (96, 256)
    """Of the recall task: 8 pairs, and 16."""
    budgets: tuple[int, ...] = (2, 3, 4, 8)
    policies: tuple[str, ...] = ("window", "random", "h2o", "keyformer", "corm", "scissorhands_1")
    prompt_budgets: tuple[int, ...] = (2, 3, 4)
    """Of prompts that are compressed once; at 8 the window alone would be too large."""
    prompt_policies: tuple[str, ...] = ("window", "random", "h2o", "snapkv")
    aggregation_policies: tuple[str, ...] = ("window", "streaming", "random", "h2o", "keyformer", "corm",
                                             "scissorhands_1")  # fmt: skip
    codecs: tuple[str, ...] = ("coupled:8c8b",)
    """These keep all tokens, for comparison."""
    seeds: int = 5
    """Models of each task."""
    questions: int = 1024
    """Final questions of the recall task that every model is scored on."""
    aggregation_questions: int = 256
    """There a sequence has one."""
    calibration: int = 128
    """Sequences that codebooks are learned from."""
    lloyd: int = 10
    """Iterations of k-means."""
    steps: int | None = None
    """Of every training; None for those of the recipes."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cache and what it is put to; ``budget`` is None where all tokens stay."""

    part: Part
    length: int
    method: str
    budget: int | None


def cells(config: Config) -> list[Cell]:
    """All caches; every one is a program of its own."""
    found = []
    for length in config.lengths:
        found += [Cell("grid", length, method, None) for method in ("full", *config.codecs)]
        found += [Cell("grid", length, method, budget) for budget in config.budgets for method in config.policies]
    short = recall.SHORT.length
    found += [Cell("prompt", short, "full", None)]
    found += [
        Cell("prompt", short, method, budget) for budget in config.prompt_budgets for method in config.prompt_policies
    ]
    found += [Cell("aggregation", counting.LENGTH, method, None) for method in ("full", *config.codecs)]
    return found + [
        Cell("aggregation", counting.LENGTH, method, budget)
        for budget in config.budgets
        for method in config.aggregation_policies
    ]


# --- tasks --------------------------------------------------------------------------------------------


def layout_of(length: int) -> recall.Layout:
    """The layout of the recall task at this length.

    Raises:
        ValueError: for a length that no model is trained at.
    """
    layouts = {layout.length: layout for layout in (recall.SHORT, recall.LONG)}
    if length not in layouts:
        raise ValueError(f"length is {length}; the recall task has models for {', '.join(map(str, layouts))}")
    return layouts[length]


def recipe_of(config: Config, part: Part, length: int) -> recall.Recipe:
    """What the models of a task are trained by."""
    recipe = counting.COUNTING if part == "aggregation" else recall.RECALL
    if part != "aggregation" and layout_of(length) != recall.SHORT:
        recipe = recall.RECALL_LONG
    return recipe if config.steps is None else dataclasses.replace(recipe, steps=config.steps)


@functools.lru_cache(maxsize=16)
def params(config: Config, part: Part, length: int, seed: int) -> Params:
    """The parameters of a model, trained now where the user's cache has none; prompts have those of the grid."""
    recipe = recipe_of(config, part, length)
    if part == "aggregation":
        return counting.trained(recipe, seed, tell(f"training counting, seed {seed}"))
    progress = tell(f"training recall of {length} tokens, seed {seed}")
    return recall.trained(recipe, seed, progress, layout_of(length))


def setting(config: Config, cell: Cell) -> Setting:
    """What all caches of a part share. Windows, and queries whose votes count, are the same share of any length."""
    decoder, length = recipe_of(config, cell.part, cell.length).decoder, cell.length
    prompt = PROMPT if cell.part == "prompt" else 0
    return Setting(decoder, length, OBSERVED if prompt else length // 16, queries=length // 6, prompt=prompt)


class Task(NamedTuple):
    """Sequences that all models of a part are scored on.

    Attributes:
        condition: of `CONDITIONS`, or None.
        tokens, targets: as in `harness.teacher_forced`.
        places: of questions, by name.
    """

    condition: str | None
    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    places: dict[str, Bool[np.ndarray, "B T"]]


@functools.lru_cache(maxsize=4)
def tasks(config: Config, part: Part, length: int) -> tuple[Task, ...]:
    """The sequences of a part: one task, or one for each condition."""
    if part == "aggregation":
        tokens, targets = counting.held_out(config.aggregation_questions)
        return (Task(None, tokens, targets, {"accuracy": targets >= 0}),)
    layout = layout_of(length)
    if part == "grid":
        data = recall.held_out(config.questions // layout.pairs, layout)
        return (Task(None, data.tokens, data.targets, _asked(data) | _depths(data, layout)),)
    aware = recall.held_out(config.questions // ASKED_LAST.pairs, ASKED_LAST)
    filler = stream(0, "retrieval", "filler")
    agnostic = recall.without_rehearsals(aware, filler, ASKED_LAST)
    return tuple(
        Task(name, data.tokens, data.targets, _asked(data))
        for name, data in zip(CONDITIONS, (aware, agnostic), strict=True)
    )


def _asked(data: recall.Sequences) -> dict[str, np.ndarray]:
    return {"rehearsed": data.rehearsed, "unrehearsed": data.unrehearsed,
            "accuracy": data.rehearsed | data.unrehearsed}  # fmt: skip


def _depths(data: recall.Sequences, layout: recall.Layout) -> dict[str, np.ndarray]:
    """Final questions by what part of the places their pair stands in."""
    place = np.searchsorted(layout.places, recall.asked_pairs(data.tokens, data.targets))
    depth = place * DEPTHS // len(layout.places)
    return {
        f"{kind}_{part}": where & (depth == part - 1)
        for kind, where in (("rehearsed", data.rehearsed), ("unrehearsed", data.unrehearsed))
        for part in range(1, DEPTHS + 1)
    }


def last_place(length: int, depth: int) -> int:
    """Place of the last value of a part of the places, 1 to `DEPTHS`."""
    places = layout_of(length).places
    return int(places[depth * len(places) // DEPTHS - 1]) + 1


# --- codebooks ----------------------------------------------------------------------------------------


def calibration_text(config: Config, part: Part, length: int, seed: int) -> Int32[np.ndarray, "B T"]:
    """Sequences that codebooks are learned from; none of them is scored."""
    if part == "aggregation":
        return counting.sequences(config.calibration, stream(seed, "counting", "calibration"))[0]
    key = stream(seed, "recall", "calibration")
    return recall.sequences(config.calibration, key, layout=layout_of(length)).tokens


@functools.lru_cache(maxsize=16)
def tables(config: Config, part: Part, length: int, seed: int, layer: LayerSpec) -> tuple[LayerTables, ...]:
    """Codebooks of CQ, kept beside the models; nothing for codecs that learn nothing."""
    decoder = recipe_of(config, part, length).decoder
    codecs = (layer.key_codec, layer.value_codec)
    if not isinstance(codecs[0], Coupled):
        return (LayerTables(),) * decoder.layers
    text, trained = calibration_text(config, part, length, seed), params(config, part, length, seed)
    arguments: Any = (jax.random.key(seed), decoder_model(decoder), trained, [text], *codecs)

    def make() -> Params:
        progress = tell(f"codebooks of {codecs[0]}, {part} of {length} tokens, seed {seed}")
        found = calibrate_coupled(*arguments, iterations=config.lloyd, progress=progress)
        return {f"layer{i}": {"keys": one.keys, "values": one.values} for i, one in enumerate(found)}

    # They depend on the model to the last bit, however it came to be.
    model = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trained))).hexdigest()
    text_digest = hashlib.sha256(text.tobytes()).hexdigest()
    geometry = {"codecs": repr(codecs), "model": model, "iterations": config.lloyd, "text_sha256": text_digest}
    books = kept("retrieval-tables", geometry, seed, make)
    return tuple(LayerTables(**books[f"layer{i}"]) for i in range(decoder.layers))


# --- the measurement ----------------------------------------------------------------------------------

KINDS = ("rehearsed", "unrehearsed")
MEASURED = (*KINDS, "accuracy", *(f"{kind}_{part}" for kind in KINDS for part in range(1, DEPTHS + 1)))
"""Columns of shares of right answers."""

Row = dict[str, float | int | None]


@functools.lru_cache(maxsize=2)
def scores(config: Config, cell: Cell) -> dict[tuple[str | None, int], Row]:
    """What a cache answers, by condition and model; all share a program."""
    common = setting(config, cell)
    model, layers = decoder_model(common.decoder), contender(cell.method, common, cell.budget)
    each = [(task, seed) for task in tasks(config, cell.part, cell.length) for seed in range(config.seeds)]
    models = [
        harness.Model(
            params(config, cell.part, cell.length, seed),
            tables(config, cell.part, cell.length, seed, layers[0]),
            jax.random.key(seed),
            task.tokens,
            task.targets,
        )
        for task, seed in each
    ]
    used = harness.row_bytes(model, layers).total / common.tokens
    found = {}
    decoded = harness.decode_all(model, layers, models, prompt=common.prompt)
    for (task, seed), scored in zip(each, decoded, strict=True):
        correct, asked = np.asarray(scored.correct), task.places["accuracy"].any(axis=0)
        shares = {name: _share(correct, task.places.get(name)) for name in MEASURED}
        held = float(np.asarray(scored.kept)[asked].mean())
        found[task.condition, seed] = {**shares, "bytes_per_token": used, "tokens_kept": held}
    return found


def _share(correct: Bool[np.ndarray, "B T"], where: Bool[np.ndarray, "B T"] | None) -> float | None:
    """Share of right answers at these places; None where nothing is asked."""
    return float(correct[where].mean()) if where is not None and where.any() else None
