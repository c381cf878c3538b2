# %% [markdown]
# # ROAST: your model in a memory of your choosing
#
# Randomized parameter sharing trains a network whose weights are not stored. One short array, the *memory*, is; a
# hash says which of its slots each weight of each layer reads (Desai, Zhou and Shrivastava, ICML 2023,
# [arXiv 2207.10702](https://arxiv.org/abs/2207.10702)). `share` does it to any Flax module, without editing it.
#
# Below is a small network for handwritten digits. Put a model of your own in its place: nothing else has to change.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from flax import linen as nn
from IPython.display import Image, display
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits

from experiments.lab import new_figure
from experiments.lab.figures import draw, save
from hashml.accounting import format_bytes
from hashml.sharing import fold_map, gradient_scaler, scale_by_sharing, share


class Digits(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(96, name="first")(x))
        x = nn.relu(nn.Dense(96, name="second")(x))
        return nn.Dense(10, name="head")(x)


model = Digits()
images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 8 - 1, jnp.float32), jnp.asarray(labels)
test = slice(1200, None)

# %% [markdown]
# ## One line
#
# `share` wants initial variables: they say the shapes, and how large the weights of each layer should start.
# Biases stay as they are, and count. What it made of the model is a table, and the bytes are read off arrays.

# %%
dense = model.init(jax.random.key(0), x[:1])
shared = share(model, dense, compression=20)
for row in shared.report():
    print(f"{row.name:15s} {row.shape!s:9s} {row.stored}")
print(f"{format_bytes(shared.dense_bytes)} become {format_bytes(shared.stored_bytes)}: {shared.compression:.1f}x")
print("the memory holds", shared.budget, "weights")

# %% [markdown]
# It is called as the model is called. At compression 1 it *is* the model, bit for bit.

# %%
variables = shared.init(jax.random.key(0), x[:1])
print("logits:", shared.apply(variables, x[:3]).shape)
whole = share(model, dense, compression=1)
same = whole.apply(whole.init(jax.random.key(0), x[:1]), x) == model.apply(dense, x)
print("compression 1 gives the model's own outputs:", bool(same.all()))

# %% [markdown]
# ## Where a weight lies
#
# The default map is the *fold* (RANDOMFOLD, [arXiv 2310.11611](https://arxiv.org/abs/2310.11611)). Lay all weights of
# the model in a row, cut the row in pieces as long as the memory, and rotate each piece by a hash. Below, every line
# is one such piece, a mark where it begins, and a column is a slot of the memory: it serves the weights above it, one
# a line, from whatever
# layer they come. No slot is idle and none is crowded. Under a hash of every single weight, on the right, the number
# of weights that a slot serves varies as chance has it; without compression a share of $1/e$ of the memory is idle.


# %%
def pieces(shared):
    """Which layer each slot serves in each piece, -1 behind the last weight; and the slots where pieces begin."""
    leaves = shared.leaves
    positions = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    owner = np.concatenate([np.full(int(np.prod(leaf.shape)), number) for number, leaf in enumerate(leaves)])
    slots = fold_map(1, positions, shared.budget, seed=shared.placement.seed).slots(np.zeros(1, int))[0]
    grid = np.full((-(-positions // shared.budget), shared.budget), -1)
    grid[np.arange(positions) // shared.budget, slots] = owner
    return grid, slots[:: shared.budget]


grid, beginnings = pieces(shared)
load = (grid >= 0).sum(axis=0)
print("a slot serves", load.min(), "or", load.max(), "weights")

elements = share(model, dense, budget=shared.budget, map="element")
hashed = sum(elements.placement.load(leaf.shape, leaf.offset) for leaf in elements.leaves)
loose = share(model, dense, compression=1, map="element")
idle = sum(loose.placement.load(leaf.shape, leaf.offset) for leaf in loose.leaves) == 0
print("hashed one by one:", hashed.min(), "to", hashed.max())
print(f"idle slots without compression: {idle.mean():.0%} (1/e is 37%)")

# %% [markdown]
# ## What it costs
#
# Training needs one thing more. A slot's gradient is a sum over the weights that it serves, so that steps would grow
# with the compression; `gradient_scaler` divides it away before the momentum. What remains is searched as for any
# model: the best learning rate grows with the compression, and each gets its own here, among four, on a part of the
# training images. A smaller network of as many bytes has the same search.


# %%
RATES = jnp.array([0.03, 0.1, 0.3, 1.0])


def fit(apply, params, transformation, steps=200, batch=100):
    """Parameters after SGD with momentum and a cosine schedule, for every rate side by side."""
    shuffled = [np.random.default_rng(epoch).permutation(1000) for epoch in range(steps * batch // 1000)]
    batches = jnp.asarray(np.concatenate(shuffled).reshape(steps, batch))

    def one(rate):
        optimizer = optax.chain(transformation, optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9))

        def step(state, rows):
            def loss(params):
                logits = apply({"params": params}, x[rows])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

            updates, memory = optimizer.update(jax.grad(loss)(state[0]), state[1], state[0])
            return (optax.apply_updates(state[0], updates), memory), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    return jax.jit(jax.vmap(one))(RATES)


def best(apply, params, transformation=None):
    """Test accuracy at the rate that is best on the last 200 training images."""
    fitted = fit(apply, params, transformation or optax.identity())
    right = jax.jit(jax.vmap(lambda params: apply({"params": params}, x).argmax(-1) == y))(fitted)
    chosen = right[:, 1000:1200].mean(1).argmax()
    return float(right[chosen, test].mean())


class Small(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


def widest(floats):
    """The widest network of two hidden layers that has at most so many weights and biases."""
    return max(w for w in range(1, 97) if (64 + 1) * w + (w + 1) * w + (w + 1) * 10 <= floats)


points = [{"contender": "dense", "compression": 1, "accuracy": best(model.apply, dense["params"])}]
for compression in (4, 16, 50):
    one = share(model, dense, compression=compression)
    params = one.init(jax.random.key(1), x[:1])["params"]
    found = best(one.apply, params, scale_by_sharing(gradient_scaler(one)))
    points.append({"contender": "shared", "compression": compression, "accuracy": found})
    small = Small(widest(one.stored_bytes // 4))
    found = best(small.apply, small.init(jax.random.key(1), x[:1])["params"])
    points.append({"contender": "smaller network", "compression": compression, "accuracy": found})
scores = pl.DataFrame(points)


# %%
def picture(scores):
    figure, (left, middle, right) = new_figure(columns=3, width=11.0, height=3.6, width_ratios=(1.5, 1, 1))
    colors = ListedColormap(["white", "C0", "C1", "C2"])
    left.imshow(grid, aspect="auto", interpolation="nearest", cmap=colors, vmin=-1, vmax=2)
    left.set(xlabel="slot of the memory", ylabel="piece of the model")
    for number, leaf in enumerate(shared.leaves):
        left.plot([], [], "s", color=f"C{number}", label=leaf.path[0])
    left.plot(beginnings, range(len(beginnings)), "k|", markersize=8, label="a piece begins")
    left.grid(visible=False)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=4)
    bins = np.arange(hashed.max() + 2) - 0.5
    middle.hist(hashed, bins, color="0.7", label="hashed one by one")
    middle.hist(load, bins, color="C0", label="fold")
    middle.set(xlabel="weights that a slot serves", ylabel="slots", yscale="log")
    middle.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08))
    middle.set_title("")
    sizes = [4, 16, 50]
    for (name,), line in scores.group_by("contender", maintain_order=True):
        if name == "dense":
            right.axhline(100 * line["accuracy"][0], color="0.4", linestyle="--", label=name)
        else:
            right.plot(line["compression"], 100 * line["accuracy"], marker="o", label=name)
    right.set(title="digits", xlabel="compression, measured in bytes", ylabel="test accuracy, %", xscale="log")
    right.set_xticks(sizes, labels=[str(size) for size in sizes])
    right.minorticks_off()
    right.legend()
    return figure


display(Image(save(draw(picture, scores), "png"), width=960))

# %% [markdown]
# One run each on 597 test images: a difference of two points means nothing here. The experiments
# `sharing.stable_rps` and `sharing.roast` measure with several seeds, against pruning too, and say which of the
# papers' claims hold.
