"""What `experiments.attention.socket` ranks, and how well: rankings by name, made-up keys, trained heads."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from experiments.attention.context_sparsity_decode import SINKS, WINDOW, Recency
from experiments.kvcache import fixtures
from hashml.attention.double_sparsity import DoubleSparsity
from hashml.attention.oracle import OracleTopK
from hashml.attention.quest import Quest
from hashml.attention.selection_controls import StreamingMask
from hashml.attention.selector_contract import Selector, index_bits
from hashml.attention.socket import AsymmetricSRP, HammingLSH, HardLSH, SimHashIndex, Socket
from hashml.models.decoder import DecoderModel, Params, decoder_model
from hashml.models.exact_attention import causal_attention

TABLES, BITS, WIDTH = 60, 8, 128
"""The paper's index, for heads of this width."""
SHAPES = ((240, 2), (120, 4), (80, 6), (48, 10), (40, 12))
"""Other tables of 480 bits in all. Codes are stored in bytes: 240 of them, 120, 80, and two each of the last."""
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Beside the paper's .3."""
SCORES: dict[str, type[SimHashIndex]] = {
    "socket": Socket,
    "hard": HardLSH,
    "hamming": HammingLSH,
    "asymmetric": AsymmetricSRP,
}
"""Ways to score the same index."""


@dataclasses.dataclass(frozen=True)
class Chance(StreamingMask):
    """Scores that know nothing."""

    def scores(self, index: Any, q: Float[Array, "B H D"]) -> Float[Array, "B K J N"]:
        return jax.random.uniform(jax.random.key(0), super().scores(index, q).shape)


def ranking(name: str, tables: int, width: int) -> Selector:
    """A ranking: ``socket``, ``hard``, ``hamming`` and ``asymmetric`` with lengths of values in the score, and with
    ``-plain`` without; ``socket-plain:0.1`` of another temperature, ``socket-plain:120x4`` of other tables,
    ``hard-plain:4`` of so many times the tables; with ``-centred`` without lengths, and keys less their mean.

    Raises:
        ValueError: for another name.
    """
    score, _, option = name.partition(":")
    kind, _, how = score.partition("-")
    if kind in SCORES and how in ("", "plain", "centred"):
        options: dict[str, Any] = {"tables": tables, "bits": BITS}
        options |= {"value_norm_power": 0} if how else {}
        options |= {"center": "prefill_mean"} if how == "centred" else {}
        if "x" in option:
            options |= dict(zip(("tables", "bits"), map(int, option.split("x")), strict=True))
        elif option and kind == "socket":
            options["temperature"] = float(option)
        elif option:
            options["tables"] = tables * int(option)
        return SCORES[kind](**options)
    others: dict[str, Selector] = {
        "oracle": OracleTopK(),
        "random": Chance(),
        "streaming": Recency(),
        "int2": DoubleSparsity(width, bits=2),
        "int4": DoubleSparsity(width),
    }
    if name in others:
        return others[name]
    if kind == "quest" and option.isdigit():
        return Quest(page_size=int(option))
    raise ValueError(f"name is {name!r}; allowed are {', '.join((*SCORES, *others))} and quest:PAGE")


def tables_of(width: int) -> int:
    """As many bits for each coordinate as 60 tables of 8 are for 128; at least 2 tables."""
    return max(2, round(TABLES * width / WIDTH))


def synthetic_rankings() -> tuple[str, ...]:
    """Of made-up keys."""
    by_score = [f"{name}{how}" for name in SCORES for how in ("", "-plain", "-centred")]
    temperatures = [f"socket{how}:{tau:g}" for how in ("", "-plain") for tau in TEMPERATURES]
    shapes = [f"socket-plain:{tables}x{bits}" for tables, bits in SHAPES]
    return (*by_score, *temperatures, *shapes, "hard-plain:4", "quest:4", "int2", "int4", "random")


def head_rankings() -> tuple[str, ...]:
    """Of trained heads."""
    by_score = [f"{name}{how}" for name in SCORES for how in ("", "-plain", "-centred")]
    temperatures = [f"socket-plain:{tau:g}" for tau in TEMPERATURES]
    return ("oracle", *by_score, *temperatures, "hard-plain:4", "quest:8", "int2", "int4", "streaming", "random")


class Heads(NamedTuple):
    """Queries and the keys and values that they meet; a query at position t sees keys 0 to t."""

    q: Float[Array, "B H T D"]
    k: Float[Array, "B K N D"]
    v: Float[Array, "B K N D"]
    query_pos: Int[Array, " T"]


class Quality(NamedTuple):
    """How good a ranking is, at each share of the keys that is read; means over queries, heads and rows.

    Attributes:
        recall: part of the tokens of largest ``weight |v|`` that is among those read; sinks and window do not count,
            and where they are all that is read it is 0.
        recall_logits: part of those of largest logit.
        mass: attention on what is read.
        error: of the output, relative.
        correlation: of ranks, the score's and the logit's; the same for all shares.
    """

    recall: Float[Array, " shares"]
    recall_logits: Float[Array, " shares"]
    mass: Float[Array, " shares"]
    error: Float[Array, " shares"]
    correlation: Float[Array, " shares"]


@functools.partial(jax.jit, static_argnames=("selector", "shares", "sinks", "window"))
def quality(
    selector: Selector, heads: Heads, key: Key[Array, ""], *, shares: tuple[float, ...], sinks: int, window: int
) -> Quality:
    """Of a selector's scores, over exact attention."""
    q, k, v, query_pos = heads
    rows, count, queries, width = q.shape
    kv_heads, slots = k.shape[1:3]
    places = jnp.arange(slots, dtype=jnp.int32)
    positions = jnp.broadcast_to(places, (rows, 1, slots))
    channels = jnp.broadcast_to(jnp.arange(width), (kv_heads, width))
    learned = channels if isinstance(selector, DoubleSparsity) else None
    index = selector.build(k, v, positions, key=key, learned=learned)
    # All queries of a head stand beside each other, as the query heads of a group do.
    scores = selector.scores(index, q.reshape(rows, count * queries, width)).reshape(rows, count, queries, slots)
    wide_k, wide_v = (jnp.repeat(x, count // kv_heads, axis=1) for x in (k, v))
    logits = jnp.einsum("bhtd,bhnd->bhtn", q, wide_k) / math.sqrt(width)
    seen = places <= query_pos[:, None]
    always = seen & ((places < sinks) | (places > query_pos[:, None] - window))
    others = seen & ~always
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    exact = jnp.einsum("bhtn,bhnd->bhtd", weights, wide_v)

    def ranks(worth: Array) -> Array:
        """0 for the best; what is always read comes first, what is not seen last."""
        worth = jnp.where(always, jnp.inf, jnp.where(seen, worth, -jnp.inf))
        return jnp.argsort(jnp.argsort(-worth, axis=-1), axis=-1)

    mine = ranks(scores)
    by_logit = ranks(logits)
    by_weight = ranks(weights * jnp.linalg.norm(wide_v, axis=-1)[:, :, None])

    def at(share: float) -> tuple[Array, ...]:
        room = jnp.ceil(share * (query_pos + 1) - 5e-4).astype(jnp.int32)[:, None]
        read = (mine < room) & seen
        optional = read & others
        own = jnp.maximum(optional.sum(axis=-1), 1)
        recalls = [((optional & (best < room)).sum(axis=-1) / own).mean() for best in (by_weight, by_logit)]
        kept = jnp.where(read, weights, 0.0)
        mass = kept.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhtn,bhnd->bhtd", kept / mass, wide_v)
        error = jnp.linalg.norm(out - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
        return *recalls, mass.mean(), error.mean()

    recall, recall_logits, mass, error = (jnp.stack(column) for column in zip(*map(at, shares), strict=True))
    return Quality(recall, recall_logits, mass, error, jnp.full(len(shares), _correlation(mine, by_logit, others)))


def _correlation(a: Array, b: Array, among: Array) -> Float[Array, ""]:
    """Pearson's, of ranks, over the tokens that are neither sinks nor window; mean over queries."""
    number = among.sum(axis=-1, keepdims=True)

    def centred(ranks: Array) -> Array:
        ranks = jnp.where(among, ranks.astype(jnp.float32), 0.0)
        return jnp.where(among, ranks - ranks.sum(axis=-1, keepdims=True) / number, 0.0)

    a, b = centred(a), centred(b)
    return (jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1))).mean()


# --- made-up keys ---------------------------------------------------------------------------------------

SETUPS = ("gaussian", "clustered", "offset")
CENTRES, NOISE, OFFSET, NORM_SPREAD = 64, 0.5, 3.0, 0.5


def made_up(key: Key[Array, ""], setup: str, *, queries: int, tokens: int, width: int) -> Heads:
    """One head whose queries see all keys: independent normal keys, keys around 64 centres with queries around the
    same ones, or normal keys with a common part that is 3 deviations long in each coordinate. Lengths of values are
    log-normal with deviation .5."""
    of_keys, of_queries, of_values, of_norms, of_centres, of_places = jax.random.split(key, 6)
    k, q = (jax.random.normal(draw, (1, 1, n, width)) for draw, n in ((of_keys, tokens), (of_queries, queries)))
    if setup == "clustered":
        centres = jax.random.normal(of_centres, (CENTRES, width))
        places = jax.random.randint(of_places, (tokens + queries,), 0, CENTRES)
        k, q = centres[places[:tokens]] + NOISE * k, centres[places[tokens:]] + NOISE * q
    elif setup == "offset":
        k = k + OFFSET * jax.random.normal(of_centres, (width,))
    v = jax.random.normal(of_values, (1, 1, tokens, width))
    norms = jnp.exp(NORM_SPREAD * jax.random.normal(of_norms, (1, 1, tokens, 1)))
    return Heads(q, k, norms * v / jnp.linalg.norm(v, axis=-1, keepdims=True), jnp.full(queries, tokens - 1))


# --- heads of trained models ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def _seen(model: DecoderModel, params: Params, tokens: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
    """Rotated queries and keys, and values, of all layers in exact attention, ``[L, B, H, T, D]``."""
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def body(x: Array, index: Array) -> tuple[Array, Any]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            out = causal_attention(q, k, v, positions, rotary=config.rotary, sliding_window=config.sliding_window)
            turn = config.rotary.rotate if config.rotary is not None else lambda y, _: y
            return out, (*(turn(y, positions[:, None]) for y in (q, k)), v)

        x, _, found = model.layer(model.layer_params(params, index), x, None, attend)
        return x, found

    return jax.lax.scan(body, model.embed(params, tokens), jnp.arange(config.layers))[1]


@functools.lru_cache(maxsize=4)
def trained_heads(size: fixtures.Size, fixture: str, seed: int) -> Heads:
    """Queries of the last quarter of held-out text, or a recall model's last 16 tokens; layers are rows."""
    common = fixtures.setting(size, fixture, "prompt")
    tokens, _, _ = fixtures.texts(size, fixture, seed if fixture == "stories" else 0)
    params = fixtures.params(size, fixture, seed)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in _seen(decoder_model(common.decoder), params, jnp.asarray(tokens)))
    first = common.prompt if fixture == "recall" else common.tokens * 3 // 4
    return Heads(q[:, :, first:], k, v, jnp.arange(first, common.tokens))


def head_quality(
    size: fixtures.Size, fixture: str, seed: int, name: str, shares: tuple[float, ...]
) -> tuple[Quality, float]:
    """Of a ranking on the heads of a trained model, and its bits of index a token; planes are those of the seed, the
    same in all layers."""
    heads = trained_heads(size, fixture, seed)
    width = heads.q.shape[-1]
    selector = ranking(name, tables_of(width), width)
    found = quality(selector, heads, jax.random.key(seed), shares=shares, sinks=SINKS, window=WINDOW)
    return found, bits_of(selector, width)


def bits_of(selector: Selector, width: int) -> float:
    """Bits of index that are stored for a token of one key head, over keys in float16."""
    slots = 240
    keys = jnp.zeros((1, 1, slots, width), jnp.float16)
    learned = jnp.arange(width)[None] if isinstance(selector, DoubleSparsity) else None
    positions = jnp.arange(slots, dtype=jnp.int32)[None, None]
    index = jax.eval_shape(lambda: selector.build(keys, keys, positions, key=jax.random.key(0), learned=learned))
    return index_bits(index, 1, 1, slots)
