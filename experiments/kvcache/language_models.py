"""The language models that every experiment with a cache reads: small decoders of bytes, trained once and kept.

    python -m experiments.kvcache.language_models --which f1 --seed 0

trains a model (or finds it), and prints its held-out loss and a sample. ``f1`` has 4 layers of width 128, as many
key heads as query heads and a gated perceptron, 0.8 M parameters; ``f1_relu_gqa`` has 2 key heads and ReLU, for
grouped queries and sparse activations; ``recall`` is the model of `experiments.kvcache.recall`. Every sequence
begins with BOS, so that an attention sink can form.

Models lie in the user's cache, ``$XDG_CACHE_HOME/hashml/models`` or ``~/.cache/hashml/models``, as safetensors
with a checksum. A file's name holds a hash of everything that the training depends on, so that another recipe is
another file; a damaged file is refused and the model trained anew.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int

from experiments.data import language
from experiments.data.counter import stream
from hashml.exchange import ExchangeError, load_module, save_module
from hashml.models.decoder import DecoderConfig, Params, decoder_model, forward, init_params
from hashml.models.generation import generate
from hashml.models.training import Batch, LossFn, init_state, train_step

Progress = Callable[[int, int, float], None]
"""Told ``(steps done, steps in all, loss)`` after every step."""
Which = Literal["f1", "f1_relu_gqa", "recall"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a language model is trained by.

    Attributes:
        name: of the model, and of its file.
        decoder: sizes and choices; its context is the length of a training sequence.
        text: what it reads, see `experiments.data.language`.
        steps: of Adam.
        rows: sequences of a step.
        learning_rate: at its highest, after ``warmup`` steps; then half a cosine down to a tenth.
        warmup: steps.
    """

    name: str
    decoder: DecoderConfig
    text: language.Name = "wikitext2"
    steps: int = 360
    rows: int = 32
    learning_rate: float = 3e-3
    warmup: int = 40


F1 = Recipe(
    "f1",
    DecoderConfig(
        vocabulary=language.VOCABULARY,
        features=128,
        layers=4,
        heads=4,
        kv_heads=4,
        head_dim=32,
        hidden=344,
        context=256,
    ),
)
F1_RELU_GQA = Recipe(
    "f1_relu_gqa",
    dataclasses.replace(F1.decoder, kv_heads=2, hidden=512, activation="relu", gated=False),
)
RECIPES = {recipe.name: recipe for recipe in (F1, F1_RELU_GQA)}


def trained(recipe: Recipe, seed: int, progress: Progress | None = None) -> Params:
    """The parameters of a model: read from the user's cache, or trained now and kept there.

    Args:
        recipe: what it is trained by.
        seed: of the initialisation and of the batches.
        progress: told of every step; nothing is told where the model is found.
    """
    parts = language.splits(recipe.text)
    # The text is part of the recipe: the standard library's is another one in every Python.
    digest = hashlib.sha256(parts.train.tobytes()).hexdigest()
    return kept(recipe.name, dataclasses.asdict(recipe) | {"text_sha256": digest}, seed,
                lambda: _train(recipe, parts.train, seed, progress))  # fmt: skip


def _train(recipe: Recipe, text: np.ndarray, seed: int, progress: Progress | None) -> Params:
    config, batches = recipe.decoder, stream(seed, "language model", recipe.name)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(recipe.warmup, recipe.steps - 1), recipe.steps, recipe.learning_rate / 10
    )

    def batch(step: int) -> np.ndarray:
        return language.crops(text, config.context, recipe.rows, key=batches, step=step)

    params = init_params(jax.random.key(seed), config)
    return fit(params, lambda p, tokens: next_token_nll(p, config, tokens).mean(), batch, recipe.steps, schedule,
               progress)  # fmt: skip


def next_token_nll(
    params: Params, config: DecoderConfig, tokens: Int[Array | np.ndarray, "B T"]
) -> Float[Array, "B T-1"]:
    """Negative log-likelihood, in nats, of each token but the first."""
    tokens = jnp.asarray(tokens)
    logits = jax.nn.log_softmax(forward(params, config, tokens)[:, :-1])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]


def fit(
    params: Params,
    loss: LossFn,
    batch: Callable[[int], Batch],
    steps: int,
    learning_rate: optax.Schedule,
    progress: Progress | None = None,
) -> Params:
    """Parameters after ``steps`` steps of Adam, gradients being cut at norm 1.

    Args:
        params: at the start.
        loss: mean over a batch.
        batch: of each step.
        steps: at least 1.
        learning_rate: of each step.
        progress: told of every step.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    step = train_step(loss, optimizer, donate=True)
    state = init_state(params, optimizer)
    for done in range(1, steps + 1):
        state, value = step(state, batch(done - 1))
        if progress is not None:
            progress(done, steps, float(value))
    return state.params


# --- the user's cache -----------------------------------------------------------------------------


def folder() -> Path:
    """Where models are kept; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "hashml" / "models"


def file_of(name: str, geometry: Mapping[str, Any], seed: int) -> Path:
    """The file of a model."""
    text = json.dumps(geometry, sort_keys=True, default=str)
    return folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}-seed{seed}.safetensors"


def kept(name: str, geometry: Mapping[str, Any], seed: int, make: Callable[[], Params]) -> Params:
    """The model of a file, or what ``make`` makes, which is then written there.

    Args:
        name: begins the file's name.
        geometry: all that the model depends on beside its seed; JSON values.
        seed: of the model.
        make: trains it.
    """
    path, whole = file_of(name, geometry, seed), {"model": dict(geometry), "seed": seed}
    try:
        return load_module(path, geometry=whole)[0]
    except FileNotFoundError:
        pass
    except ExchangeError as error:
        warnings.warn(f"{error}; the model is trained anew", stacklevel=2)
    params = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_module(path, params, geometry=whole)
    return params


def tell(name: str, every: float | int = 10.0) -> Callable[..., None]:
    """A `Progress` that writes a line to the standard error at most every ``every`` seconds, and at the end; what has
    no loss leaves it out."""
    start = last = time.monotonic()

    def progress(done: int, steps: int, loss: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every or done == steps:
            last = now
            said = "" if loss is None else f"loss {loss:.3f}, "
            print(f"{name}: step {done}/{steps}, {said}{now - start:.0f} s", file=sys.stderr, flush=True)

    return progress


# --- the command ----------------------------------------------------------------------------------


def held_out_nll(recipe: Recipe, params: Params, *, sequences: int = 64) -> float:
    """Nats a byte on sequences of the test text."""
    tokens = language.sequences(language.splits(recipe.text).test, recipe.decoder.context, sequences)
    return float(next_token_nll(params, recipe.decoder, tokens).mean())


def main(which: Which = "f1", seed: int = 0) -> None:
    """Trains a model, or finds it, and says how good it is.

    Args:
        which: of the models.
        seed: of the initialisation and of the batches.
    """
    if which == "recall":
        from experiments.kvcache import recall

        params = recall.trained(recall.RECALL, seed, tell(f"recall, seed {seed}"))
        accuracies = recall.held_out_accuracy(recall.RECALL, params)
        print(f"held-out accuracy: {accuracies[0]:.4f} rehearsed, {accuracies[1]:.4f} unrehearsed")
        return
    recipe = RECIPES[which]
    params = trained(recipe, seed, tell(f"{which}, seed {seed}"))
    print(f"held-out loss: {held_out_nll(recipe, params):.4f} nats a byte")
    model = decoder_model(recipe.decoder)
    said = generate(model, params, [[language.BOS]], 200, temperature=0.8, key=jax.random.key(seed))[0]
    print(language.to_text(np.asarray(said, np.int32)))


if __name__ == "__main__":
    tyro.cli(main)
