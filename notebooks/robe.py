# %% [markdown]
# # ROBE: a table that is not there
#
# The embedding tables of a recommender can have more than a hundred million rows. ROBE (Desai, Chou and Shrivastava,
# *Random Offset Block Embedding Array*, MLSys 2022, [arXiv 2108.02191](https://arxiv.org/abs/2108.02191)) stores none
# of them. It stores one short array, the *memory*, and a hash function says which parts of it make up a row:
#
# $$\mathrm{row}[e, t] = \mathrm{memory}\big[(h(e, \lfloor t / Z \rfloor) + t \bmod Z) \bmod \mathrm{budget}\big]$$
#
# Row $e$ is cut in blocks of $Z$ coordinates; each block is one run of the memory, from a hashed offset on, and the
# memory is a circle. There are far more rows than weights, so rows must share them. How often, what does the block
# size change, and what does it cost? That is all this notebook is about.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax import linen as nn
from IPython.display import Image, display
from matplotlib.patches import Patch, Wedge

from experiments.lab import new_figure, standard_error
from experiments.lab.figures import draw, save
from hashml.accounting import compression, format_bytes, stored_bytes
from hashml.sharing import RobeEmbed, block_map, robe_lookup

# %% [markdown]
# ## The lookup
#
# A memory of 128 weights, and three rows of 32 coordinates read from it. Any id has a row, and always the same one:
# nothing had to be stored for row 123,456,789.

# %%
budget, features = 128, 32
memory = np.random.default_rng(0).standard_normal(budget, np.float32)
rows = robe_lookup(memory, np.array([7, 123_456_789, 7]), features=features, block_size=16)
print(rows.shape, "first and last row equal:", bool((rows[0] == rows[2]).all()))

# %% [markdown]
# Where does a row lie? Let the memory hold its own indices, and the lookup itself tells. A block is a run of 16
# neighbours, and one that reaches the end goes on at slot 0. Rows 7 and 8 already share weights: look for 57 to 68.

# %%
indices = jnp.arange(budget, dtype=jnp.float32)
for row in robe_lookup(indices, np.array([7, 8]), features=features, block_size=16).astype(int):
    print(*row[:16], "  |  ", *row[16:])

# %% [markdown]
# ## How often do two rows share weights?
#
# A coordinate of one row and a coordinate of another lie in the same slot with probability $1 / m$, where $m$ is the
# budget. Two rows of $d$ coordinates therefore have $d^2 / m$ such coincidences on average, and the block size has no
# say in it. What it changes is *how* they come: two runs of $Z$ on a circle of $m$ meet with probability
# $(2Z - 1) / m$, and then have $Z^2 / (2Z - 1)$ weights in common. With longer blocks there are fewer runs that could
# meet, each meeting is more thorough, and more pairs of rows share nothing at all.
#
# Below are 10,000 pairs of rows: each mean with its standard error and, in brackets, the theory.

# %%
ids = np.arange(20_000)


def virtual_table(block_size, wrap="circular"):
    """The map from the memory to a table with a row for each id."""
    return block_map(len(ids), features, budget, block_size=block_size, sign="element", wrap=wrap)


def same_slot(block_size):
    """Entry [p, i, j] tells whether coordinate i of row 2p and j of row 2p + 1 lie in one slot."""
    slots = virtual_table(block_size).slots(ids)
    return slots[0::2, :, None] == slots[1::2, None, :]


def against(values, theory):
    return f"{values.mean():.3g} ± {standard_error(values):.1g} ({theory:.3g})"


def show(table):
    with pl.Config(tbl_hide_column_data_types=True, tbl_hide_dataframe_shape=True, tbl_rows=-1, float_precision=2):
        display(table)


measured = []
for Z in (1, 4, 16):
    shared = same_slot(Z)
    by_blocks = shared.reshape(-1, features // Z, Z, features // Z, Z).sum(axis=(2, 4))
    measured.append(
        {
            "Z": Z,
            "coincidences of two rows": against(shared.sum(axis=(1, 2)), features**2 / budget),
            "two blocks meet (%)": against(100 * (by_blocks > 0).mean(axis=(1, 2)), 100 * (2 * Z - 1) / budget),
            "weights then in common": against(by_blocks[by_blocks > 0], Z**2 / (2 * Z - 1)),
            "pairs that share nothing (%)": f"{100 * (1 - shared.any(axis=(1, 2)).mean()):.1f}",
        }
    )
show(pl.DataFrame(measured))

# %% [markdown]
# ## What sharing costs: the variance law
#
# Sharing is harmless as long as it leaves the geometry alone, and the paper's measure of that is the inner product.
# Fold a vector $x$ into the memory, as the backward pass of a lookup does with a gradient: each $x_i$, times a random
# sign, is added to the slot of coordinate $i$. Do the same with $y$. On average over hash functions the inner product
# of the two folded vectors is $\langle x, y \rangle$, but it errs wherever two coordinates *of the same row* fall
# into one slot. (The signs let these errors cancel; the authors' code has none, here they are `sign="element"`.)
#
# $$\mathrm{Var} = \sum_{i \neq j} P(i \text{ meets } j) \, \big(x_i^2 y_j^2 + x_i y_i \, x_j y_j\big)$$
#
# Here the block size comes in. Coordinates of different blocks meet with probability $1 / m$, but those of one block
# lie side by side and *never* meet: their terms drop out, and the variance falls as $Z$ grows. This is the paper's
# theorem, written as a sum over pairs.
#
# It also shows why the memory is a circle. The kernels that came with the paper do not wrap: their blocks start in
# one of $m - Z + 1$ places, and the slots near both ends are used less. Two coordinates at places $s$ and $t$ of
# their blocks then meet with probability $(m - Z + 1 - |s - t|) / (m - Z + 1)^2$. On average that is more than
# $1 / m$, since what is missing at the ends crowds the middle.


# %%
def law(x, y, block_size, wrap):
    """Variance of the inner product of the folded vectors, over hash functions."""
    block, place = np.divmod(np.arange(features), block_size)
    starts = budget if wrap == "circular" else budget - block_size + 1
    overlap = starts if wrap == "circular" else starts - abs(place[:, None] - place)
    meet = np.where(block[:, None] == block, 0, overlap / starts**2)
    return (meet * (np.outer(x**2, y**2) + np.outer(x * y, x * y))).sum()


def fold(vector, table):
    """The vector folded by every row of the table, each of which is placed by a hash of its own."""
    folded = np.zeros((len(ids), budget))
    np.add.at(folded, (ids[:, None], table.slots(ids)), table.signs(ids) * vector)
    return folded


rng = np.random.default_rng(0)
x = rng.standard_normal(features)
y = 0.5 * x + rng.standard_normal(features)

table = virtual_table(16)
same = np.allclose(fold(x, table)[7], table.pull_rows(x[None], ids[7:8]))
print("row 7 folds as the library's gradient does:", same)

points = []
for wrap in ("circular", "none"):
    for Z in (1, 2, 4, 8, 16, 32):
        table = virtual_table(Z, wrap)
        products = (fold(x, table) * fold(y, table)).sum(axis=1)
        squares = (products - products.mean()) ** 2
        point = {"wrap": wrap, "Z": Z, "mean": products.mean(), "⟨x, y⟩": x @ y, "variance": squares.mean()}
        points.append(point | {"standard error": standard_error(squares), "law": law(x, y, Z, wrap)})
variances = pl.DataFrame(points)
show(variances)

# %% [markdown]
# At $Z = 32$ a row is a single block: it is moved, never folded, and nothing is lost. Do not expect as much of a
# whole table. Of all pairs of its $n$ coordinates, only a share of $(Z - 1) / (n - 1)$ lies within blocks. There the
# law says something more modest and more useful: reading runs of $Z$ neighbours, which hardware does far faster than
# $Z$ scattered reads, costs nothing in variance.
#
# ## The picture
#
# Each circle is the memory. The coordinates of one row stand outside it and those of another inside, each on its
# slot; slots that serve both rows are black. Both pairs of rows share eight weights. With $Z = 1$ these are
# scattered, and each row also falls on itself here and there (in orange): that is where inner products go wrong. With
# $Z = 16$ the eight come in one run, and as no block falls on itself, most rows do not. Hence the variance, on the
# right, goes down.


# %%
def draw_memory(axes, block_size, step=0.14):
    """Two rows that share eight weights, one outside the memory and one inside; each is like the median row."""
    slots = virtual_table(block_size).slots(ids)
    distinct = np.array([np.unique(row).size for row in slots])
    shared = np.array([np.intersect1d(*pair).size for pair in slots.reshape(-1, 2, features)])
    usual = (distinct.reshape(-1, 2) == np.median(distinct)).all(axis=1)
    first = np.argmax(usual & (shared == 8))
    outside, inside = (np.bincount(row, minlength=budget) for row in slots[2 * first : 2 * first + 2])

    def cell(radius, slot, width, color):
        end = 90 - 360 * slot / budget  # clockwise, slot 0 on top
        shape = Wedge((0, 0), radius, end - 360 / budget, end, width=width, linewidth=0.4)
        axes.add_patch(shape).set(facecolor=color, edgecolor="white")

    for slot in range(budget):
        cell(1.0, slot, 0.1, "black" if outside[slot] and inside[slot] else "0.86")
        for level in range(outside[slot]):
            cell(1.0 + step * (level + 1), slot, step, "C0" if outside[slot] == 1 else "C1")
        for level in range(inside[slot]):
            cell(0.9 - step * level, slot, step, "C2" if inside[slot] == 1 else "C1")
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
    axes.set_axis_off()
    axes.set_title(f"two rows in blocks of Z = {block_size}", loc="center")


def picture(variances):
    figure, (scattered, in_runs, curve) = new_figure(columns=3, width=10.8, height=3.7, width_ratios=(1, 1, 1.1))
    draw_memory(scattered, 1)
    draw_memory(in_runs, 16)
    keys = {"C0": "one row", "C2": "another", "black": "shared by both", "C1": "a row on itself"}
    in_runs.legend(handles=[Patch(color=color, label=label) for color, label in keys.items()], loc="center")
    for color, wrap, label in (("C3", "none", "no wrap"), ("C0", "circular", "circular memory")):
        line = variances.filter(pl.col("wrap") == wrap)
        curve.plot(line["Z"], line["law"], color=color, marker="none")
        curve.errorbar(line["Z"], line["variance"], line["standard error"], color=color, fmt="o", label=label)
    curve.set(title="error of inner products", xlabel="block size Z", ylabel="variance", xscale="log")
    curve.set_ylim(bottom=0)
    curve.set_xticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
    curve.minorticks_off()
    curve.legend(loc="lower left", title="measured; the lines are the law", alignment="left")
    return figure


image = save(draw(picture, variances), "png")
display(Image(image, width=960))

# %% [markdown]
# ## The bytes
#
# In a model, `RobeEmbed` takes the place of `flax.linen.Embed`. What each of them stores is read off its arrays; the
# hash function is a seed, and takes no room.

# %%
full = nn.Embed(num_embeddings=10_000_000, features=features)
robe = RobeEmbed(num_embeddings=10_000_000, features=features, compression=1000, block_size=16)
shapes = [jax.eval_shape(module.init, jax.random.key(0), ids) for module in (full, robe)]
print("full table: ", format_bytes(stored_bytes(shapes[0])))
print("ROBE:       ", format_bytes(stored_bytes(shapes[1])))
print("compression:", f"{compression(*shapes):g}")
