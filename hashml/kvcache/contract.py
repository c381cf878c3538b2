"""What a codec and a policy are: the two halves of a compressed cache, orthogonal to each other.

A layer's cache has two tiers. The newest ``window`` tokens are exact; a token that leaves the window is *encoded*
by a codec into one of ``slots`` main slots, or dropped, as the policy *scores* it against those that are there.

    codec     token [D] -> rows of a few arrays, written at a slot; answers logits and weighted sums over all slots
    policy    arrays with one entry a slot, fed with each step's attention; the highest scores are kept

Both are frozen dataclasses, hence hashable and static under `jax.jit`; their states are dicts of arrays. Neither
moves data or knows positions' meaning: `hashml.kvcache.store` and `eviction` do, for all of them. Letters of shapes:

    B rows of the batch    H key/value heads    J query heads of one of them    D head width    n queries    T prompt
    C main slots           R window slots       N = C + R      P = 1 where one decision serves all heads, else H
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

if TYPE_CHECKING:
    from hashml.kvcache.spec import LayerSpec

Space = Literal["pre_rope", "post_rope", "any"]
"""Which keys a codec is for: before rotation, after it, or either."""

Role = Literal["payload", "scales", "index", "window"]
"""What a leaf of a codec's state is counted as; exact tokens are ``"window"``."""

Rotate = Callable[[Array], Array]
"""Rotates keys ``[B, H, C, D]`` of the main store by the positions of their slots."""


class CodecState(NamedTuple):
    """Arrays of one tier of one layer.

    Attributes:
        slots: leaves ``[B, H, C, ...]``, or ``[B, H, C / granularity, ...]`` for what a block of slots shares, or
            shorter ones for the first slots alone (`hashml.kvcache.exact_first`).
        fixed: leaves ``[B, H, ...]`` that belong to no slot (the channels that ThinK keeps).
    """

    slots: dict[str, Array]
    fixed: dict[str, Array]


@runtime_checkable
class Codec(Protocol):
    """How keys or values lie in the main store. A member is a frozen dataclass that inherits the defaults below.

    Attributes:
        granularity: consecutive slots that share a scale and can be replaced only together; 1 for most.
        space: which keys it is for.
        keys_only: whether it reads queries to encode, so that it has no meaning for values.
        needs_sinks: slots 0, 1, 2... that it treats apart, so that they must hold the first tokens for ever: the
            layer has as many sinks, and no pages; 0 for most.
        rotary_pairs: the order of `hashml.models.rotary.Rotary` whose pairs of channels it keeps together; None where
            it does not matter.
        observed: the last queries of a prompt that `fit` reads.
        roles: what each leaf of its state is counted as.
    """

    @property
    def granularity(self) -> int:
        return 1

    @property
    def space(self) -> Space:
        return "any"

    @property
    def keys_only(self) -> bool:
        return False

    @property
    def needs_sinks(self) -> int:
        return 0

    @property
    def rotary_pairs(self) -> str | None:
        return None

    @property
    def observed(self) -> int:
        return 0

    @property
    def roles(self) -> Mapping[str, Role]: ...

    def check(self, head_dim: int) -> None:
        """Raises ValueError where heads of this width cannot be encoded."""

    def check_tables(self, params: Any, heads: int, head_dim: int) -> None:
        """Raises ValueError unless ``params`` is what the codec has learned for so many heads of this width."""

    def init(self, batch: int, heads: int, slots: int, head_dim: int, dtype: Any) -> CodecState:
        """An empty store; ``slots`` is a multiple of ``granularity``."""
        ...

    def fit(
        self, fixed: dict[str, Array], keys: Array, queries: Array, valid: tuple[Array, Array]
    ) -> dict[str, Array]:
        """``fixed`` after a prompt: ``keys [B, H, T, D]`` that stay in either tier, the last w of its queries,
        ``[B, H, J, w, D]``, both as the cache stores them, and ``valid`` ``(bool [B, H, T], bool [B, w])``."""
        del keys, queries, valid
        return fixed

    def quantise(
        self, params: Any, fixed: dict[str, Array], x: Float[Array, "B H G D"], valid: Bool[Array, "B H G"]
    ) -> dict[str, Array]:
        """Rows of every leaf of ``slots`` for G tokens, ``[B, H, G or G / granularity, ...]``.

        Where ``granularity`` is more than 1, entries that are not ``valid`` must not move the scales of others.
        """
        ...

    def decode(self, params: Any, state: CodecState) -> Float[Array, "B H C D"]:
        """All slots, in float32; what is in empty ones is finite and means nothing."""
        ...

    def logits(
        self, params: Any, state: CodecState, q: Float[Array, "B H J n D"], rotate: Rotate | None
    ) -> Float[Array, "B H J n C"]:
        """Inner products of (rotated) queries with all keys, float32; ``rotate`` where keys are stored raw."""
        keys = self.decode(params, state)
        keys = keys if rotate is None else rotate(keys)
        return jnp.einsum("bhjnd,bhcd->bhjnc", q.astype(jnp.float32), keys.astype(jnp.float32))

    def weighted_sum(
        self, params: Any, state: CodecState, probs: Float[Array, "B H J n C"]
    ) -> Float[Array, "B H J n D"]:
        """``probs`` times the values of all slots, float32."""
        return jnp.einsum("bhjnc,bhcd->bhjnd", probs, self.decode(params, state).astype(jnp.float32))


class Attention(NamedTuple):
    """One step's attention, over main slots and then the window's.

    Attributes:
        logits: ``q k / sqrt(D)``, float32; masked entries hold a large finite negative.
        probs: their softmax; 0 where masked, and everywhere in a row that sees no key.
        valid: which keys each query saw.
    """

    logits: Float[Array, "B H J n N"]
    probs: Float[Array, "B H J n N"]
    valid: Bool[Array, "B #H 1 n N"]


class Queries(NamedTuple):
    """Who asks: what a policy's noise and its schedules depend on, so that they are a row's own.

    Attributes:
        pos: positions of the queries.
        key: of each row's noise in this layer, typed keys ``[B]``; see `hashml.kvcache.noise`.
        born: tokens of each row's prompt, so that the query at ``pos`` makes the generated token ``pos + 1 - born``.
    """

    pos: Int32[Array, "B n"]
    key: Array
    born: Int32[Array, " B"]


class PrefillStatistics(NamedTuple):
    """What a prompt's own, exact attention leaves for a policy. Keys and queries are as the attention used them.

    Attributes:
        pos: positions of the prompt's tokens, -1 for padding.
        keys: ``[B, H, T, D]``; values likewise.
        last: attention of each row's last ``policy.observed`` tokens (w), oldest first, over the prompt; rows of a
            prompt shorter than that see nothing. None if ``policy.observed`` is 0.
        column_sums: sums over all queries of `Policy.weigh`, mean over the query heads of a key head unless the
            layer says otherwise; None if the policy does not want them.
        column_counts: queries that saw each key.
    """

    pos: Int32[Array, "B T"]
    keys: Float[Array, "B H T D"]
    values: Float[Array, "B H T D"]
    last: Attention | None
    column_sums: Float[Array, "B H T"] | None
    column_counts: Int32[Array, "B T"]


PolicyState = dict[str, Array]
"""Leaves ``[B, P, C + R, ...]``, one entry a slot of both tiers. What `Policy.init` returns fills the entry of every
token that enters, so an entry never tells of the token that was there before."""


@runtime_checkable
class Policy(Protocol):
    """Which tokens are kept. A member is a frozen dataclass that inherits the defaults below.

    Attributes:
        head_uniform: one decision for all heads of a layer (P = 1).
        observed: the last queries of a prompt whose attention `from_prefill` reads.
        sums_columns: whether `from_prefill` reads ``column_sums``.
        append_only: nothing is ever dropped, so slots fill up in order; only the policy that keeps all.
    """

    @property
    def head_uniform(self) -> bool:
        return False

    @property
    def observed(self) -> int:
        return 0

    @property
    def sums_columns(self) -> bool:
        return False

    @property
    def append_only(self) -> bool:
        return False

    def check(self, spec: "LayerSpec") -> None:
        """Raises ValueError for a layer that it cannot serve."""

    def resized(self, slots: int, of: int) -> "Policy":
        """The policy for a layer of ``slots`` main slots that was made for one ``of`` so many: where a number of its
        own counts slots it grows and falls with them. ``later`` slots of `HeadBudgets` do not."""
        del slots, of
        return self

    def init(self, spec: "LayerSpec", batch: int) -> PolicyState:
        """The state of empty slots, of the same value at each."""
        ...

    def weigh(
        self, logits: Float[Array, "B H J n N"], valid: Array, pos: Int32[Array, "B #P N"], queries: Queries
    ) -> Float[Array, "B H J n N"]:
        """What each query of a prompt gives each key, of positions ``pos``, in ``column_sums``; a softmax."""
        del pos, queries
        return masked_softmax(logits, valid)

    def enter(self, spec: "LayerSpec", keys: Float[Array, "B H n D"]) -> PolicyState | None:
        """State ``[B, P, n, ...]`` of tokens as they enter, from their keys as stored; None for what `init` has."""
        del spec, keys
        return None

    def from_prefill(self, spec: "LayerSpec", statistics: PrefillStatistics, key: Array) -> tuple[Array, PolicyState]:
        """Scores ``float32 [B, P, T]`` of a prompt's tokens, the highest of which are kept, and their state,
        leaves ``[B, P, T, ...]``; ``key [B]`` is that of `Queries`."""
        ...

    def observe(
        self, spec: "LayerSpec", state: PolicyState, attention: Attention, pos: Int32[Array, "B P N"],
        queries: Queries,
    ) -> PolicyState:  # fmt: skip
        """The state after a step's attention. ``pos`` is -1 at empty slots."""
        del spec, attention, pos, queries
        return state

    def score(
        self, spec: "LayerSpec", state: PolicyState, pos: Int32[Array, "B P N"], now: Int32[Array, " B"],
        key: Array | None = None,
    ) -> Float[Array, "B P N"]:  # fmt: skip
        """Scores of both tiers' slots; the lowest leaves. ``now`` is the number of tokens seen, ``key [B]`` that of
        `Queries`, for a policy that draws."""
        ...

    def expire(
        self, spec: "LayerSpec", state: PolicyState, pos: Int32[Array, "B P N"], now: Int32[Array, " B"]
    ) -> Bool[Array, "B P N"] | None:
        """Main slots to empty though there may be room, or None; the window's entries are ignored."""
        del spec, state, pos, now
        return None

    def admit(
        self, spec: "LayerSpec", state: PolicyState, pos: Int32[Array, "B P N"], now: Int32[Array, " B"]
    ) -> Bool[Array, "B P N"] | None:
        """Window tokens that may enter the main store when they leave the window, or None for all of them."""
        del spec, state, pos, now
        return None

    def bulk(self, spec: "LayerSpec") -> int:
        """Main slots that are empty after some were freed at once, the lowest first, because fewer than
        ``spec.flush`` were.

        0, the default, frees none in advance: each token that leaves the window fights for its own slot.
        """
        del spec
        return 0


@runtime_checkable
class HeadBudgets(Protocol):
    """A policy that gives heads budgets of their own after a prompt (AdaKV).

    Attributes:
        base: main slots of a head on average, and of every head before a prompt.
        later: main slots of every head beyond its budget, for the tokens that come after the prompt.
    """

    @property
    def base(self) -> int: ...

    @property
    def later(self) -> int: ...

    def caps(self, spec: "LayerSpec", score: Float[Array, "B H T"], pos: Int32[Array, "B T"]) -> Int32[Array, "B H"]:
        """Main slots that a prompt may fill in each head, from its tokens' scores at ``pos`` (-1 for padding)."""
        ...


def masked_softmax(logits: Float[Array, "*n N"], valid: Bool[Array, "*#m N"]) -> Float[Array, "*n N"]:
    """Softmax over the valid entries of the last axis, in float32: 0 at the others, and where none is valid."""
    x = jnp.where(valid, logits.astype(jnp.float32), MASKED)
    x = jnp.where(valid, jnp.exp(x - x.max(axis=-1, keepdims=True)), 0.0)
    return x / jnp.maximum(x.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def check_shapes(codec: str, params: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless ``params`` has the arrays that a codec learns, of these shapes."""
    if params is None:
        raise ValueError(f"tables hold nothing for {codec}; it learns {', '.join(shapes)}: give what `learn_tables` "
                         f"or `load_tables` returns")  # fmt: skip
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"tables hold {', '.join(sorted(params))} for {codec}; it needs {name}")
        if params[name].shape != shape:
            raise ValueError(f"tables hold a {name} of shape {list(params[name].shape)} for {codec}; this model "
                             f"needs {list(shape)}: they are of another one")  # fmt: skip


def over_queries(x: Float[Array, "B H J *n"], how: Literal["mean", "max", "sum"]) -> Float[Array, "B H *n"]:
    """Reduces what the query heads of one key head say, as the layer's ``gqa`` asks."""
    return {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum}[how](x, axis=2)


MASKED = -1e30
"""Logit of a masked key: finite, so that no difference of two is NaN."""
