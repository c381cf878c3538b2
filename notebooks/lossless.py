# %% [markdown]
# # Where the thirty percent hide
#
# Trained weights are usually kept in bfloat16: a sign, 8 bits of exponent, 7 of mantissa. Two papers, DFloat11 and
# ECF8, store them in about 11 bits and get every bit back. No weight is rounded; the model says exactly what it said
# before. So five bits of sixteen must have been empty. Which ones?
#
# The model is stories260K, a small published language model; `$HASHML_DATA` must have it.

# %%
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import polars as pl
from IPython.display import Image, display

from experiments.data import stories
from experiments.lab import new_figure
from experiments.lab.figures import save
from hashml.accounting import stored_bytes
from hashml.coding import canonical_codes, code_lengths, entropy
from hashml.models.decoder import forward
from hashml.models.tokenization import decode as to_text
from hashml.weights import (
    DFLOAT11,
    CompressedArray,
    bits_per_weight,
    compress_decoder,
    compressed_forward,
    decode_host,
    encode,
    entropy_limit,
)

params, config, tokenizer = stories.load()
params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
matrix = np.asarray(params["layers"]["down"][2])
words = matrix.view(np.uint16)
print("one matrix of a layer:", matrix.shape, matrix.dtype)
print("its first weights:", *(f"{word:016b}" for word in words[0, :4]))

# %% [markdown]
# ## The picture: one matrix, bit by bit
#
# Each image is the same matrix, and shows one bit of every weight. A bit that is 1 half of the time, whatever stands
# beside it, looks like noise and cannot be stored in less than a bit. The sign is noise, and so is the mantissa. The
# first bits of the exponent are the same nearly everywhere: trained weights are small numbers of similar size.

# %%
names = ["sign"] + [f"exponent {i}" for i in range(1, 9)] + [f"mantissa {i}" for i in range(1, 8)]
drawing, axes = new_figure(8, 2, width=13, height=8.4)
for place, (ax, name) in enumerate(zip(axes, names, strict=True)):
    bit = words >> (15 - place) & 1
    ax.imshow(bit, cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    ax.set_title(f"{name}\n{entropy(np.bincount(bit.reshape(-1), minlength=2)):.2f} bits", fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
display(Image(save(drawing, "png")))

# %% [markdown]
# The bits of an exponent are not independent either: taken together they have less entropy than the sum of their
# titles. An exponent is the octave of a weight, `floor(log2 |w|)`. More than half of a bell curve lies in two
# octaves, and each octave further down has about half as much as the one before.

# %%
fields = {"sign": words >> 15, "exponent": words >> 7 & 0xFF, "mantissa": words & 0x7F}
for name, field in fields.items():
    counts = np.bincount(field.reshape(-1))
    print(f"{name:8s} {np.count_nonzero(counts):3d} values occur, {entropy(counts):.2f} bits of entropy")

exponents = fields["exponent"].reshape(-1).astype(np.uint8)
counts = np.bincount(exponents, minlength=256)
lengths = code_lengths(counts, 12)
codes = canonical_codes(lengths)
pl.Config.set_tbl_hide_dataframe_shape(True)
pl.Config.set_tbl_rows(-1)
common = [e for e in np.argsort(-counts, kind="stable") if counts[e]]
pl.DataFrame(
    {
        "exponent": [int(e) for e in common],
        "octave": [f"2^{e - 127} to 2^{e - 126}" for e in common],
        "weights": [int(counts[e]) for e in common],
        "bits by its share": [round(float(-np.log2(counts[e] / counts.sum())), 2) for e in common],
        "Huffman's word": [f"{codes[e]:0{lengths[e]}b}" for e in common],
    }
)

# %% [markdown]
# ## The account
#
# A word for each exponent, and sign and mantissa as they are, a byte. What else is stored is the price of decoding in
# parallel: where some of the words begin, and which word belongs to which exponent.

# %%
compressed = encode(matrix, DFLOAT11)
meaning = {
    "words": "exponents, as Huffman's words",
    "bases": "where segments begin",
    "starts": "where chunks of about 512 weights begin",
    "lengths": "the code itself",
    "rest": "sign and mantissa",
}
for name, part in compressed.parts.items():
    print(f"{8 * part.nbytes / matrix.size:7.3f} bits a weight  {meaning[name]}")
print(f"{bits_per_weight(compressed):7.3f} in all, of 16: {bits_per_weight(compressed) / 16:.1%}")
print(f"{entropy_limit(matrix):7.3f} is the least for a code of single exponents")

# %% [markdown]
# ## The same bits
#
# Equal numbers are not enough: `0.0 == -0.0`, and NaN equals nothing, not even itself. So all 65,536 patterns of 16
# bits are coded, beside the matrix, and compared as integers.

# %%
every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
mixed = np.concatenate([every, matrix.reshape(-1).repeat(20)])
small = encode(mixed, DFLOAT11)
print("all patterns:", small.geometry.coder, (decode_host(small).view(np.uint16) == mixed.view(np.uint16)).all())

random_bits = np.frombuffer(np.random.default_rng(0).bytes(2 * 2**16), ml_dtypes.bfloat16)
print("random bits: ", encode(random_bits, DFLOAT11).geometry.coder, bits_per_weight(encode(random_bits, DFLOAT11)))

# %% [markdown]
# Random bits are the control: nothing hides there, and the codec leaves them alone.
#
# ## A model that stays compressed
#
# `compress_decoder` codes every matrix of the model, and `compressed_forward` decodes one layer at a time inside the
# program, uses it and forgets it. The arithmetic after that is the same, on the same bits.

# %%
packed = compress_decoder(params, DFLOAT11)
prompt = jnp.asarray([tokenizer.encode("Once upon a time, there was a dog named Tim. He liked to")], jnp.int32)
plain = np.asarray(forward(params, config, prompt))
found = np.asarray(compressed_forward(jax.device_put(packed), config, prompt))
print(f"{stored_bytes(params):,} bytes, compressed {stored_bytes(packed):,}: "
      f"{stored_bytes(packed) / stored_bytes(params):.1%}")  # fmt: skip
print(f"{(plain.view(np.uint32) != found.view(np.uint32)).sum()} of {plain.size:,} logits have another bit")
print("both go on with", repr(to_text(tokenizer, [int(found[0, -1].argmax())])))

# %% [markdown]
# Here is every kind of matrix of the first layer, and the embedding. They differ by the entropy of their exponents;
# what words, entrances and code cost beyond it is about a tenth of a bit each time.

# %%
layer = {name: np.asarray(leaf[0]) for name, leaf in params["layers"].items() if leaf.ndim == 3}
arrays = layer | {"embedding": np.asarray(params["embedding"])}
rows = {name: encode(array, DFLOAT11) for name, array in arrays.items()}
assert all(isinstance(row, CompressedArray) for row in rows.values())
pl.DataFrame(
    {
        "matrix": [*rows],
        "weights": [array.size for array in arrays.values()],
        "exponents": [len(np.unique(array.view(np.uint16) >> 7 & 0xFF)) for array in arrays.values()],
        "limit, bits": [round(entropy_limit(array), 2) for array in arrays.values()],
        "stored, bits": [round(bits_per_weight(row), 2) for row in rows.values()],
        "of bfloat16": [f"{bits_per_weight(row) / 16:.1%}" for row in rows.values()],
    }
)
