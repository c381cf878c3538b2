"""DFloat11: 70% size, 100% accuracy (Zhang, Hariri, Zhong, Chaudhary, Sui, Hu, Shrivastava, NeurIPS 2025).

A bfloat16 weight is a sign, 8 bits of exponent and 7 of mantissa. Sign and mantissa of trained weights look random;
the exponent has about 2.6 bits of entropy. It is Huffman-coded, the rest is kept as a byte, and a block's weights are
decoded just before its products: about 11 bits a weight, and every output is the same to the bit.

    bits a weight = 8 + L (1 + 5/64) + 32 L / 32768 + table        L: mean length of a code, H(exponent) <= L

That is the reference's layout, which `reference_fields` writes and `from_reference` reads: one code for all matrices
of a transformer block. Departures: `DFLOAT11` has a code for each tensor, since a mixture of scales has more entropy
(2.5 to 3.2 bits when scales spread by 20), and it stores chunks of equally many symbols, whose entrances cost 0.04
bits and not 0.2, with codes limited to 12 bits by package-merge. float16 is served, too; with 5 bits of exponent it
gains little. arXiv 2504.11651.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from hashml.weights.float_split import FORMATS, from_bits, join, split, to_bits
from hashml.weights.gap_layout import Gaps, decode_gaps_host, encode_gaps
from hashml.weights.lossless import Codec

DFLOAT11 = Codec("dfloat11", ("bfloat16", "float16"))
_FORM = FORMATS["bfloat16"]
_LIMIT = 32


def reference_fields(weights: Mapping[str, Shaped[Array | np.ndarray, "..."]]) -> dict[str, np.ndarray]:
    """The tensors by which the reference stores a unit, such as the matrices of one transformer block.

    Args:
        weights: bfloat16 arrays, which are flattened and joined in this order under one code.

    Returns:
        ``luts``, ``encoded_exponent``, ``sign_mantissa``, ``output_positions``, ``gaps`` and ``split_positions``.

    Raises:
        ValueError: for another dtype, and for what the layout cannot hold, such as exponents from 240 on.
    """
    for name, array in weights.items():
        if jnp.dtype(array.dtype).name != _FORM.name:
            raise ValueError(
                f"weights[{name!r}] is of dtype {array.dtype}; the reference's layout is for {_FORM.name}"
            )
    flat = [np.asarray(to_bits(np.asarray(array))) for array in weights.values()]
    if not flat:
        raise ValueError("weights is empty; a unit has at least one array")
    symbols, rest = (np.asarray(part) for part in split(np.concatenate(flat), _FORM))
    stream, gaps, positions, luts = map(np.asarray, encode_gaps(symbols, _LIMIT))
    return {
        "luts": luts,
        "encoded_exponent": stream,
        "sign_mantissa": rest,
        "output_positions": positions,
        "gaps": gaps,
        "split_positions": np.cumsum([len(one) for one in flat])[:-1].astype(np.int64),
    }


def from_reference(fields: Mapping[str, Any]) -> list[np.ndarray]:
    """The flat bfloat16 arrays of a unit, in their order.

    Raises:
        ValueError: for missing fields, and for fields that contradict each other.
    """
    names = ("encoded_exponent", "gaps", "output_positions", "luts", "sign_mantissa", "split_positions")
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"fields lacks {', '.join(missing)}; a unit has {', '.join(names)}")
    *coded, rest, positions = (np.asarray(fields[name]) for name in names)
    symbols = decode_gaps_host(Gaps(*coded), len(rest), _LIMIT)
    return np.split(from_bits(join(symbols, rest, _FORM), _FORM, rest.shape), positions)


def size_formula(mean_length: float, count: int, lut_rows: int) -> float:
    """Bits a weight of the reference's layout, but for what rounding up to bytes and blocks adds."""
    return 8 + mean_length * (1 + 5 / 64) + 32 * mean_length / 32768 + 8 * 256 * lut_rows / count
