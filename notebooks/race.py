# %% [markdown]
# # What a bucket collects
#
# Attention compares every query with every key. RACE attention (Joshi et al., ICLR 2026) never does: it spreads
# each token over the buckets of a few hash tables, adds up what the keys leave there, and lets a query read back.
# The time is linear in the length, and the state of a decoder does not grow. Here is a real sentence on its way
# through the tables: keys and queries of stories260K, a model with 260 thousand weights. `$HASHML_DATA` must have
# it.

# %%

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from IPython.display import Image, display

from experiments.data import stories
from experiments.lab import new_figure
from experiments.lab.figures import save
from hashml.attention import angular_attention, race_attention, race_features, race_state
from hashml.hashing import hard_hash, srp_planes
from hashml.kvcache.contract import masked_softmax
from hashml.models.decoder import decoder_model
from hashml.models.tokenization import decode

params, config, tokenizer = stories.load()
model = decoder_model(config)
sentence = tokenizer.encode("Lily had a red ball and a blue ball. Tim liked the red ball.")
words = [decode(tokenizer, [token]).strip() or "·" for token in sentence]
seen = []


def attend(q, k, v):
    """Exact causal attention, and a note of what came in."""
    positions = jnp.arange(len(sentence))
    turned, keys = (config.rotary.rotate(x, positions[None, None].astype(jnp.int32)) for x in (q, k))
    keys, values = (x.repeat(config.heads // config.kv_heads, axis=1) for x in (keys, v))
    logits = jnp.einsum("bhtd,bhsd->bhts", turned, keys) / np.sqrt(config.head_dim)
    weights = masked_softmax(logits, positions <= positions[:, None])
    seen.append((q[0], k[0], v[0], weights[0]))
    return jnp.einsum("bhts,bhsd->bhtd", weights, values), None


x = model.embed(params, jnp.asarray([sentence]))
for place in range(config.layers):
    x, _, _ = model.layer(model.layer_params(params, place), x, None, attend)
queries, keys, values, exact = seen[1]
print(len(sentence), "tokens,", config.heads, "query heads of width", config.head_dim)

# %% [markdown]
# ## Eight buckets
#
# Three random hyperplanes cut the space in eight. The *hard* hash puts a key into the bucket of the side it lies
# on, for each plane; tokens that point the same way meet. Keys of a model that was trained with softmax all point
# the same way: they share a large mean, of which softmax knows nothing, since it moves all logits of a query alike.
# So we take it off here. A model that is trained with RACE has no reason to learn it.


# %%
def buckets(keys: jax.Array) -> list[str]:
    codes = np.asarray(hard_hash(keys, planes))[:, 0]
    return [" ".join(word for word, code in zip(words, codes, strict=True) if code == b) for b in range(8)]


head = 0
planes = srp_planes(jax.random.key(0), 1, 3, config.head_dim)
keys, queries = keys[head], queries[head]
before = buckets(keys)
keys -= keys.mean(axis=0)
for bucket, (as_they_are, centred) in enumerate(zip(before, buckets(keys), strict=True)):
    print(f"{bucket:03b} | {as_they_are:66} | {centred}")

# %% [markdown]
# The *soft* hash gives each bucket a share, and `beta` says how sharply: at 1 nearly all buckets get something, at
# 16 it is the hard hash, smoothed where a key lies near a plane. Each row is a bucket, each column a token of the
# sentence.

# %%

figure, axes = new_figure(3, width=15, height=3)
for ax, beta in zip(axes, (1, 4, 16), strict=True):
    shares = np.asarray(race_features(planes, beta, keys))
    ax.imshow(shares.T, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_title(f"beta = {beta}", loc="left")
    ax.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    ax.set_yticks(range(8), [f"{bucket:03b}" for bucket in range(8)], fontsize=7)
    ax.grid(visible=False)
display(Image(save(figure, "png")))

# %% [markdown]
# ## What a query reads
#
# A bucket keeps two sums over its keys: of their shares, and of shares times values. A query takes from each bucket
# as much as its own share says, and divides. So the weight that it gives to a key is a product of two soft hashes,
# averaged over tables, and nobody has computed it. With many tables it tends to the *angular* kernel `(1 - angle /
# pi)^P`: that is what RACE sketches. It is another kernel than softmax's, and flatter: a model has to be trained
# with it (the experiment `attention.race` does). Softmax here knows positions too, by rotation; the buckets got the
# keys before that.

# %%
causal = np.tril(np.ones((len(words), len(words))))


def weights_of(tables: int, bits: int = 3, beta: float = 16.0) -> np.ndarray:
    """The weights that RACE gives without ever forming them, formed here to be seen."""
    drawn = srp_planes(jax.random.key(1), tables, bits, config.head_dim)
    products = race_features(drawn, beta, queries) @ race_features(drawn, beta, keys).T
    products = np.asarray(products) * causal
    return products / products.sum(axis=1, keepdims=True)


unit_q, unit_k = (np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True)) for x in (queries, keys))
angular = (1 - np.arccos(np.clip(unit_q @ unit_k.T, -1, 1)) / np.pi) ** 3 * causal
angular /= angular.sum(axis=1, keepdims=True)
maps = {
    "softmax": np.asarray(exact[head]),
    "angular, exact": angular,
    "RACE, 4 tables": weights_of(4),
    "RACE, 256 tables": weights_of(256),
}
figure, axes = new_figure(4, width=16, height=5)
for ax, (title, shown) in zip(axes, maps.items(), strict=True):
    ax.imshow(shown, cmap="Greys", vmin=0, vmax=0.4, interpolation="nearest")
    ax.set_title(title, loc="left")
    ax.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
    ax.set_yticks(range(len(words)), words if title == "softmax" else [], fontsize=6)
    ax.grid(visible=False)
display(Image(save(figure, "png")))

# %% [markdown]
# ## More tables, less error
#
# The tables are independent, so the error falls with the square root of their number, down to what the soft hash at
# this `beta` differs from the hard one. The state of a head is `tables * 2**bits * (width + 1)` floats, whatever
# the length; a cache of keys and values takes `2 * width` floats a token.

# %%
q, k, v = queries[None, None], keys[None, None], values[None, :1]
target = angular_attention(q, k, v, 3, causal=True)
rows = []
for tables in (1, 4, 16, 64, 256, 1024):
    drawn = jnp.stack([srp_planes(jax.random.key(seed), tables, 3, config.head_dim) for seed in range(8)])
    found = jax.jit(jax.vmap(lambda planes: race_attention(q, k, v, planes, 16.0, causal=True)))(drawn)
    errors = jnp.linalg.norm((found - target).reshape(8, -1), axis=1) / jnp.linalg.norm(target)
    floats = sum(leaf.size for leaf in race_state(1, 1, drawn[0], config.head_dim))
    rows.append({"tables": tables, "relative error": round(float(errors.mean()), 3), "floats a head": floats})
pl.Config.set_tbl_hide_dataframe_shape(True)
pl.DataFrame(rows)
