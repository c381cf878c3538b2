"""The cells of `experiments.kvcache.think`: which channels of the keys go, from which cache, and what is lost."""

import bisect
import dataclasses
import functools
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.kvcache import fixtures
from experiments.kvcache.contenders import contender
from experiments.kvcache.fixtures import DEFAULT, Size
from experiments.kvcache.harness import row_bytes
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.think import ThinK
from hashml.models.decoder import DecoderModel, Params, decoder_model
from hashml.models.exact_attention import causal_attention

AnyArray = Array | np.ndarray
Choice = Literal["queries", "keys", "random"]
QUERIES = 32
"""Last queries of a prompt that choose, as the library's prefill hands them to a codec."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Parts that are dropped, and what from; the defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "recall")
    dropped: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6)
    """Part of the key channels, lambda."""
    choices: tuple[Choice, ...] = ("queries", "keys", "random")
    """What chooses channels: queries and keys (ThinK), norms of keys alone, nothing."""
    quantised: tuple[str, ...] = ("int4", "kivi:2")
    """Codes of keys and values with which dropping .4 is put together, on language models."""
    budgets: tuple[int, ...] = (2, 4)
    """Bytes of the exact prompt over those of SnapKV, with and without ThinK."""
    seeds: int = 3
    """Of each model."""
    size: Size = DEFAULT


TOGETHER = 0.4
"""Part that is dropped in compositions, the paper's default."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cache after a prompt: ``dropped`` and ``choice`` are of ThinK, ``budget`` of SnapKV."""

    fixture: str
    method: str
    choice: Choice | None
    dropped: float | None
    budget: int | None


def cells(config: Config) -> list[Cell]:
    """All caches."""
    found = []
    for fixture in config.models:
        found.append(Cell(fixture, "full", None, None, None))
        found += [Cell(fixture, "think", choice, part, None) for choice in config.choices for part in config.dropped]
        pairs: list[tuple[str, int | None]] = [("snapkv", budget) for budget in config.budgets]
        if fixture != "recall":
            pairs += [(name, None) for name in config.quantised]
        for name, budget in pairs:
            found.append(Cell(fixture, name, None, None, budget))
            found.append(Cell(fixture, f"{name}+think", "queries", TOGETHER, budget))
    return found


# --- what chooses the channels ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KeyNormChannels(ThinK):
    """A control: the channels where the keys are largest, whatever the queries."""

    def fit(
        self, fixed: dict[str, Array], keys: Array, queries: Array, valid: tuple[Array, Array]
    ) -> dict[str, Array]:
        return super().fit(fixed, keys, jnp.ones_like(queries), valid)


@dataclasses.dataclass(frozen=True)
class RandomChannels(ThinK):
    """A control: channels drawn for each row and head, by ``seed``."""

    seed: int = 0

    def fit(
        self, fixed: dict[str, Array], keys: Array, queries: Array, valid: tuple[Array, Array]
    ) -> dict[str, Array]:
        batch, heads, _, width = keys.shape
        draws = jax.random.uniform(jax.random.key(self.seed), (batch, heads, 1, width))
        return super().fit(fixed, jnp.broadcast_to(draws, keys.shape), jnp.ones_like(queries), valid)


def thinner(layer: LayerSpec, choice: Choice, dropped: float, index: int) -> LayerSpec:
    """The layer without a part of its key channels; ``index`` is its place, of which random channels are drawn.

    Integers in groups of channels get one group of those that are kept, whose number no other need divide.
    """
    inner = layer.key_codec
    if isinstance(inner, IntGroup):
        inner = dataclasses.replace(inner, group=ThinK(inner, dropped).kept(layer.head_dim))
    if choice == "random":
        return dataclasses.replace(layer, key_codec=RandomChannels(inner, dropped, seed=index))
    return dataclasses.replace(layer, key_codec={"queries": ThinK, "keys": KeyNormChannels}[choice](inner, dropped))


# --- the caches ---------------------------------------------------------------------------------------


def layers_of(config: Config, cell: Cell) -> tuple[LayerSpec, ...]:
    """The layers of a cell; SnapKV with ThinK holds as many more of the prompt's tokens as fit into its bytes."""
    common = fixtures.setting(config.size, cell.fixture, "prompt")
    base = contender("full" if cell.method == "think" else cell.method.removesuffix("+think"), common, cell.budget)
    if cell.choice is None or cell.dropped is None:
        return base
    thin = tuple(thinner(layer, cell.choice, cell.dropped, index) for index, layer in enumerate(base))
    if cell.budget is None:
        return thin
    model = decoder_model(common.decoder)
    allowed, held = prompt_bytes(model, base), cast(int, base[0].prompt_slots)
    more = range(common.prompt - common.window - held + 1)  # beyond that there is nothing of the prompt left to hold
    fitting = bisect.bisect_right(more, allowed, key=lambda extra: prompt_bytes(model, _with_room(thin, extra)))
    return _with_room(thin, more[fitting - 1])


def _with_room(layers: tuple[LayerSpec, ...], more: int) -> tuple[LayerSpec, ...]:
    """With slots for more tokens of the prompt, and as many as before for those that follow."""
    return tuple(
        dataclasses.replace(layer, slots=layer.slots + more, prompt_slots=cast(int, layer.prompt_slots) + more)
        for layer in layers
    )


def prompt_bytes(model: DecoderModel, layers: tuple[LayerSpec, ...]) -> int:
    """All bytes of a row's cache of the prompt alone, without room for later tokens. They take less room in a thinner
    cache, too, which is not counted in its favour."""
    alone = tuple(
        dataclasses.replace(layer, slots=cast(int, layer.prompt_slots), prompt_slots=None) for layer in layers
    )
    return row_bytes(model, alone).total


@functools.lru_cache(maxsize=4)
def scores(config: Config, cell: Cell) -> list[dict[str, float | int | None]]:
    """All seeds of a cache, which share a program."""
    layers = layers_of(config, cell)
    found = fixtures.scores(config.size, cell.fixture, "prompt", layers, config.seeds)
    model = decoder_model(fixtures.setting(config.size, cell.fixture, "prompt").decoder)
    evicts = cell.budget is not None
    size = {"prompt_slots": layers[0].prompt_slots if evicts else None,
            "prompt_bytes": prompt_bytes(model, layers) if evicts else None}  # fmt: skip
    rows = []
    for seed, row in enumerate(found):
        error = logit_error(config.size, cell.fixture, seed, layers) if cell.method == "think" else None
        rows.append(row | size | {"logit_error": error})
    return rows


# --- logits of queries to come ------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What a model makes of a prompt and of the tokens behind it, rotated, in all layers.

    Attributes:
        keys: of the prompt's tokens that leave the window.
        queries: the prompt's last ones, J heads to each key head.
        shares: ``(Q^T Q) * (K^T K)`` of the queries that come after the prompt. Summed over the channels i and j of a
            set it is ``||Q_S K_S^T||_F^2``, what dropping the set does to the logits.
    """

    keys: Float[Array, "L B H N D"]
    queries: Float[Array, "L B H J W D"]
    shares: Float[np.ndarray, "L B H D D"]


@functools.partial(jax.jit, static_argnames="model")
def rotated(
    model: DecoderModel, params: Params, tokens: Int[AnyArray, "B T"]
) -> tuple[Float[Array, "L B Hq T D"], Float[Array, "L B H T D"]]:
    """Queries and keys of all layers as they meet, in exact causal attention."""
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def body(x: Array, index: Array) -> tuple[Array, Any]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            out = causal_attention(q, k, v, positions, rotary=config.rotary, sliding_window=config.sliding_window)
            turn = config.rotary.rotate if config.rotary is not None else lambda y, _: y
            return out, tuple(turn(y, positions[:, None]) for y in (q, k))

        x, _, seen = model.layer(model.layer_params(params, index), x, None, attend)
        return x, seen

    return jax.lax.scan(body, model.embed(params, jnp.asarray(tokens)), jnp.arange(config.layers))[1]


@functools.lru_cache(maxsize=4)
def held_out_prompt(size: Size, fixture: str, seed: int) -> Prompt:
    """Of the sequences that caches are scored on."""
    common = fixtures.setting(size, fixture, "prompt")
    tokens, _, _ = fixtures.texts(size, fixture)
    queries, keys = rotated(decoder_model(common.decoder), fixtures.params(size, fixture, seed), tokens)
    count, batch, heads, length, width = keys.shape
    queries = queries.reshape(count, batch, heads, -1, length, width)
    early = keys[:, :, :, : common.prompt - common.window]
    later = np.asarray(queries[..., common.prompt :, :], np.float64).reshape(count, batch, heads, -1, width)
    exact = np.asarray(early, np.float64)
    shares = (later.swapaxes(-1, -2) @ later) * (exact.swapaxes(-1, -2) @ exact)
    return Prompt(early, queries[..., max(0, common.prompt - QUERIES) : common.prompt, :], shares)


def logit_error(size: Size, fixture: str, seed: int, layers: tuple[LayerSpec, ...]) -> float:
    """``||Q K^T - Q_S K_S^T||_F / ||Q K^T||_F`` for queries after the prompt, S being the channels that the codecs of
    the layers' keys keep: the mean over rows, layers and heads."""
    prompt = held_out_prompt(size, fixture, seed)
    gone = np.stack([dropped_channels(layer, *parts) for layer, *parts in zip(layers, *prompt[:2], strict=True)])
    lost = np.einsum("lbhi,lbhij,lbhj->lbh", gone, prompt.shares, gone)
    return float(np.sqrt(np.maximum(lost, 0) / prompt.shares.sum(axis=(-1, -2))).mean())


def dropped_channels(
    layer: LayerSpec, keys: Float[Array, "B H N D"], queries: Float[Array, "B H J W D"]
) -> Float[np.ndarray, "B H D"]:
    """1 where a channel goes, 0 where it stays, as the layer's key codec decides."""
    codec = layer.key_codec
    batch, heads, count, width = keys.shape
    fixed = codec.init(batch, heads, 0, width, keys.dtype).fixed
    valid = jnp.ones((batch, heads, count), bool), jnp.ones((batch, queries.shape[3]), bool)
    kept = np.asarray(codec.fit(fixed, keys, queries, valid)["channels"], np.int64)
    gone = np.ones((batch, heads, width))
    np.put_along_axis(gone, kept, 0.0, axis=-1)
    return gone
