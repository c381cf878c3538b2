"""What a selector is: an index of few bits a key, and a choice of tokens for each query that decodes.

    index = selector.build(keys, values, positions, key=key)               after a prompt
    index = selector.append(index, keys, values, at)                       as tokens come
    chosen = selector.select(index, q, positions, query_pos, sinks=4, window=64, heavy=256)
    out = sparse_decode(q, k, v, *chosen)

A member is a frozen dataclass, hence hashable and static under `jax.jit`; its index is a tree of arrays of fixed
shapes. Keys are those that attention uses (after rotation). Slots are told by positions, as in `hashml.kvcache`: -1
is empty, and a query at ``query_pos`` sees ``0 <= position <= query_pos``, in whatever order tokens lie. Every
selection is the first ``sinks`` tokens, the last ``window`` ones, and ``heavy`` others, no token twice. Letters of
shapes:

    B rows of the batch    K key heads    J query heads of one of them    H = K J    N slots    D width of keys
    P heads that positions are kept for, 1 or K    S heads that lists are made for, K or H    M entries of a list
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Key

from hashml.accounting import stored_bytes
from hashml.attention.sparse_decode import Selection, check_heads

Gqa = Literal["head", "mean", "max", "sum"]
"""A list for every query head, or one for all of a key head by the mean, maximum or sum of their scores. Lists of
their own read up to J times the tokens (`union_size`)."""

_Given = TypeVar("_Given")

Rows = Callable[[Array], Array]
"""Exact keys ``[B, S, M, D]`` of slots ``int32 [B, S, M]``, for the selectors that look at some."""


class Index(NamedTuple):
    """What a selector stores.

    Attributes:
        slots: arrays with an entry for each slot, or for a page of them.
        fixed: what belongs to no slot: planes, codebooks, means. One copy whatever the number of tokens.
    """

    slots: dict[str, Array]
    fixed: dict[str, Any]


@runtime_checkable
class Selector(Protocol):
    """How tokens are chosen. A member is a frozen dataclass that inherits the default of `select`."""

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        """The index of all slots, empty ones included, whose keys do not matter.

        Args:
            keys, values: as attention uses them.
            positions: -1 where a slot is empty.
            key: for what is drawn once. Layers with the same key share planes.
            learned: what was learned from other text, for selectors that learn.
        """
        ...

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        """The index with tokens written to slots ``at``; outside of the slots, they go nowhere."""
        ...

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        """What every slot is worth to every query; what empty ones hold does not matter."""
        ...

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
        """The tokens that each head reads, ``min(sinks + window + heavy, N)`` of them where as many are seen.

        Args:
            index: of the keys.
            q: queries, rotated as the keys are.
            positions: of the slots.
            query_pos: of the queries.
            sinks, window: tokens that are always read: the first ones, and the last ones.
            heavy: tokens besides.
            gqa: lists for query heads, or for key heads.
            key: for those that sample; fold layer and step into it.
            rows: for those that look at exact keys.
        """
        del key, rows
        scores = over_group(self.scores(index, q), gqa)
        return combine(scores, positions, query_pos, sinks=sinks, window=window, heavy=heavy)


# --- lists ----------------------------------------------------------------------------------------


def combine(
    scores: Float[Array, "B S N"],
    positions: Int32[Array, "B P N"],
    query_pos: Int32[Array, " B"],
    *,
    sinks: int,
    window: int,
    heavy: int,
) -> Selection:
    """The first ``sinks`` tokens, the last ``window``, and the ``heavy`` best of the others, all of weight 1.

    Sinks and window leave the contest before the best are taken, so that no token stands twice, whether the sequence
    is long or short. They stand first in the list, the others follow by score; between equals the lower slot. A score
    of ``-inf`` is never taken.

    Raises:
        ValueError: for negative numbers, or positions whose heads do not divide those of the scores.
    """
    check_sizes(sinks, window, heavy)
    slots = scores.shape[2]
    seen, always = _seen_and_always(positions, query_pos, sinks, window, scores.shape[1])
    worth = jnp.where(jnp.isnan(scores), jnp.finfo(jnp.float32).min, scores.astype(jnp.float32))
    worth = jnp.where(always, jnp.inf, jnp.where(seen, worth, -jnp.inf))
    best, idx = jax.lax.top_k(worth, min(sinks + window + heavy, slots))
    return Selection(idx, best > -jnp.inf, jnp.ones(idx.shape, jnp.float32))


def rest(
    positions: Int32[Array, "B P N"], query_pos: Int32[Array, " B"], *, sinks: int, window: int, heads: int
) -> Bool[Array, "B {heads} N"]:
    """Slots that a query sees and that are neither sinks nor window."""
    seen, always = _seen_and_always(positions, query_pos, sinks, window, heads)
    return seen & ~always


def _seen_and_always(
    positions: Array, query_pos: Array, sinks: int, window: int, heads: int
) -> tuple[Bool[Array, "B S N"], Bool[Array, "B S N"]]:
    now = query_pos[:, None, None]
    seen = (positions >= 0) & (positions <= now)
    always = seen & ((positions < sinks) | (positions > now - window))
    return per_head(seen, heads), per_head(always, heads)


def disjoint(first: Selection, second: Selection, slots: int) -> Selection:
    """Both lists as one; of entries that name the same slot only the first stays valid, with its own weight.

    Raises:
        ValueError: for lists of different heads.
    """
    if first.idx.shape[:2] != second.idx.shape[:2]:
        raise ValueError(
            f"first has lists {first.idx.shape[:2]} and second {second.idx.shape[:2]}; they must be equal"
        )
    idx, valid, weight = (jnp.concatenate(pair, axis=2) for pair in zip(first, second, strict=True))
    entries = idx.shape[2]
    places = jnp.arange(entries, dtype=jnp.int32)
    named = jnp.where(valid & (idx >= 0) & (idx < slots), idx, slots)
    b, s = _grid(idx.shape)
    owner = jnp.full((*idx.shape[:2], slots + 1), entries, jnp.int32)
    owner = owner.at[b, s, named].min(jnp.broadcast_to(places, idx.shape))
    own = jnp.take_along_axis(owner, named, axis=2) == places
    return Selection(idx, valid & own & (named < slots), weight)


def sample(
    key: Key[Array, ""], allowed: Bool[Array, "B S N"], count: int
) -> tuple[Int32[Array, "B S m"], Bool[Array, "B S m"], Int32[Array, "B S"]]:
    """``(slots, valid, population)``: up to ``count`` of the allowed slots, uniformly without replacement.

    They are in random order, so that the first b of them are a uniform sample of b.
    """
    ticket = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
    drawn, idx = jax.lax.top_k(ticket, min(count, allowed.shape[2]))
    return idx, drawn >= 0, allowed.sum(axis=2, dtype=jnp.int32)


def chosen_slots(selection: Selection, slots: int) -> Bool[Array, "B S {slots}"]:
    """Which slots a list names."""
    idx, valid, _ = selection
    named = jnp.where(valid & (idx >= 0), idx, slots)
    b, s = _grid(idx.shape)
    return jnp.zeros((*idx.shape[:2], slots), bool).at[b, s, named].set(True, mode="drop")


def union_size(selection: Selection, kv_heads: int, slots: int) -> Int32[Array, "B {kv_heads}"]:
    """Distinct tokens that the query heads of each key head read together: the rows that are gathered at least."""
    check_heads(selection.idx.shape[1], kv_heads, kv_heads)
    named = chosen_slots(selection, slots)
    return named.reshape(named.shape[0], kv_heads, -1, slots).any(axis=2).sum(axis=2, dtype=jnp.int32)


# --- what members share ---------------------------------------------------------------------------


def slot_positions(length: Int32[Array, " B"], slots: int) -> Int32[Array, "B 1 {slots}"]:
    """Positions of a cache that is filled in order: ``0 .. length - 1``, then -1."""
    places = jnp.arange(slots, dtype=jnp.int32)
    return jnp.where(places < length[:, None], places, -1)[:, None]


def grouped(q: Float[Array, "B H D"], kv_heads: int) -> Float32[Array, "B {kv_heads} J D"]:
    """Queries by key head, in float32.

    Raises:
        ValueError: for query heads that the key heads do not divide.
    """
    batch, heads, width = q.shape
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads; they must be a multiple of the {kv_heads} key heads")
    return q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, width)


def over_group(scores: Float[Array, "B K J N"], gqa: Gqa) -> Float[Array, "B S N"]:
    """Scores for each list that ``gqa`` asks for.

    Raises:
        ValueError: for another ``gqa``.
    """
    check_gqa(gqa)
    if gqa == "head":
        return scores.reshape(scores.shape[0], -1, scores.shape[3])
    return {"mean": jnp.mean, "max": jnp.max, "sum": jnp.sum}[gqa](scores, axis=2)


def per_head(x: Array, heads: int) -> Array:
    """``[B, P, ...]`` as ``[B, heads, ...]``: each of P for its own consecutive heads.

    Raises:
        ValueError: if P does not divide ``heads``.
    """
    if heads % x.shape[1]:
        raise ValueError(
            f"positions are of {x.shape[1]} heads; they must be of 1, or divide the {heads} heads of lists"
        )
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def put(leaf: Array, rows: Array, at: Int32[Array, "B P n"]) -> Array:
    """``leaf [B, K, N, ...]`` with ``rows [B, K, n, ...]`` at slots; those outside of ``0 .. N - 1`` go nowhere."""
    places = _places(at, leaf.shape[1], leaf.shape[2])
    return leaf.at[places].set(rows.astype(leaf.dtype), mode="drop")


def put_codes(leaf: Array, rows: Array, at: Int32[Array, "B P n"]) -> Array:
    """As `put`, for codes that lie as ``[B, K, L, N]``; rows are ``[B, K, n, L]``."""
    b, k, at = _places(at, leaf.shape[1], leaf.shape[3])
    return leaf.at[b, k, :, at].set(rows.astype(leaf.dtype), mode="drop")


def _places(at: Array, heads: int, slots: int) -> tuple[Array, Array, Array]:
    at = per_head(jnp.where(at < 0, slots, at), heads)
    return *_grid(at.shape), at


def mean_key(keys: Float[Array, "B K N D"], positions: Int32[Array, "B P N"]) -> Float32[Array, "B K D"]:
    """Mean over the slots that hold a token; 0 where none does."""
    held = per_head(positions >= 0, keys.shape[1])[..., None]
    total = jnp.where(held, keys.astype(jnp.float32), 0.0).sum(axis=2)
    return total / jnp.maximum(held.sum(axis=2), 1)


def index_bits(index: Index, batch: int, kv_heads: int, slots: int) -> float:
    """Stored bits for each slot and key head, read off the arrays; `Index.fixed` is not among them."""
    return 8 * stored_bytes(index.slots) / (batch * kv_heads * slots)


def need(name: str, value: _Given | None, who: str, why: str) -> _Given:
    """``value``, unless it is None.

    Raises:
        ValueError: then, with what it is needed for.
    """
    if value is None:
        raise ValueError(f"{name} is None; {who} needs it {why}")
    return value


def check_gqa(gqa: str, allowed: tuple[str, ...] = ("head", "mean", "max", "sum")) -> None:
    """Raises ValueError for a ``gqa`` that is not allowed."""
    if gqa not in allowed:
        raise ValueError(f"gqa is {gqa!r}; allowed are {', '.join(map(repr, allowed))}")


def check_sizes(sinks: int, window: int, heavy: int) -> None:
    """Raises ValueError for negative numbers."""
    for name, size in (("sinks", sinks), ("window", window), ("heavy", heavy)):
        if size < 0:
            raise ValueError(f"{name} is {size}; it must not be negative")


def _grid(shape: tuple[int, ...]) -> tuple[Array, Array]:
    return jnp.arange(shape[0])[:, None, None], jnp.arange(shape[1])[None, :, None]
