"""Rotary position embedding, RoPE (Su et al. 2021, arXiv 2104.09864), with the scalings of Llama checkpoints.

A head of width ``D`` is ``D / 2`` pairs of coordinates, and pair ``i`` of a token at position ``p`` is turned by

    angle[p, i] = p * frequency[i],         frequency[i] = theta ** (-2 i / D)
    (a, b) -> (a cos - b sin, a sin + b cos)

so that ``q . k`` of two rotated vectors depends on the difference of their positions alone. Which coordinates
make a pair is a convention of the checkpoint:

    "half"          (i, i + D/2)        GPT-NeoX, and every Llama, Mistral, Qwen folder of Hugging Face
    "interleaved"   (2i, 2i + 1)        the paper, Meta's own files, llama2.c

The two are one map up to the order of the coordinates: ``x_half = x_interleaved[order]`` with
``order = half_from_interleaved(D)`` (all even coordinates, then all odd ones). Applied to the output columns of
the query and key projections, head by head, it turns a checkpoint of one convention into one of the other with
the same inner products; this is the permutation of Hugging Face's conversion scripts.

``scaling`` slows pairs down for contexts longer than those of training:
``("linear", factor)`` divides every frequency (Chen et al. 2023, arXiv 2306.15595), and
``("llama3", factor, low, high, context)`` divides those whose wavelength exceeds ``context / low``, keeps those
below ``context / high``, and goes linearly in between, in ``context / wavelength`` (Llama 3.1).

Frequencies are rounded to float32 where transformers rounds them: a last bit of them, times thousands of positions,
would be seen in logits.
"""

import dataclasses
import math
import sys
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_SCALINGS = {"linear": ("factor",), "llama3": ("factor", "low", "high", "context")}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What fixes the rotation; hashable, hence static under `jax.jit`.

    Attributes:
        theta: base of the frequencies.
        pairs: which coordinates turn together, as above.
        scaling: ``None``, ``("linear", factor)`` or ``("llama3", factor, low, high, context)``.

    Raises:
        ValueError: for values outside these.
    """

    theta: float | int = 10000.0
    pairs: Literal["half", "interleaved"] = "half"
    scaling: tuple | None = None

    def __post_init__(self) -> None:
        if not 0 < self.theta <= sys.float_info.max:
            raise ValueError(f"theta is {self.theta}; a base is positive and finite")
        if self.pairs not in ("half", "interleaved"):
            raise ValueError(f"pairs is {self.pairs!r}; allowed are 'half' and 'interleaved'")
        if self.scaling is None:
            return
        allowed = "; ".join(str((name, *fields)).replace("'", "") for name, fields in _SCALINGS.items())
        name, *values = self.scaling or ("",)
        if name not in _SCALINGS or len(values) != len(_SCALINGS[name]):
            raise ValueError(f"scaling is {self.scaling!r}; allowed are None; {allowed}")
        if not all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values):
            raise ValueError(f"scaling is {self.scaling!r}; its numbers are positive and finite")
        if name == "llama3" and not values[1] < values[2]:
            raise ValueError(f"scaling is {self.scaling!r}; its low, {values[1]}, is less than its high, {values[2]}")

    def frequencies(self, width: int) -> np.ndarray:
        """float32 ``[width / 2]``, radians a position; found on the host, in float32 but for the power.

        Raises:
            ValueError: if ``width`` is odd or not positive.
        """
        if width <= 0 or width % 2:
            raise ValueError(f"width is {width}; a head is rotated in pairs, so its width is even and positive")
        exponent = np.arange(0, width, 2).astype(np.float32) / np.float32(width)
        with np.errstate(over="ignore"):  # of a huge base; its pairs stand still
            inverse = (float(np.float32(self.theta)) ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / inverse
        if self.scaling is not None and self.scaling[0] == "linear":
            frequency = frequency / np.float32(self.scaling[1])
        elif self.scaling is not None:
            factor, low, high, context = np.array(self.scaling[1:], np.float32)
            turns = context * frequency / np.float32(2 * math.pi)  # of the pair within the old context
            kept = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
            frequency = kept * frequency + (1 - kept) * frequency / factor
        return frequency

    def rotate(self, x: Float[Array, "B H n D"], positions: Int[Array, "B #H n"]) -> Float[Array, "B H n D"]:
        """``x`` turned to its positions, in ``x``'s dtype; angles, sines and products are float32.

        Args:
            x: queries or keys.
            positions: of each token, or of each token and head. Any integer is allowed: those that mark
                padding (-1) give finite numbers that nobody reads.

        Raises:
            ValueError: if ``D`` is odd.
        """
        angles = positions[..., None].astype(jnp.float32) * self.frequencies(x.shape[-1])
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        x32 = x.astype(jnp.float32)
        if self.pairs == "half":
            a, b = jnp.split(x32, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        else:
            a, b = x32[..., 0::2], x32[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)
        return turned.astype(x.dtype)


def half_from_interleaved(width: int) -> np.ndarray:
    """The order int ``[width]`` with ``x_half = x_interleaved[order]``: even coordinates, then odd ones."""
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
