"""HashAttention: learned codes in Hamming space (Desai et al., ICML 2025, arXiv 2412.14468).

    code(x) = sign(mlp(x)),   mlp: D -> 128 -> 128 -> bits with SiLU, one for queries and one for keys of each head
    score_j = <code(q), code(k_j)> = bits - 2 Hamming

Only the key's bits are stored, 32 a token. The maps are trained (`train_hash_attention`) with tanh in place of the
sign, to tell the top keys of a query from the others: a logistic loss whose positives weigh as much as its negatives.

Departure: the training loss is given a scale and an offset of its own (trained, then forgotten), so that the two
classes of an inner product of tanh's need not meet at 0.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32, Key, UInt

from hashml.attention.selector_contract import Index, Selector, check_heads, need, put

Mlp = list[dict[str, Array]]
"""Layers ``{"kernel": [heads, in, out], "bias": [heads, out]}``."""

_WORDS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}


class Training(NamedTuple):
    """What `train_hash_attention` found.

    Attributes:
        params: ``{"query": Mlp of H heads, "key": Mlp of K heads}``, to be given to `HashAttention.build`.
        losses: of each step.
    """

    params: dict[str, Mlp]
    losses: Float32[Array, " steps"]


def init_mlps(
    key: Key[Array, ""],
    query_heads: int,
    kv_heads: int,
    width: int,
    bits: int = 32,
    hidden: tuple[int, ...] = (128, 128),
) -> dict[str, Mlp]:
    """Fresh maps: kernels normal with variance 1 / inputs, biases 0."""
    sizes = (width, *hidden, bits)

    def mlp(key: Array, heads: int) -> Mlp:
        draws = jax.random.split(key, len(sizes) - 1)
        return [
            {
                "kernel": jax.random.normal(draw, (heads, inputs, outputs)) / inputs**0.5,
                "bias": jnp.zeros((heads, outputs)),
            }
            for draw, inputs, outputs in zip(draws, sizes[:-1], sizes[1:], strict=True)
        ]

    of_queries, of_keys = jax.random.split(key)
    return {"query": mlp(of_queries, query_heads), "key": mlp(of_keys, kv_heads)}


def hash_map(mlp: Mlp, x: Float[Array, "B heads n D"]) -> Float32[Array, "B heads n bits"]:
    """The values whose signs are the code."""
    x = x.astype(jnp.float32)
    for place, layer in enumerate(mlp):
        x = jnp.einsum("bhni,hio->bhno", jax.nn.silu(x) if place else x, layer["kernel"]) + layer["bias"][:, None]
    return x


def hash_codes(mlp: Mlp, x: Float[Array, "B heads n D"]) -> UInt[Array, "B heads n"]:
    """Codes in a word each; bit i is the sign of output i.

    Raises:
        ValueError: for maps of other than 8, 16 or 32 outputs.
    """
    outputs = hash_map(mlp, x)
    bits = outputs.shape[-1]
    if bits not in _WORDS:
        raise ValueError(f"mlp has {bits} outputs; allowed are 8, 16 and 32 bits")
    places = jnp.arange(bits, dtype=jnp.uint32)
    return ((outputs >= 0).astype(jnp.uint32) << places).sum(axis=-1, dtype=jnp.uint32).astype(_WORDS[bits])


@functools.partial(
    jax.jit, static_argnames=("top", "bits", "hidden", "steps", "batch", "learning_rate", "weight_decay")
)
def train_hash_attention(
    key: Key[Array, ""],
    queries: Float[Array, "B H T D"],
    keys: Float[Array, "B K N D"],
    seen: Bool[Array, "B T N"] | None = None,
    *,
    top: int,
    bits: int = 32,
    hidden: tuple[int, ...] = (128, 128),
    steps: int = 500,
    batch: int = 32,
    learning_rate: float | int = 1e-3,
    weight_decay: float | int = 0.0,
) -> Training:
    """Maps that separate the ``top`` keys of each query from the others that it sees.

    Args:
        key: of the first parameters and of the batches.
        queries, keys: of calibration text, as attention uses them.
        seen: which keys a query sees; ``None``: all. Queries that see no more than ``top`` teach nothing.
        top: keys of largest logit that count as positive.
        bits, hidden: of the maps.
        steps, batch: of AdamW; a batch is so many queries of every row.
        learning_rate, weight_decay: of AdamW.

    Raises:
        ValueError: for ``top`` outside of 1..N-1, or another number of bits.
    """
    rows, heads, count, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    check_heads(heads, kv_heads, kv_heads)
    if not 1 <= top < slots:
        raise ValueError(f"top is {top}; it must lie in 1..{slots - 1}, with {slots} keys")
    if bits not in _WORDS:
        raise ValueError(f"bits is {bits}; allowed are 8, 16 and 32")
    seen = jnp.ones((rows, count, slots), bool) if seen is None else seen
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    first, draws = jax.random.split(key)
    params: dict[str, Any] = {
        "maps": init_mlps(first, heads, kv_heads, width, bits, hidden),
        "scale": jnp.full((heads,), 4.0),
        "offset": jnp.zeros((heads,)),
    }

    def logits_of(q: Array, k: Array) -> Array:
        """Query heads beside the keys of their own key head, ``[B, H, n, N]``."""
        pairs = q.reshape(rows, kv_heads, heads // kv_heads, *q.shape[2:])
        return jnp.einsum("bkjnd,bksd->bkjns", pairs, k).reshape(rows, heads, q.shape[2], slots)

    def loss_of(params: Any, chosen: Array) -> Array:
        q, visible = queries[:, :, chosen].astype(jnp.float32), seen[:, chosen][:, None]
        exact = jnp.where(visible, logits_of(q, keys.astype(jnp.float32)), -jnp.inf)
        least = jax.lax.top_k(exact, top)[0][..., -1:]
        positive = visible & (exact >= least)
        codes = (jnp.tanh(hash_map(params["maps"][name], x)) for name, x in (("query", q), ("key", keys)))
        found = logits_of(*codes) * (params["scale"] / bits)[:, None, None] + params["offset"][:, None, None]
        ups, downs = positive.sum(axis=-1), (visible & ~positive).sum(axis=-1)
        # Each class weighs one half of a query, whatever its size.
        each = jnp.where(positive, 0.5 / jnp.maximum(ups, 1)[..., None], 0.5 / jnp.maximum(downs, 1)[..., None])
        losses = optax.sigmoid_binary_cross_entropy(found, positive.astype(jnp.float32))
        teaches = (ups > 0) & (downs > 0)
        total = jnp.sum(jnp.where(visible, each * losses, 0.0), axis=-1)
        return jnp.sum(jnp.where(teaches, total, 0.0)) / jnp.maximum(teaches.sum(), 1)

    def step(state: tuple, draw: Array) -> tuple[tuple, Array]:
        params, moments = state
        chosen = jax.random.randint(draw, (batch,), 0, count)
        loss, gradient = jax.value_and_grad(loss_of)(params, chosen)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = (params, optimizer.init(params))
    (params, _), losses = jax.lax.scan(step, state, jax.random.split(draws, steps))
    return Training(params["maps"], losses)


@dataclasses.dataclass(frozen=True)
class HashAttention(Selector):
    """Learned codes; `build` takes the maps of `train_hash_attention` as ``learned``. Bits are those of the maps."""

    def build(
        self,
        keys: Float[Array, "B K N D"],
        values: Float[Array, "B K N V"],
        positions: Int32[Array, "B P N"],
        *,
        key: Key[Array, ""] | None = None,
        learned: Any = None,
    ) -> Index:
        del values, positions, key
        maps = need("learned", learned, "HashAttention", "for its maps")
        return Index({"codes": hash_codes(maps["key"], keys)}, maps)

    def append(
        self,
        index: Index,
        keys: Float[Array, "B K n D"],
        values: Float[Array, "B K n V"],
        at: Int32[Array, "B P n"],
    ) -> Index:
        del values
        return Index({"codes": put(index.slots["codes"], hash_codes(index.fixed["key"], keys), at)}, index.fixed)

    def scores(self, index: Index, q: Float[Array, "B H D"]) -> Float32[Array, "B K J N"]:
        codes, maps = index.slots["codes"], index.fixed["query"]
        mine = hash_codes(maps, q[:, :, None])[:, :, 0]
        mine = mine.reshape(q.shape[0], codes.shape[1], -1)[..., None]
        apart = jax.lax.population_count(mine ^ codes[:, :, None]).astype(jnp.float32)
        return maps[-1]["bias"].shape[-1] - 2 * apart
