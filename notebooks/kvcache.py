# %% [markdown]
# # Which tokens does a cache keep?
#
# A language model that writes a story looks back at every token it has read: their keys and values are the
# *KV cache*, and it grows with the text. Many papers keep only some tokens. They differ in one thing, the score that
# decides who leaves. Here a small real model writes a story, and each policy reads it again with room for 48 tokens.
#
# The model is stories260K, with 260 thousand weights; `$HASHML_DATA` must have it. Any other model works as well:
# `load_decoder` takes a Hugging Face folder.

# %%

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from IPython.display import Image, display

from experiments.data import stories
from experiments.lab import new_figure
from experiments.lab.figures import save
from hashml.kvcache import CacheSpec, cache_bytes, cache_layers, decode_step, init, no_tables, prefill
from hashml.models.decoder import decoder_model
from hashml.models.generation import generate
from hashml.models.tokenization import decode

params, config, tokenizer = stories.load()
model = decoder_model(config)
prompt = tokenizer.encode("Once upon a time, there was a dog named Tim.")
story = prompt + generate(model, params, [prompt], 180, temperature=0)[0]
words = [decode(tokenizer, [token]) for token in story]
print(decode(tokenizer, story[1:])[:400], "...")

# %% [markdown]
# ## The same story, through each cache
#
# Every policy reads the story token by token, as if it were writing it. After each step the cache says which
# positions it still holds, in every layer and head. The loss of the second half of the story is what forgetting
# costs: the model's surprise, in nats a token, at the words that it wrote itself with the full cache.

# %%
policies = ["full", "streaming@48", "h2o@48", "tova@48", "scissorhands@48", "keyformer@48", "corm@48", "random@48"]
tokens = jnp.asarray(story)


def read(name: str) -> tuple[np.ndarray, float, int]:
    """Share of heads that hold each token at each step ``[steps, tokens]``, loss, and bytes of the cache."""
    spec = CacheSpec(cache_layers(name, config, len(story)), batch=1)
    empty = init(spec, jax.random.key(0))

    def step(cache, token):
        logits, cache = decode_step(model, spec, no_tables(spec), params, cache, token[None])
        return cache, (logits[0], jnp.stack([held(layer) for layer in cache.layers]).mean(axis=0))

    def held(layer):
        kept = jnp.concatenate([layer.pos, layer.window_pos[:, None].repeat(layer.pos.shape[1], 1)], axis=2)
        return jax.nn.one_hot(kept[0], len(story)).sum(axis=1).mean(axis=0)  # a position of -1 is no token

    _, (logits, shares) = jax.jit(lambda cache: jax.lax.scan(step, cache, tokens))(empty)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[1:, None], axis=1)
    return np.asarray(shares), float(losses[len(story) // 2 :].mean()), cache_bytes(spec, empty).total


seen = {name: read(name) for name in policies}
pl.Config.set_tbl_hide_dataframe_shape(True)
pl.DataFrame(
    {
        "cache": policies,
        "KiB": [round(seen[name][2] / 1024, 1) for name in policies],
        "loss, nats a token": [round(seen[name][1], 3) for name in policies],
    }
)

# %% [markdown]
# ## The picture
#
# Time runs down, tokens of the story run to the right; the darker a spot, the more heads still hold that token. The
# full cache is a solid triangle. The window of StreamingLLM is a band, with four dark columns of first tokens on the
# left. The others are what each paper is about: vertical lines are tokens that matter for long.

# %%
drawing, axes = new_figure(columns=4, rows=2, sharex=True, sharey=True, width=13)
for ax, name in zip(axes, policies, strict=True):
    ax.imshow(seen[name][0], cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set(title=name.removesuffix("@48"))
    ax.grid(visible=False)
for ax in axes[4:]:
    ax.set(xlabel="token of the story")
for ax in axes[::4]:
    ax.set(ylabel="step")
display(Image(save(drawing, "png")))

# %% [markdown]
# ## Which words?
#
# At the end of the story, the tokens of its first half that are still held by most heads. A random choice has no
# favourites.

# %%
middle = len(story) // 2
for name in policies[2:]:
    last = seen[name][0][-1][:middle]
    best = np.argsort(-last, kind="stable")[:8]
    print(f"{name.removesuffix('@48'):13s}", "  ".join(f"{words[i]!r} {last[i]:.0%}" for i in best))

# %% [markdown]
# ## Chosen once, by the end of the prompt
#
# SnapKV and its relatives do not decide as they write. They read a prompt with exact attention, let its last few
# tokens look back, and keep what these looked at. PyramidKV gives early layers more room and late layers less; AdaKV
# lets the heads of a layer compete for one budget. One line is one head, the first layer on top, one column a token
# of the first half of the story, the prompt; black is what is kept.

# %%
prompted = ["snapkv@36", "pyramidkv@36", "adakv@36"]
positions = jnp.arange(middle, dtype=jnp.int32)[None]
drawing, axes = new_figure(columns=3, sharey=True, width=13, height=4.2)
for ax, name in zip(axes, prompted, strict=True):
    spec = CacheSpec(cache_layers(name, config, len(story)), batch=1)
    _, cache = prefill(model, spec, no_tables(spec), params, tokens[None, :middle], positions, jax.random.key(0))
    lines = []
    for layer in cache.layers:
        kept = jnp.concatenate([layer.pos, layer.window_pos[:, None].repeat(layer.pos.shape[1], 1)], axis=2)
        lines.append(jax.nn.one_hot(kept[0], middle).sum(axis=1))
    picture = np.concatenate(lines)
    ax.imshow(picture, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set(title=f"{name.removesuffix('@36')}: {picture.sum(axis=1).mean():.1f} tokens a head",
           xlabel="token of the prompt")  # fmt: skip
    ax.grid(visible=False)
axes[0].set_yticks(np.arange(config.layers) * config.kv_heads, labels=[f"layer {i}" for i in range(config.layers)])
axes[0].set(ylabel="heads of the layers")
display(Image(save(drawing, "png")))
