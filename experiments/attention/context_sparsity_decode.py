"""Sparse decoding as `experiments.attention.context_sparsity` scores it: several budgets in one program.

The first tokens are a prompt, which is read densely; every later token, the question included, is decoded with sparse
reads by `hashml.attention.cached`: set-up B of the papers. At a sparsity of x a query that sees n tokens reads n / x,
rounded up: the first so many entries of its list, since lists begin with what is always read and go on by score.
Budgets are rows of one batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key

from experiments.kvcache import fixtures
from hashml.attention.cached import SparseReads, sparse_decode_step, sparse_prefill
from hashml.attention.selection_controls import StreamingMask
from hashml.attention.selector_contract import Gqa, Index, Rows, Selector
from hashml.attention.sparse_decode import Selection
from hashml.kvcache import CacheSpec, Codec, Dense, KeepAll, LayerSpec, LayerTables
from hashml.models.decoder import DecoderConfig, DecoderModel, Params, decoder_model, forward

AnyArray = Array | np.ndarray
SINKS, WINDOW = 1, 2
"""Tokens that are always read: as large a part of 256 tokens as the papers' 128 and 128 are of 32 K, or more."""


@dataclasses.dataclass(frozen=True)
class Recency(StreamingMask):
    """The last tokens, as a ranking: a slot is worth its place, so that lists are those of a window of any size."""

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        slots = index.fixed["shape"].shape[2]
        return super().scores(index, q) + jnp.arange(slots, dtype=jnp.float32)

    select = Selector.select


@dataclasses.dataclass(frozen=True, eq=False)
class Budgeted(Selector):
    """Another selector's lists, cut to a part of what a query sees; that part comes with what it learned.

    Attributes:
        selector: whose lists begin with what is always read.
        sampled: whether the other entries are uniform draws, each of which counts for as many tokens.
        read: entries that each selection of a trace reads, mean over heads, ``[B]``; the caller empties it.
    """

    selector: Selector
    sampled: bool = False
    read: list[Array] = dataclasses.field(default_factory=list)

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        own, share = learned
        index = self.selector.build(keys, values, positions, key=key, learned=own)
        return Index(index.slots, {"own": index.fixed, "share": share})

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        own = self.selector.append(Index(index.slots, index.fixed["own"]), keys, values, at)
        return Index(own.slots, index.fixed)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        return self.selector.scores(Index(index.slots, index.fixed["own"]), q)

    def select(
        self,
        index: Index,
        q: Float[Array, "B H D"],
        positions: Int32[Array, "B P N"],
        query_pos: Int32[Array, " B"],
        *,
        sinks: int,
        window: int,
        heavy: int,
        gqa: Gqa = "head",
        key: Key[Array, ""] | None = None,
        rows: Rows | None = None,
    ) -> Selection:
        own = Index(index.slots, index.fixed["own"])
        size = {"sinks": sinks, "window": window, "heavy": heavy}
        idx, valid, weight = self.selector.select(own, q, positions, query_pos, **size, gqa=gqa, key=key, rows=rows)
        room = budget_of(index.fixed["share"], query_pos)[:, None, None]
        place = jnp.arange(idx.shape[2])
        valid = valid & (place < room)
        if self.sampled:
            always = sinks + window
            drawn = jnp.maximum(room - always, 1)
            others = (query_pos + 1 - always)[:, None, None]
            weight = jnp.where(place < always, 1.0, jnp.broadcast_to(jnp.maximum(others / drawn, 1.0), idx.shape))
        self.read.append(valid.sum(axis=2).mean(axis=1))
        return Selection(idx, valid, weight)


def budget_of(share: Float[AnyArray, " B"], query_pos: Int[AnyArray, " B"]) -> Int32[Array, " B"]:
    """Tokens that a query reads of ``query_pos + 1``: the part ``share`` of them, rounded up."""
    # Half a thousandth less: 1/5 of 130 is 26, however it is rounded on the way.
    return jnp.ceil(jnp.asarray(share) * (jnp.asarray(query_pos) + 1) - 5e-4).astype(jnp.int32)


class Decoded(NamedTuple):
    """Of the tokens after the prompt.

    Attributes:
        nll: negative log-likelihood of the targets in nats, 0 where there is none.
        correct: whether the target is the likeliest token.
        read: tokens that a query reads, mean over heads and layers.
    """

    nll: Float[Array, "B t"]
    correct: Bool[Array, "B t"]
    read: Float[Array, "B t"]


@functools.partial(jax.jit, static_argnames=("model", "spec", "selector", "sampled", "heavy", "prompt"))
def sparse_decoded(
    model: DecoderModel,
    spec: CacheSpec,
    tables: Sequence[LayerTables],
    selector: Selector,
    params: Params,
    learned: Sequence[Any],
    share: Float[AnyArray, " B"],
    tokens: Int[AnyArray, "B T"],
    targets: Int[AnyArray, "B T"],
    key: Array,
    *,
    heavy: int,
    prompt: int,
    sampled: bool = False,
) -> Decoded:
    """Scores of sequences that are fed, whatever was said.

    Args:
        model, params: the decoder.
        spec, tables: of the cache, which drops nothing.
        selector: who names tokens; ``learned`` is what it has learned for each layer.
        share: part of the tokens seen that a row's queries read.
        tokens, targets: of rows without padding; -1 for no target.
        key: of planes and draws.
        heavy: entries of a list beside sinks and window.
        prompt: tokens that are read densely.
        sampled: as `Budgeted`.
    """
    budgeted = Budgeted(selector, sampled)
    reads = SparseReads(budgeted, heavy, sinks=SINKS, window=WINDOW)
    tokens, targets, share = jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(share, jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), (tokens.shape[0], prompt))
    known = [(own, share) for own in learned]
    _, state = sparse_prefill(
        model, spec, tables, reads, params, tokens[:, :prompt], positions, key, learned=known
    )  # fmt: skip

    def step(state: Any, given: tuple[Array, Array]) -> tuple[Any, tuple[Array, Array, Array]]:
        token, target = given
        budgeted.read.clear()
        logits, state = sparse_decode_step(model, spec, tables, reads, params, state, token)
        read = jnp.stack(budgeted.read).mean(axis=0)
        said = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(target, 0)[:, None], axis=1)[:, 0]
        return state, (jnp.where(target >= 0, -said, 0.0), logits.argmax(axis=1) == target, read)

    _, found = jax.lax.scan(step, state, (tokens[:, prompt:].T, targets[:, prompt:].T))
    budgeted.read.clear()
    return Decoded(*(x.T for x in found))


@functools.partial(jax.jit, static_argnames=("config", "prompt"))
def dense_decoded(
    config: DecoderConfig, params: Params, tokens: Int[AnyArray, "B T"], targets: Int[AnyArray, "B T"], *, prompt: int
) -> tuple[Float[Array, "B t"], Bool[Array, "B t"]]:
    """``(nll, correct)`` of exact attention, which reads all."""
    logits = forward(params, config, jnp.asarray(tokens))[:, prompt:]
    wanted = jnp.asarray(targets)[:, prompt:]
    said = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(wanted, 0)[..., None], axis=2)[..., 0]
    return jnp.where(wanted >= 0, -said, 0.0), logits.argmax(axis=2) == wanted


class Fed(NamedTuple):
    """What is decoded: tokens and targets, the length of the prompt, and which targets count."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    prompt: int
    counted: Bool[np.ndarray, "B t"]


def fed(size: fixtures.Size, fixture: str, seed: int) -> Fed:
    """The sequences of a fixture: of a language model the second half counts, of recall the final questions."""
    tokens, targets, places = fixtures.texts(size, fixture, seed if fixture == "stories" else 0)
    prompt = fixtures.setting(size, fixture, "prompt").prompt
    counted = places["accuracy"] if places else targets >= 0
    return Fed(tokens, targets, prompt, counted[:, prompt:])


def layers_of(size: fixtures.Size, fixture: str, codecs: tuple[Codec, Codec] | None = None) -> tuple[LayerSpec, ...]:
    """Layers that keep all tokens, without a window of exact ones: in float32, or behind codecs."""
    common = fixtures.setting(size, fixture, "prompt")
    decoder = common.decoder
    keys, values = codecs or (Dense(), Dense())
    layer = LayerSpec(
        kv_heads=decoder.kv_heads,
        query_heads=decoder.heads,
        head_dim=decoder.head_dim,
        slots=common.tokens,
        window=0,
        key_codec=keys,
        value_codec=values,
        policy=KeepAll(),
        rotary=decoder.rotary,
        rope="none" if decoder.rotary is None else "write",
        sliding_window=decoder.sliding_window,
        dtype="float32",
    )
    return (layer,) * decoder.layers


def decoded(
    size: fixtures.Size,
    fixture: str,
    seed: int,
    selector: Selector,
    shares: Sequence[float],
    *,
    learned: Sequence[Any] | None = None,
    heavy: int | None = None,
    sampled: bool = False,
    codecs: tuple[Codec, Codec] | None = None,
) -> list[dict[str, float]]:
    """What a selector scores on the model of a seed at each share: ``nll`` and ``accuracy`` of what counts, those of
    exact attention, tokens read and seen.

    Args:
        size, fixture, seed: of the model and its sequences.
        selector, sampled: as `sparse_decoded`.
        shares: parts of the tokens seen that are read.
        learned: for each layer; of the selector.
        heavy: length of lists beside sinks and window; ``None``: as the largest share needs.
        codecs: of keys and values; they learn nothing.
    """
    own = fed(size, fixture, seed)
    rows, length = own.tokens.shape
    layers = layers_of(size, fixture, codecs)
    params = fixtures.params(size, fixture, seed)
    needed = int(budget_of(np.array([max(shares)]), np.array([length - 1]))[0])
    heavy = max(needed - SINKS - WINDOW, 1) if heavy is None else heavy
    config = fixtures.setting(size, fixture, "prompt").decoder
    found = sparse_decoded(
        decoder_model(config),
        CacheSpec(layers, rows * len(shares)),
        (LayerTables(),) * len(layers),
        selector,
        params,
        (None,) * len(layers) if learned is None else tuple(learned),
        np.repeat(np.asarray(shares, np.float32), rows),
        np.tile(own.tokens, (len(shares), 1)),
        np.tile(own.targets, (len(shares), 1)),
        jax.random.key(seed),
        heavy=heavy,
        prompt=own.prompt,
        sampled=sampled,
    )
    exact_nll, exact_correct = map(np.asarray, exact_of(size, fixture, seed))
    seen = float(np.arange(own.prompt, length).mean() + 1)
    scored = []
    for nll, correct, read in zip(*(np.asarray(x).reshape(len(shares), rows, -1) for x in found), strict=True):
        scored.append(
            {
                "nll": float(nll[own.counted].mean()),
                "exact_nll": float(exact_nll[own.counted].mean()),
                "accuracy": float(correct[own.counted].mean()),
                "exact_accuracy": float(exact_correct[own.counted].mean()),
                "tokens_read": float(read.mean()),
                "tokens_seen": seen,
            }
        )
    return scored


@functools.lru_cache(maxsize=16)
def exact_of(size: fixtures.Size, fixture: str, seed: int) -> tuple[Array, Array]:
    """`dense_decoded` of a fixture's model."""
    own = fed(size, fixture, seed)
    config = fixtures.setting(size, fixture, "prompt").decoder
    return dense_decoded(config, fixtures.params(size, fixture, seed), own.tokens, own.targets, prompt=own.prompt)
