"""The static description of a cache: frozen, hashable, checked when it is made."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from hashml.kvcache.contract import Codec, HeadBudgets, Policy
from hashml.models.rotary import Rotary

Rope = Literal["none", "write", "read", "slot"]
_OPTIONAL = ("prompt_slots", "sliding_window", "page_size", "pages")
_LEAST = {"kv_heads": 1, "query_heads": 1, "head_dim": 1, "slots": 0, "window": 0, "flush": 1, "sinks": 0,
          "prompt_slots": 0, "sliding_window": 1, "page_size": 1, "pages": 1}  # fmt: skip
"""The least that sizes can be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer's cache.

    Attributes:
        kv_heads, query_heads, head_dim: H, H J and D.
        slots: main slots C; 0 for a plain sliding window. Without a window, more than there are sinks.
        window: exact newest tokens R; 0 encodes a token at once.
        flush: tokens that leave the window together, G; ``window`` is a multiple of it.
        sinks: first tokens of a sequence that are never dropped, S.
        key_codec, value_codec, policy: see `hashml.kvcache.contract`.
        rotary: the rotation of queries and keys; None for models without.
        rope: ``"write"`` stores rotated keys, ``"read"`` stores raw keys and rotates them at their positions,
            ``"slot"`` rotates raw keys at their rank in the cache (StreamingLLM), ``"none"`` does neither.
        prompt_slots: main slots that a prompt fills at most; None: all. Those beyond are for later tokens, where a
            policy compresses the prompt alone (SnapKV).
        sliding_window: a query sees this many last positions at most, as its model was trained; None: all.
        heads_axis: axis of the ambient mesh (`jax.set_mesh`) over whose devices heads are spread. Compilers split all
            but the fused read of a large store, which has to be told; None: one device, or no fused read.
        gqa: how a policy sums up the query heads of a key head.
        dtype: of the window, and of dense stores; a name.
        page_size: tokens of a page; None for a layout in slots.
        pages: in the pool of all rows and heads; only with ``page_size``.

    Raises:
        ValueError: for sizes or combinations that cannot be; the message names them.
    """

    kv_heads: int
    query_heads: int
    head_dim: int
    slots: int
    window: int
    key_codec: Codec
    value_codec: Codec
    policy: Policy
    rotary: Rotary | None
    rope: Rope
    flush: int = 1
    sinks: int = 0
    prompt_slots: int | None = None
    sliding_window: int | None = None
    heads_axis: str | None = None
    gqa: Literal["mean", "max", "sum"] = "mean"
    dtype: str = "float32"
    page_size: int | None = None
    pages: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads is {self.query_heads}; it must be a multiple of kv_heads, {self.kv_heads}")
        if self.slots + self.window < 1:
            raise ValueError("slots and window are both 0; the cache must keep at least one token")
        if self.window % self.flush:
            raise ValueError(f"window is {self.window}; it must be a multiple of flush, {self.flush}")
        if 0 < self.slots < max(self.flush, self.sinks):
            raise ValueError(f"slots is {self.slots}; it must hold the {self.sinks} sinks, and the {self.flush} "
                             f"tokens that leave the window together")  # fmt: skip
        if self.sinks and not self.slots:
            raise ValueError(f"sinks is {self.sinks} and slots is 0; sinks lie in main slots")
        if not self.window and self.slots <= self.sinks:
            raise ValueError(f"window is 0 and slots is {self.slots}; with {self.sinks} sinks, which never leave, it "
                             f"must be more for the newest token to have a place")  # fmt: skip
        if self.prompt_slots is not None and not self.sinks <= self.prompt_slots <= self.slots:
            raise ValueError(f"prompt_slots is {self.prompt_slots}; it must be between sinks, {self.sinks}, and "
                             f"slots, {self.slots}")  # fmt: skip
        self._check_codecs()
        self._check_pages()
        if self.gqa not in ("mean", "max", "sum"):
            raise ValueError(f"gqa is {self.gqa!r}; it must be 'mean', 'max' or 'sum'")
        if not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise ValueError(f"dtype is {self.dtype!r}; it must be a float")
        self.policy.check(self)

    def _check_sizes(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name} is {value!r}; it must be an integer")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        for name in ("policy", "key_codec", "value_codec", "rotary"):
            value = getattr(self, name)
            if isinstance(value, type):
                raise ValueError(f"{name} is the class {value.__name__}; give an instance, {value.__name__}(...)")

    def _check_codecs(self) -> None:
        if self.rope not in ("none", "write", "read", "slot"):
            raise ValueError(f"rope is {self.rope!r}; it must be 'none', 'write', 'read' or 'slot'")
        if (self.rope == "none") != (self.rotary is None):
            raise ValueError(f"rope is {self.rope!r} and rotary is {self.rotary}; 'none' goes with None alone")
        if self.rope == "write" and self.key_codec.space == "pre_rope":
            raise ValueError(
                f"{self.key_codec} is for keys before rotation; rope must be 'read' or 'slot', not 'write'"
            )
        if self.rope in ("read", "slot") and self.key_codec.space == "post_rope":
            raise ValueError(f"{self.key_codec} is for keys after rotation; rope is {self.rope!r}, not 'write'")
        if self.value_codec.keys_only:
            raise ValueError(f"value_codec is {self.value_codec}; it is for keys alone")
        tied = self.key_codec.rotary_pairs
        if tied is not None and self.rotary is not None and tied != self.rotary.pairs:
            raise ValueError(f"key_codec is {self.key_codec}, which keeps {tied!r} pairs of channels together; "
                             f"rotary turns {self.rotary.pairs!r} ones")  # fmt: skip
        for codec in (self.key_codec, self.value_codec):
            codec.check(self.head_dim)
            if codec.needs_sinks > self.sinks:
                raise ValueError(f"sinks is {self.sinks}; it must be at least {codec.needs_sinks}, the first tokens "
                                 f"that {codec} keeps exact")  # fmt: skip
            if codec.needs_sinks and self.pages is not None:
                raise ValueError(f"pages is {self.pages}; {codec} keeps its first tokens in slots, and pages have no "
                                 f"first slot")  # fmt: skip
            if self.slots % codec.granularity:
                raise ValueError(f"slots is {self.slots}; it must be a multiple of {codec.granularity}, the tokens "
                                 f"that share a scale in {codec}")  # fmt: skip
            if self.window and self.flush % codec.granularity:
                raise ValueError(f"flush is {self.flush}; it must be a multiple of {codec.granularity}, the tokens "
                                 f"that share a scale in {codec}")  # fmt: skip
            if not self.window and codec.granularity > 1:
                raise ValueError(f"window is 0; {codec} needs {codec.granularity} exact tokens to gather in")

    def _check_pages(self) -> None:
        if (self.page_size is None) != (self.pages is None):
            raise ValueError(f"page_size is {self.page_size} and pages is {self.pages}; give both or neither")
        if self.page_size is not None and (self.slots % self.page_size or self.page_size % self.granularity):
            raise ValueError(f"page_size is {self.page_size}; it must divide slots, {self.slots}, and be a multiple "
                             f"of {self.granularity}, the tokens that share a scale")  # fmt: skip

    @property
    def granularity(self) -> int:
        """Slots that can be replaced only together."""
        return math.lcm(self.key_codec.granularity, self.value_codec.granularity)

    @property
    def group(self) -> int:
        """Query heads of a key head, J."""
        return self.query_heads // self.kv_heads

    @property
    def head_pos(self) -> int:
        """Heads that positions are kept for, P."""
        return 1 if self.policy.head_uniform else self.kv_heads

    @property
    def caps(self) -> bool:
        """Whether heads have budgets of their own."""
        return isinstance(self.policy, HeadBudgets)

    @property
    def capacity(self) -> int:
        """Most tokens that are kept."""
        return self.slots + self.window

    @property
    def holds(self) -> int:
        """Tokens that a policy that keeps all loses none of, whatever the prompt's length. Tokens leave the window
        ``flush`` at a time, and those of a prompt that are no whole block leave the rest of one empty for good."""
        return self.capacity - (self.flush - 1 if self.window and self.slots else 0)


def batch_spec(layers: Sequence[LayerSpec], batch: int) -> "CacheSpec":
    """The cache of ``batch`` rows; ``pages`` of a paged layer are those of one row."""
    grown = (x if x.pages is None else dataclasses.replace(x, pages=x.pages * batch) for x in layers)
    return CacheSpec(tuple(grown), batch)


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """A model's cache: one `LayerSpec` a layer, which may differ, and the rows of the batch."""

    layers: tuple[LayerSpec, ...]
    batch: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers is empty; a cache has at least one")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        rings = {(layer.window, layer.flush) for layer in self.layers}
        if len(rings) > 1:
            raise ValueError(f"layers have windows and flushes {sorted(rings)}; one ring index serves all, so they "
                             f"must be equal")  # fmt: skip
