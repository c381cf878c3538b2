"""The caches that are compared, at equal bytes: by name, with the window and the sinks that all share.

A name is a policy, a codec or both, ``h2o``, ``int4``, ``scissorhands+int4``, as `hashml.kvcache.methods` has them;
this adds ``window`` (the protected first tokens and the newest ones), ``scissorhands_1`` (one token leaves at a
time, not half of them) and the fairness rule. A budget of 4 is a quarter of the *bytes* of the exact cache: a
policy gets the slots that fit into them together with its positions and its own memory of votes or sums. With a
codec behind it, it keeps as many tokens as without, in fewer bytes. All share the exact window and the first tokens
that never leave, except where these are the method: StreamingLLM, and KIVI, whose blocks gather in its window.

In the protocol ``prompt`` a budget is of the prompt, and all have room beyond it for the tokens that follow, since
SnapKV never drops these.
"""

import bisect
import dataclasses
from collections.abc import Callable

from experiments.kvcache.harness import row_bytes
from hashml.kvcache.ada_kv import AdaKV, ada_pages
from hashml.kvcache.contract import Policy
from hashml.kvcache.controls import KeyNorm, RandomEviction
from hashml.kvcache.corm import Corm
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.methods import CODECS, cache_layers
from hashml.kvcache.pyramid import pyramid_budgets
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.tova import TOVA
from hashml.models.decoder import DecoderConfig, decoder_model

STREAMING_SINKS = 4
_PAGE = 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders share.

    Attributes:
        decoder: the model.
        tokens: of a sequence, T.
        window: exact newest tokens, R.
        sinks: first tokens that never leave.
        queries: last queries whose votes count, w, in Scissorhands and CORM.
        prompt: tokens that are compressed at once; 0 for decoding from nothing.
        dtype: of exact tokens.
    """

    decoder: DecoderConfig
    tokens: int
    window: int
    sinks: int = 1
    queries: int = 64
    prompt: int = 0
    dtype: str = "float16"


POLICIES: dict[str, Callable[[Setting], Policy]] = {
    "window": lambda setting: Streaming(),
    "streaming": lambda setting: Streaming(),
    "random": lambda setting: RandomEviction(),
    "keynorm": lambda setting: KeyNorm(),
    "tova": lambda setting: TOVA(),
    "h2o": lambda setting: HeavyHitters(),
    "keyformer": lambda setting: Keyformer(new_tokens=setting.tokens),
    "corm": lambda setting: Corm(queries=setting.queries, budgeted=True),
    "scissorhands": lambda setting: Scissorhands(queries=setting.queries),
    "scissorhands_1": lambda setting: Scissorhands(queries=setting.queries, drop=1),
    "snapkv": lambda setting: SnapKV(queries=setting.window),
    "pyramidkv": lambda setting: SnapKV(queries=setting.window),
    "adakv": lambda setting: AdaKV(queries=setting.window, base=1),
}
"""Policies that drop tokens."""


def contender(name: str, setting: Setting, budget: int | None = None) -> tuple[LayerSpec, ...]:
    """The layers of a contender.

    Args:
        name: a policy of `POLICIES`, a codec, or both joined by ``+``; ``full`` is the exact cache.
        setting: what all share.
        budget: bytes of the exact cache over those of the policy; None for what keeps all tokens.

    Raises:
        ValueError: for an unknown name, a budget where there is nothing to drop or none where there is, or one that
            leaves no room beside window and sinks.
    """
    policy, _, codec = name.partition("+")
    if policy not in POLICIES:
        policy, codec = "full", name if name != "full" else ""
    if codec and codec.partition(":")[0] not in CODECS:
        raise ValueError(
            f"name is {name!r}; policies are full, {', '.join(POLICIES)}, and codecs {', '.join(CODECS)}"
        )
    if (budget is None) != (policy == "full"):
        raise ValueError(f"name is {name!r} and budget {budget}; a budget goes with a policy that drops tokens")
    if budget is None:
        return _full(codec, setting, setting.tokens)
    chosen = _evicting(policy, setting, budget)
    coded = _full(codec, setting, setting.tokens)[0]
    return tuple(
        dataclasses.replace(
            layer, key_codec=coded.key_codec, value_codec=coded.value_codec,
            rope=layer.rope if layer.rope == "slot" else coded.rope
        )
        for layer in chosen
    )  # fmt: skip


def _full(codec: str, setting: Setting, tokens: int) -> tuple[LayerSpec, ...]:
    """All of ``tokens``, behind a codec or exact."""
    found = cache_layers(
        "full" + (f"+{codec}" if codec else ""), setting.decoder, tokens, sinks=0, dtype=setting.dtype
    )
    grain = found[0].flush  # where blocks share scales, the window is where a block gathers
    window = min(setting.window, tokens - 1) if grain == 1 else grain
    slots = -(-max(tokens - window, 1) // grain) * grain
    return tuple(dataclasses.replace(layer, window=window, slots=slots) for layer in found)


def _evicting(policy: str, setting: Setting, budget: int) -> tuple[LayerSpec, ...]:
    """Layers whose policy drops tokens, exact codecs, within the bytes of the budget."""
    model, count = decoder_model(setting.decoder), setting.decoder.layers
    seen = setting.prompt or setting.tokens
    whole = _full("", setting, seen)
    room = setting.tokens - seen
    allowed = row_bytes(model, whole).total / budget
    base = dataclasses.replace(whole[0], policy=POLICIES[policy](setting), sinks=setting.sinks, flush=1)
    if policy in ("pyramidkv", "adakv"):
        base = dataclasses.replace(base, policy=POLICIES["snapkv"](setting))
    if policy == "streaming":
        sinks = max(STREAMING_SINKS, setting.sinks)
        base = dataclasses.replace(base, slots=sinks, sinks=sinks, window=1, rope="slot" if base.rotary else "none")
        return _largest(lambda size: (dataclasses.replace(base, window=size),) * count, setting, allowed)
    layers = _largest(lambda size: (dataclasses.replace(base, slots=size),) * count, setting, allowed)
    slots = layers[0].slots
    if policy == "adakv":
        return _ada(layers[0], setting, slots, room)
    kept = pyramid_budgets(count, slots, least=max(1, setting.sinks)) if policy == "pyramidkv" else (slots,) * count
    return tuple(
        dataclasses.replace(layer, slots=size + room, prompt_slots=size if setting.prompt else None)
        for layer, size in zip(layers, kept, strict=True)
    )


def _largest(
    make: Callable[[int], tuple[LayerSpec, ...]], setting: Setting, allowed: float | int
) -> tuple[LayerSpec, ...]:
    """The layers of the largest size that take at most the allowed bytes."""
    model, least = decoder_model(setting.decoder), max(1, setting.sinks)
    sizes = range(least, 2 * setting.tokens + 1)
    fitting = bisect.bisect_right(sizes, allowed, key=lambda size: row_bytes(model, make(size)).total)
    if fitting:
        return make(sizes[fitting - 1])
    raise ValueError(f"window is {setting.window} and sinks {setting.sinks}; with one slot beside them the cache has "
                     f"more than the {allowed:.0f} bytes of its budget")  # fmt: skip


def _ada(base: LayerSpec, setting: Setting, mean: int, room: int) -> tuple[LayerSpec, ...]:
    """AdaKV in as many bytes as ``mean`` slots a head and ``room`` for later tokens would take, in a pool of pages
    that the heads share."""
    model, count = decoder_model(setting.decoder), setting.decoder.layers
    allowed = row_bytes(model, (dataclasses.replace(base, slots=mean + room),) * count).total

    def make(size: int) -> tuple[LayerSpec, ...]:
        shared = AdaKV(queries=setting.window, base=size, later=room)
        # Twice the mean for a head that needs it.
        most = -(-(2 * size + room) // _PAGE) * _PAGE
        pages = ada_pages(base.kv_heads, size, room, _PAGE)
        return (dataclasses.replace(base, policy=shared, slots=most, page_size=_PAGE, pages=pages),) * count

    return _largest(make, setting, allowed)
