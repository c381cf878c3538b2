"""Caches by name: a policy, a codec, a budget.

    full   streaming@256   h2o@0.2   scissorhands@0.2+int4   coupled:8c8b   kivi:2   snapkv@128+think:0.4

A name is a policy, a codec, or both joined by ``+``; ``:`` gives an option, ``@`` the tokens that a policy keeps, as
a number or as a part of the capacity. Windows, sinks and the rotation of keys are those of each paper, scaled to the
budget:

    full                                   everything                            (the default policy)
    streaming  h2o  tova  snapkv  pyramidkv  adakv  scissorhands  keyformer  corm  random  keynorm
    dense  int8  fp8  int4[:group]  int2[:group]                                 (dense: the default codec)
    kivi:BITS   kvquant:BITS[oOUTLIERS]   coupled:CcBb   think:DROPPED
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from hashml.kvcache.ada_kv import AdaKV, ada_pages
from hashml.kvcache.calibration import Progress, calibrate_coupled, calibrate_nonuniform
from hashml.kvcache.contract import Codec, Policy
from hashml.kvcache.controls import KeyNorm, RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Float8, Int8, IntGroup
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.kivi import kivi
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues, kvquant
from hashml.kvcache.pyramid import pyramid_layers
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.state import LayerTables
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.think import ThinK
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig, DecoderModel

POLICIES = ("full", "streaming", "h2o", "tova", "snapkv", "pyramidkv", "adakv", "scissorhands", "keyformer", "corm",
            "random", "keynorm")  # fmt: skip
CODECS = ("dense", "int8", "fp8", "int4", "int2", "kivi", "kvquant", "coupled", "think")
BUDGET = 0.2
"""Part of the capacity that a policy keeps where its name says nothing."""
_PAGE = 8


def cache_layers(
    name: str, config: DecoderConfig, capacity: int, *, sinks: int = 0, dtype: str = "float32"
) -> tuple[LayerSpec, ...]:
    """The layers of a cache.

    Args:
        name: as in the module's docstring.
        config: of the decoder.
        capacity: tokens of a row, prompt and generated ones.
        sinks: first tokens that a policy must not drop; streaming has 4 at least.
        dtype: of exact tokens.

    Raises:
        ValueError: for a name that is not understood, or a combination that cannot be.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1 token")
    policy, codecs, budget = _parse(name)
    kept = capacity if policy == "full" else _tokens(name, budget, capacity)
    keys, values, rope = _codecs(codecs, config)
    grain = max(keys.granularity, values.granularity)
    rope = "none" if config.rotary is None else "slot" if policy == "streaming" else rope
    window, made, sinks = _policy(
        policy, kept, capacity, sinks, exact=all(isinstance(c, Dense) for c in (keys, values))
    )
    if grain > 1:
        window = max(grain, window // grain * grain)
    # After a flush the window holds ``grain - 1`` tokens less, and a prompt's last block may have holes.
    needed = max(0, kept - window) + (0 if grain == 1 else 2 * grain - 1)
    slots = max(grain, -(-needed // grain) * grain if policy == "full" else max(0, kept - window) // grain * grain)
    base = LayerSpec(
        kv_heads=config.kv_heads,
        query_heads=config.heads,
        head_dim=config.head_dim,
        slots=slots,
        window=window,
        flush=grain,
        sinks=min(sinks, slots),
        key_codec=keys,
        value_codec=values,
        policy=made,
        rotary=config.rotary,
        rope=rope,  # pyright: ignore[reportArgumentType]
        sliding_window=config.sliding_window,
        dtype=dtype,
    )
    if policy == "pyramidkv":
        return pyramid_layers(base, config.layers)
    if policy == "adakv":
        # Twice the mean for a head that needs it; pages of the pool are only as many as the mean.
        most = -(-2 * slots // _PAGE) * _PAGE
        pages = ada_pages(config.kv_heads, slots, 0, _PAGE)
        shared = AdaKV(queries=window, base=slots)
        base = dataclasses.replace(base, policy=shared, slots=most, page_size=_PAGE, pages=pages)
    return (base,) * config.layers


def _parse(name: str) -> tuple[str, list[tuple[str, str]], str | None]:
    policy, budget, codecs = "full", None, []
    for place, part in enumerate(name.split("+")):
        found = re.fullmatch(r"([a-z0-9]+)(?::([^@]+))?(?:@([0-9.]+))?", part)
        if not found or found[1] not in (*POLICIES, *CODECS):
            raise ValueError(f"cache is {name!r}; {part!r} is none of the policies {', '.join(POLICIES)}, or codecs "
                             f"{', '.join(CODECS)}, with :OPTION or @TOKENS")  # fmt: skip
        kind, option, tokens = found[1], found[2], found[3]
        if kind in POLICIES:
            if place or option:
                raise ValueError(f"cache is {name!r}; a policy stands first and has @TOKENS alone")
            policy, budget = kind, tokens
        elif tokens:
            raise ValueError(f"cache is {name!r}; @TOKENS belongs to a policy, and {kind!r} is a codec")
        else:
            codecs.append((kind, option or ""))
    if budget is not None and policy == "full":
        raise ValueError(f"cache is {name!r}; 'full' keeps all tokens and has no @TOKENS")
    return policy, codecs, budget


def _tokens(name: str, budget: str | None, capacity: int) -> int:
    try:
        value = BUDGET if budget is None else float(budget)
    except ValueError:
        value = 0.0
    tokens = round(value * capacity) if value <= 1 and (budget is None or "." in budget) else round(value)
    if budget is not None and tokens < 2:
        raise ValueError(f"cache is {name!r}; it keeps {tokens} of {capacity} tokens, and must keep at least 2")
    return min(max(tokens, 2), capacity)


def _policy(kind: str, kept: int, capacity: int, sinks: int, *, exact: bool) -> tuple[int, Policy, int]:
    """Window, policy and sinks in a budget of ``kept`` tokens."""
    few = max(1, min(10, kept // 4))
    match kind:
        case "full":
            # Exact codecs need no window; others keep a few newest tokens exact.
            return (0 if exact else min(32, max(1, capacity // 4))), KeepAll(), sinks
        case "streaming":
            sinks = min(max(sinks, 4), max(1, kept // 2))
            return kept - sinks, Streaming(), sinks
        case "h2o":
            return kept // 2, HeavyHitters(), sinks
        case "tova":
            return 1, TOVA(), sinks
        case "snapkv" | "pyramidkv" | "adakv":
            queries = max(1, min(32, kept // 4))
            if kind == "adakv":
                return queries, AdaKV(queries=queries, base=1), sinks
            return queries, SnapKV(queries=queries), sinks
        case "scissorhands":
            # A history as long as the cache makes the counter grow with age, and the policy a window.
            drop = min(max(1, kept // 4), kept - few)
            return few, Scissorhands(queries=min(400, max(8, kept // 3)), drop=drop), sinks
        case "keyformer":
            return max(1, round(0.3 * kept)), Keyformer(new_tokens=max(1, capacity - kept)), sinks
        case "corm":
            return kept // 2, Corm(queries=max(1, kept // 2)), sinks
        case "random":
            return few, RandomEviction(), sinks
        case _:
            return few, KeyNorm(), sinks


def _codecs(parts: Sequence[tuple[str, str]], config: DecoderConfig) -> tuple[Codec, Codec, str]:
    """Codecs of keys and values, and where keys are rotated."""
    keys: Codec = Dense()
    values: Codec = Dense()
    rope, dropped = "write", None
    for kind, option in parts:
        if kind == "think":
            dropped = _number(kind, option or "0.4", float)
            continue
        keys, values, reads = _codec(kind, option, config)
        rope = "read" if reads else "write"
    if dropped is not None:
        keys = ThinK(keys, dropped, pair_tied=rope == "read")
    return keys, values, rope


def _codec(kind: str, option: str, config: DecoderConfig) -> tuple[Codec, Codec, bool]:
    width = config.head_dim
    match kind:
        case "dense" | "int8" | "fp8" if option:
            raise ValueError(f"cache has {kind}:{option}; {kind} has no option")
        case "dense":
            return Dense(), Dense(), False
        case "int8":
            return Int8(), Int8(), False
        case "fp8":
            return Float8(), Float8(), False
        case "int4" | "int2":
            group = _number(kind, option or str(min(32, width)), int)
            codec = IntGroup(int(kind[3:]), group)
            return codec, codec, False
        case "kivi":
            return *kivi(_number(kind, option or "2", int), min(32, width)), False
        case "kvquant":
            bits, _, outliers = (option or "3").partition("o")
            return *kvquant(_number(kind, bits, int), _number(kind, outliers or "0", int)), True
        case _:
            codec = Coupled.named(option or "8c8b")
            return codec, codec, True


def _number(kind: str, text: str, form: Callable[[str], Any]) -> Any:
    try:
        return form(text)
    except ValueError:
        raise ValueError(f"cache has {kind}:{text}; the option must be a number") from None


def needs_tables(layers: Sequence[LayerSpec]) -> bool:
    """Whether codecs have to learn something first."""
    learning = (Coupled, NonUniformKeys, NonUniformValues)

    def learns(codec: Codec) -> bool:
        return isinstance(codec, learning) or (isinstance(codec, ThinK) and learns(codec.inner))

    return any(learns(codec) for layer in layers for codec in (layer.key_codec, layer.value_codec))


def learn_tables(
    layers: Sequence[LayerSpec],
    model: DecoderModel,
    params: Any,
    sequences: Iterable[Any],
    *,
    key: Array | None = None,
    progress: Progress | None = None,
) -> tuple[LayerTables, ...]:
    """What the codecs of layers learn from token sequences; nothing where they learn nothing.

    Args:
        layers: of one codec.
        model, params: the decoder.
        sequences: arrays of tokens ``[T]`` or ``[B, T]``; a few ten thousand tokens in all.
        key: of k-means.
        progress: called with what is done and all there is to do.
    """
    if not needs_tables(layers):
        return (LayerTables(),) * len(layers)
    key = jax.random.key(0) if key is None else key
    codec, values = layers[0].key_codec, layers[0].value_codec
    codec = codec.inner if isinstance(codec, ThinK) else codec
    if isinstance(codec, Coupled) and isinstance(values, Coupled):
        return calibrate_coupled(key, model, params, sequences, codec, values, progress=progress)
    if isinstance(codec, NonUniformKeys) and isinstance(values, NonUniformValues):
        return calibrate_nonuniform(key, model, params, sequences, codec, values, progress=progress)
    raise ValueError(f"codecs are {codec} and {values}; keys and values must be of one kind to learn together")
