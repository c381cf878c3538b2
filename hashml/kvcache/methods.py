"""Caches by name: a policy, a codec, a budget.

    full   streaming@256   h2o@0.2   scissorhands@0.2+int4   coupled:8c8b   kivi:2   snapkv@128+think:0.4

A name is a policy, a codec, or both joined by ``+``, the policy first; ``:`` gives an option. Windows, sinks and the
rotation of keys are those of each paper, scaled to the budget:

    full                                        everything                       (the default policy)
    streaming                                   4 first tokens, or the sinks asked for, and a window
    tova  snapkv  pyramidkv  adakv  keyformer  random  keynorm
    h2o[:normalised]                            sums of attention[, divided by the queries that saw the token]
    scissorhands[:per_query | :release]         low scores counted[, divided likewise; | the released code]
    corm[:budgeted]                             drops what nobody votes for[, or only when it is full]
    dense  int8  fp8  int4[:GROUP]  int2[:GROUP]                                 (dense: the default codec)
    kivi:BITS[rRESIDUAL]                        RESIDUAL exact newest tokens, a multiple of its blocks of 32
    kvquant:BITS[oOUTLIERS][fFIRST][n]          outliers of a token, exact first tokens, Q-Norm: kvquant:2o1f1n
    coupled:CcBb                                C channels share a code of B bits
    think:DROPPED                               a part of the key channels goes; alone, or beside another codec

``@`` is the budget, the tokens that a policy keeps, window and sinks among them: a whole number, or a part of the
capacity with a point in it, ``@0.2``, which is also the default where the least possible is not more. It is an upper
bound: more than the capacity keeps everything; less than window, sinks and the blocks of a codec need is refused,
with the least that is possible. Codecs in blocks round down. CORM and the released Scissorhands drop what they like,
and their budget is what they have at most.

Budgets are of the whole sequence. SnapKV, PyramidKV and AdaKV choose among the prompt's tokens, and those that are
generated later push out the worst of these, in all three alike; a layer that is put together by hand may have room
for them (`LayerSpec.prompt_slots`, `AdaKV.later`).
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from hashml.kvcache.ada_kv import AdaKV, ada_pages
from hashml.kvcache.contract import Codec, Policy
from hashml.kvcache.controls import KeyNorm, RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.exact_first import ExactFirst
from hashml.kvcache.full import KeepAll
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.integer import Float8, Int8, IntGroup
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import kvquant
from hashml.kvcache.pyramid import pyramid_layers
from hashml.kvcache.scissorhands import Scissorhands, ScissorhandsRelease
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.think import ThinK
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig

POLICIES = ("full", "streaming", "h2o", "tova", "snapkv", "pyramidkv", "adakv", "scissorhands", "keyformer", "corm",
            "random", "keynorm")  # fmt: skip
OPTIONS = {"h2o": ("normalised",), "scissorhands": ("per_query", "release"), "corm": ("budgeted",)}
"""What may follow a policy's name."""
CODECS = ("dense", "int8", "fp8", "int4", "int2", "kivi", "kvquant", "coupled", "think")
BUDGET = 0.2
"""Part of the capacity that a policy keeps where its name says nothing."""
_PAGE = 8
_GROUP = 32
"""Tokens or channels that share a scale where a name says nothing."""
_STREAMING_SINKS = 4


def cache_layers(
    name: str, config: DecoderConfig, capacity: int, *, sinks: int = 0, dtype: str = "float32"
) -> tuple[LayerSpec, ...]:
    """The layers of a cache.

    Args:
        name: as in the module's docstring.
        config: of the decoder.
        capacity: tokens of a row, prompt and generated ones.
        sinks: first tokens that a policy must not drop; streaming has 4 at least, and ``kvquant:...f`` as many as it
            keeps exact.
        dtype: of exact tokens.

    Raises:
        ValueError: for a name that is not understood, a combination that cannot be, or a budget that is too small.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; it must be at least 1 token")
    if sinks < 0:
        raise ValueError(f"sinks is {sinks}; it must be at least 0")
    asked = _parse(name)
    policy = asked.policy
    codecs = _codecs(asked, config)
    grain = max(codecs.keys.granularity, codecs.values.granularity)
    sinks = max(sinks, codecs.keys.needs_sinks, _STREAMING_SINKS if policy == "streaming" else 0)

    def split(kept: int) -> tuple[int, int] | None:
        return _split(asked, kept, sinks, grain, codecs.residual)

    if policy == "full":
        kept = capacity
        exact = all(isinstance(codec, Dense) for codec in (codecs.keys, codecs.values))
        # Exact codecs need no window; others keep a few newest tokens exact.
        window = 0 if exact else min(32, max(1, capacity // 4))
        window = codecs.residual or (window if grain == 1 else max(grain, window // grain * grain))
        # After a flush the window holds ``grain - 1`` tokens less, and a prompt's last block may have holes.
        needed = max(0, kept - window) + (0 if grain == 1 else 2 * grain - 1)
        slots = -(-max(needed, sinks + (window == 0), 1) // grain) * grain
    else:
        kept = _tokens(asked, capacity, split, sinks, grain)
        parts = split(kept)
        assert parts is not None, "the budget was found to be enough"
        window, slots = parts
    base = LayerSpec(
        kv_heads=config.kv_heads,
        query_heads=config.heads,
        head_dim=config.head_dim,
        slots=slots,
        window=window,
        flush=grain,
        sinks=sinks,
        key_codec=codecs.keys,
        value_codec=codecs.values,
        policy=_policy(asked, kept, capacity, slots),
        rotary=config.rotary,
        rope="none" if config.rotary is None else "slot" if policy == "streaming" else codecs.rope,  # pyright: ignore[reportArgumentType]
        sliding_window=config.sliding_window,
        dtype=dtype,
    )
    if policy == "pyramidkv":
        return pyramid_layers(base, config.layers)
    if policy == "adakv":
        base = _shared(base, _queries(kept))
    return (base,) * config.layers


def _shared(base: LayerSpec, queries: int) -> LayerSpec:
    """Twice the mean for a head that needs it; pages of the pool are only as many as the mean."""
    page, slots = math.lcm(_PAGE, base.granularity), base.slots
    policy = AdaKV(queries=queries, base=slots)
    pages = ada_pages(
        base.kv_heads, slots, policy.later, page,
        floor=policy.floor, least=max(base.sinks, base.flush, 1), granularity=base.granularity,
    )  # fmt: skip
    return dataclasses.replace(base, policy=policy, slots=-(-2 * slots // page) * page, page_size=page, pages=pages)


# --- the name -------------------------------------------------------------------------------------


class _Asked(NamedTuple):
    """What a name says."""

    name: str
    policy: str
    option: str
    budget: str | None
    codec: tuple[str, str]
    dropped: str | None


def _parse(name: str) -> _Asked:
    policy, policy_option, budget, codec, dropped = "full", "", None, None, None
    for place, part in enumerate(name.split("+")):
        found = re.fullmatch(r"([a-z0-9]+)(?::([^@]+))?(?:@([0-9.]+))?", part)
        if not found or found[1] not in (*POLICIES, *CODECS):
            raise ValueError(f"cache is {name!r}; {part!r} is none of the policies {', '.join(POLICIES)}, or codecs "
                             f"{', '.join(CODECS)}, with :OPTION or @TOKENS")  # fmt: skip
        kind, option, tokens = found[1], found[2] or "", found[3]
        if kind in POLICIES:
            if place:
                raise ValueError(f"cache is {name!r}; a policy stands first, and {kind!r} does not")
            if option and option not in OPTIONS.get(kind, ()):
                allowed = " or ".join(f":{x}" for x in OPTIONS[kind]) if kind in OPTIONS else "none"
                raise ValueError(f"cache is {name!r}; the option of {kind!r} is {option!r}; allowed is {allowed}, "
                                 f"and @TOKENS for a budget")  # fmt: skip
            policy, policy_option, budget = kind, option, tokens
        elif tokens:
            raise ValueError(f"cache is {name!r}; @TOKENS belongs to a policy, and {kind!r} is a codec")
        elif kind == "think":
            if dropped is not None:
                raise ValueError(f"cache is {name!r}; 'think' is there twice, and channels are dropped once")
            dropped = option or "0.4"
        else:
            if codec is not None:
                raise ValueError(f"cache is {name!r}; {codec[0]!r} and {kind!r} are two codecs, and there is one, "
                                 f"beside which there may be 'think'")  # fmt: skip
            codec = (kind, option)
    if budget is not None and policy == "full":
        raise ValueError(f"cache is {name!r}; 'full' keeps all tokens and has no @TOKENS")
    return _Asked(name, policy, policy_option, budget, codec or ("dense", ""), dropped)


# --- the budget -----------------------------------------------------------------------------------


def _split(asked: _Asked, kept: int, sinks: int, grain: int, residual: int | None) -> tuple[int, int] | None:
    """Window and main slots of ``kept`` tokens at most; None where they are too few."""
    few = max(1, min(10, kept // 4))
    match asked.policy:
        case "streaming":  # main slots for the sinks alone
            slots = -(-sinks // grain) * grain
            window = (kept - slots) // grain * grain
            return (window, slots) if window >= grain else None
        case "h2o" | "corm":
            window = kept // 2
        case "tova":
            window = 1
        case "snapkv" | "pyramidkv" | "adakv":
            window = _queries(kept)
        case "keyformer":
            window = max(1, round(0.3 * kept))
        case "scissorhands" if asked.option == "release":
            window = max(1, min(11, kept // 2))  # the newest 10, and the current one
        case _:
            window = few
    window = residual or max(grain, window // grain * grain)
    slots = (kept - window) // grain * grain
    return (window, slots) if slots >= max(sinks, grain) else None


def _queries(kept: int) -> int:
    """SnapKV's queries that choose, and its window."""
    return max(1, min(32, kept // 4))


def _tokens(
    asked: _Asked, capacity: int, split: Callable[[int], tuple[int, int] | None], sinks: int, grain: int
) -> int:
    """Tokens that are kept."""
    name, budget = asked.name, asked.budget

    def enough(tokens: int) -> int:
        """The least budget from ``tokens`` on that can be."""
        return next(kept for kept in itertools.count(tokens) if split(kept) is not None)

    if budget is None:
        return enough(round(BUDGET * capacity))
    if budget.count(".") > 1 or budget == ".":
        raise ValueError(f"cache is {name!r}; {budget!r} is no number of tokens")
    value = float(budget)
    if value > 1 and value != int(value):
        raise ValueError(f"cache is {name!r}; a number of tokens is whole, and a part of the capacity at most 1, "
                         f"which {budget} is not")  # fmt: skip
    tokens = round(value * capacity) if value <= 1 and "." in budget else int(value)
    # Where nothing has to be dropped a little more than the capacity does no harm.
    kept = enough(min(tokens, capacity))
    if kept > tokens:
        needs = ["its window", *[f"{sinks} sinks"] * (sinks > 0), *[f"blocks of {grain}"] * (grain > 1)]
        raise ValueError(f"cache is {name!r}; it keeps {tokens} of {capacity} tokens, and must keep at least {kept} "
                         f"for {' and '.join(needs)}")  # fmt: skip
    return kept


def _policy(asked: _Asked, kept: int, capacity: int, slots: int) -> Policy:
    match asked.policy:
        case "full":
            return KeepAll()
        case "streaming":
            return Streaming()
        case "h2o":
            return HeavyHitters(normalise=asked.option == "normalised")
        case "tova":
            return TOVA()
        case "snapkv" | "pyramidkv" | "adakv":
            return SnapKV(queries=_queries(kept))
        case "scissorhands" if asked.option == "release":
            return ScissorhandsRelease(queries=min(100, kept), start=min(100, kept))
        case "scissorhands":
            # A history as long as the cache makes the counter grow with age, and the policy a window.
            history, drop = min(400, max(8, kept // 3)), min(max(1, kept // 4), slots)
            return Scissorhands(queries=history, drop=drop, per_query=asked.option == "per_query")
        case "keyformer":
            return Keyformer(new_tokens=max(1, capacity - kept))
        case "corm":
            return Corm(queries=max(1, kept // 2), budgeted=asked.option == "budgeted")
        case "random":
            return RandomEviction()
        case _:
            return KeyNorm()


# --- the codec ------------------------------------------------------------------------------------


class _Codecs(NamedTuple):
    """Codecs of keys and values, where keys are rotated, and the window that a codec's name asks for."""

    keys: Codec
    values: Codec
    rope: str
    residual: int | None


def _codecs(asked: _Asked, config: DecoderConfig) -> _Codecs:
    (kind, option), width = asked.codec, config.head_dim
    found = _codec(kind, option, width)
    if asked.dropped is None:
        return found
    dropped = _number("think", asked.dropped, float)
    # Keys are stored raw, and rotated by rank or position when they are read.
    tied = found.rope == "read" or (asked.policy == "streaming" and config.rotary is not None)
    pairs = "half" if config.rotary is None else config.rotary.pairs
    first = found.keys.first if isinstance(found.keys, ExactFirst) else 0
    inner = found.keys.inner if isinstance(found.keys, ExactFirst) else found.keys
    thin = ThinK(inner, dropped, pair_tied=tied, pairs=pairs)
    if isinstance(inner, IntGroup):
        thin = _in_groups(thin, inner, width, given=bool(option))
    if dropped > 0 and thin.kept(width) >= width:
        raise ValueError(f"cache is {asked.name!r}; of {width} channels in groups of {thin.multiple_of}, think drops "
                         f"none: take a larger part or smaller groups")  # fmt: skip
    return found._replace(keys=ExactFirst(thin, first) if first else thin)


def _in_groups(thin: ThinK, inner: IntGroup, width: int, *, given: bool) -> ThinK:
    """Kept channels in whole groups: as many more as the group that was given asks for, or, where none was, up to a
    multiple of 8, as far as that still drops some, in the largest groups that divide them."""
    if given:
        return dataclasses.replace(thin, multiple_of=inner.group)
    for multiple in (8, 4, 2, 1):
        thin = dataclasses.replace(thin, multiple_of=multiple)
        if width % multiple == 0 and thin.kept(width) < width:
            break
    return dataclasses.replace(thin, inner=IntGroup(inner.bits, _group(thin.kept(width))))


def _group(width: int) -> int:
    """The largest divisor of a width that is not more than 32."""
    return max(group for group in range(1, min(_GROUP, width) + 1) if width % group == 0)


def _codec(kind: str, option: str, width: int) -> _Codecs:
    match kind:
        case "dense" | "int8" | "fp8" if option:
            raise ValueError(f"cache has {kind}:{option}; {kind} has no option")
        case "dense":
            return _Codecs(Dense(), Dense(), "write", None)
        case "int8":
            return _Codecs(Int8(), Int8(), "write", None)
        case "fp8":
            return _Codecs(Float8(), Float8(), "write", None)
        case "int4" | "int2":
            codec = IntGroup(int(kind[3:]), _number(kind, option, int) if option else _group(width))
            return _Codecs(codec, codec, "write", None)
        case "kivi":
            return _kivi(option or "2", width)
        case "kvquant":
            found = re.fullmatch(r"(\d+)(?:o(\d+))?(?:f(\d+))?(n)?", option or "3")
            if found is None:
                raise ValueError(f"cache has kvquant:{option}; the option must be a number of bits, and after it "
                                 f"oOUTLIERS, fFIRST and n, as in 3o1f1n")  # fmt: skip
            outliers, first = int(found[2] or 0), int(found[3] or 0)
            return _Codecs(*kvquant(int(found[1]), outliers, first=first, q_norm=found[4] is not None), "read", None)
        case _:
            codec = Coupled.named(option or "8c8b")
            return _Codecs(codec, codec, "read", None)


def _kivi(option: str, width: int) -> _Codecs:
    found = re.fullmatch(r"(\d+)(?:r(\d+))?", option)
    if found is None:
        raise ValueError(f"cache has kivi:{option}; the option must be a number of bits, and rRESIDUAL after it")
    keys = KiviKeys(int(found[1]), min(_GROUP, width))
    residual = None if found[2] is None else int(found[2])
    if residual is not None and (residual < keys.group or residual % keys.group):
        raise ValueError(f"cache has kivi:{option}; its residual of {residual} must be a multiple of {keys.group}, "
                         f"the tokens of a block")  # fmt: skip
    return _Codecs(keys, IntGroup(keys.bits, _group(width)), "write", residual)


def _number(kind: str, text: str, form: Callable[[str], Any]) -> Any:
    try:
        return form(text)
    except ValueError:
        raise ValueError(f"cache has {kind}:{text}; the option must be a number") from None
