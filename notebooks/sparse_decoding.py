# %% [markdown]
# # Decoding that reads few tokens
#
# A decoder reads the whole cache for each new token, and nearly all of it weighs nothing. A *selector* keeps a
# small index of the keys and names the tokens that a query should read; everything stays in the cache, and the next
# query may read others. Here stories260K, a small real model, goes on with a story, and each selector chooses 16
# tokens of up to 400. `$HASHML_DATA` must have the model.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from IPython.display import Image, display

from experiments.data import stories
from experiments.lab import new_figure
from experiments.lab.figures import save
from hashml.attention import (
    OracleTopK,
    Quest,
    Socket,
    SparseReads,
    StreamingMask,
    UniformRandom,
    index_bits,
    slot_positions,
    sparse_decode_step,
    sparse_prefill,
)
from hashml.attention.selector_contract import chosen_slots
from hashml.kvcache import CacheSpec, cache_layers, no_tables
from hashml.models.decoder import decoder_model
from hashml.models.generation import generate
from hashml.models.tokenization import decode

params, config, tokenizer = stories.load()
model = decoder_model(config)
prompt = tokenizer.encode("Once upon a time, there was a dog named Tim.")
story = prompt + generate(model, params, [prompt], 400 - len(prompt), temperature=0.8, key=jax.random.key(1))[0]
print(decode(tokenizer, story[1:])[:300], "...")

# %% [markdown]
# ## The same story, read sparsely
#
# The first half of the story is read densely, as a prompt. Then every token is decoded with 16 tokens a head and
# layer: the first two, the last two, and twelve that the selector names. The loss is that of the second half, in
# nats a token. `exact top 12` computes all logits to choose by them; no index can hope for more. SOCKET hashes
# keys, 8 tables of 4 bits; *centred* takes the mean key off first, which changes no attention, and the buckets a
# lot.

# %%
selectors = {
    "exact top 12": OracleTopK(),
    "Quest, pages of 4": Quest(page_size=4),
    "SOCKET": Socket(tables=8, bits=4),
    "SOCKET, centred": Socket(tables=8, bits=4, center="prefill_mean"),
    "the last 14": StreamingMask(),
    "random": UniformRandom(),
}
half, heavy = len(story) // 2, 12
spec = CacheSpec(cache_layers("full", config, len(story)), batch=1)
spec = dataclasses.replace(spec, layers=tuple(dataclasses.replace(layer, dtype="float16") for layer in spec.layers))
tokens = jnp.asarray([story])


def loss(selector, heavy: int, tokens: jax.Array) -> jax.Array:
    reads = SparseReads(selector, heavy, sinks=2, window=2)
    places = jnp.arange(half)[None]
    first, state = sparse_prefill(
        model, spec, no_tables(spec), reads, params, tokens[:, :half], places, jax.random.key(0)
    )

    def step(state, token):
        logits, state = sparse_decode_step(model, spec, no_tables(spec), reads, params, state, token[None])
        return state, logits[0]

    _, logits = jax.lax.scan(step, state, tokens[0, half:-1])
    said = jax.nn.log_softmax(jnp.concatenate([first, logits]))
    return -jnp.take_along_axis(said, tokens[0, half:, None], axis=1).mean()


loss = jax.jit(loss, static_argnums=(0, 1))
losses = {name: float(loss(selector, heavy, tokens)) for name, selector in selectors.items()}
losses["everything"] = float(loss(StreamingMask(), len(story), tokens))

# %% [markdown]
# ## What they look at
#
# One layer of the same story. Time runs down, tokens of the story run to the right. The first picture is exact
# attention, the mean of the eight heads: a first token, close neighbours, and little else. The others show which
# share of the heads reads a token. *mass* is how much of the exact attention falls on what is read; *bits a key* is
# what the index stores for each of them, beside the 128 bits of a key: heads are only 8 wide here, and usually 128.

# %%
seen = []


def attend(q, k, v):
    positions = jnp.arange(len(story), dtype=jnp.int32)
    q, k = (config.rotary.rotate(x, positions[None, None]) for x in (q, k))
    wide_k, wide_v = (x.repeat(config.heads // config.kv_heads, axis=1) for x in (k, v))
    logits = jnp.einsum("bhtd,bhsd->bhts", q, wide_k) / np.sqrt(config.head_dim)
    weights = jax.nn.softmax(jnp.where(positions <= positions[:, None], logits, -jnp.inf))
    seen.append((q, k, v, weights))
    return jnp.einsum("bhts,bhsd->bhtd", weights, wide_v), None


x = model.embed(params, tokens)
for place in range(config.layers):
    x, _, _ = model.layer(model.layer_params(params, place), x, None, attend)
queries, keys, values, weights = seen[2]
positions = slot_positions(jnp.array([len(story)]), len(story))


def read(selector) -> np.ndarray:
    """Which tokens each head reads at each step of the second half, ``[steps, heads, tokens]``."""
    index = selector.build(keys, values, positions, key=jax.random.key(0))

    def step(at):
        now = at[None].astype(jnp.int32)
        chosen = selector.select(
            index,
            queries[:, :, at],
            positions,
            now,
            sinks=2,
            window=2,
            heavy=heavy,
            key=jax.random.fold_in(jax.random.key(0), at),
        )
        return chosen_slots(chosen, len(story))[0]

    return np.asarray(jax.jit(lambda: jax.lax.map(step, jnp.arange(half, len(story))))())


chosen = {name: read(selector) for name, selector in selectors.items()}
exact = np.asarray(weights[0, :, half:]).swapaxes(0, 1)
shown = {"exact attention": exact.mean(axis=1) * 4} | {name: rows.mean(axis=1) for name, rows in chosen.items()}
figure, axes = new_figure(4, 2, width=12.5, height=5)
for ax, (title, rows) in zip(axes, shown.items(), strict=False):
    ax.imshow(rows, cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_title(title, loc="left")
    ax.grid(visible=False)
for ax in list(axes)[len(shown) :]:
    ax.axis("off")
display(Image(save(figure, "png")))

# %%
slots, kv_heads = len(story), config.kv_heads


def bits(name: str) -> float:
    index = selectors[name].build(keys, values, positions, key=jax.random.key(0))
    return round(index_bits(index, 1, kv_heads, slots), 1)


pl.Config.set_tbl_hide_dataframe_shape(True)
pl.DataFrame(
    [
        {
            "reads": name,
            "bits a key": bits(name) if name in chosen and name != "exact top 12" else None,
            "mass": round(float((exact * chosen[name]).sum(axis=2).mean()), 3) if name in chosen else 1.0,
            "loss": round(losses[name], 3),
        }
        for name in losses
    ]
)
