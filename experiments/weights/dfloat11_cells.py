"""What `experiments.weights.dfloat11` counts and times: bits of arrays and of blocks, logits, decoders."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kvcache import fixtures
from experiments.lab import interleave
from experiments.weights.trained_weights import arrays, cast, layer_of
from hashml.accounting import stored_bytes
from hashml.coding import huffman_native
from hashml.coding.huffman import code_lengths, entropy
from hashml.models.decoder import DecoderConfig, Params, forward
from hashml.weights.dfloat11 import DFLOAT11, reference_fields
from hashml.weights.ecf8 import ECF8
from hashml.weights.float_split import float_format, split, to_bits
from hashml.weights.forward import compress_decoder, compressed_forward, dense
from hashml.weights.lossless import (
    Codec,
    CompressedArray,
    bits_per_weight,
    decode,
    decode_host,
    encode,
    entropy_limit,
)

Row = dict[str, float | int | str | None]
CODERS = ("huffman", "gaps", "fixed_rate")
BYTES = ("zlib", "zlib_planes", "zstd", "zstd_planes", "zipnn")
"""Codecs of bytes: of the array as it lies, or of all first bytes and then all second ones; ZipNN knows floats."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "f1_relu_gqa", "stories", "minilm", "control")
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    seeds: int = 3
    """Of f1 and of the control; of the others there is one model."""
    size: fixtures.Size = fixtures.DEFAULT
    weights: int = 2**24
    """Gaussian weights that are decoded against the clock."""
    peers: tuple[str, ...] = ("zlib", "zstd", "zstd_planes", "zipnn")
    tokens: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    """Of a timed forward pass of f1, in sequences of 16."""
    repetitions: int = 11


def has_peer(name: str) -> bool:
    """Whether the codec of bytes is installed (`make peers`)."""
    package = name.removesuffix("_planes")
    return importlib.util.find_spec("zstandard" if package == "zstd" else package) is not None


# --- bits ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def model_arrays(size: fixtures.Size, model: str, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a model, kept while its rows are measured."""
    return arrays(size, model, seed)


def coded_by(coder: str, dtype: str) -> Codec:
    """float16's symbols have three bits of mantissa, and 3 bits would hold half an octave of them."""
    return dataclasses.replace(DFLOAT11, coder=coder, rate=6 if dtype == "float16" else 3)


def array_bits(size: fixtures.Size, model: str, seed: int, dtype: str, name: str) -> Row:
    """Bits a weight of one array by every coder, all side arrays counted, and how many weights come back changed."""
    array = cast(model_arrays(size, model, seed)[name], dtype, name)
    symbols = np.asarray(split(to_bits(array), float_format(dtype))[0])
    counts = np.bincount(symbols, minlength=256)
    form = float_format(dtype)
    exponents = np.bincount(symbols >> (form.mantissa_bits - form.low), minlength=256)
    compressed = {coder: encode(array, coded_by(coder, dtype)) for coder in CODERS}
    return {
        "weights": array.size,
        "dimensions": array.ndim,
        "exponent_entropy": entropy(exponents),
        "exponents": int((exponents > 0).sum()),
        "mean_length": float((counts * np.maximum(code_lengths(counts, DFLOAT11.max_length), 0)).sum() / array.size),
        "limit": entropy_limit(array),
        **{coder: bits_per_weight(one) for coder, one in compressed.items()},
        "chosen": compressed["huffman"].geometry.coder,
        "changed": sum(differing(decode_host(one), array) for one in compressed.values()),
        **{codec: 8 * byte_size(codec, array) / array.size if has_peer(codec) else None for codec in BYTES},
    }


def differing(found: np.ndarray, wanted: np.ndarray) -> int:
    """Numbers of which a bit differs."""
    words = np.dtype(f"u{wanted.itemsize}")
    return int((np.ascontiguousarray(found).view(words) != np.ascontiguousarray(wanted).view(words)).sum())


def block_bits(size: fixtures.Size, model: str, seed: int, layer: int) -> Row:
    """Bits a weight of the matrices of one transformer block: a code for each, one for all, the reference's unit."""
    found = {
        name: cast(array, "bfloat16", name)
        for name, array in model_arrays(size, model, seed).items()
        if layer_of(name) == layer and array.ndim == 2
    }
    joint = np.concatenate([array.reshape(-1) for array in found.values()])
    apart = sum(stored_bytes(encode(array, DFLOAT11)) for array in found.values())
    limit = sum(array.size * entropy_limit(array) for array in found.values())
    return {
        "weights": joint.size,
        "limit": limit / joint.size,
        "joint_limit": entropy_limit(joint),
        "apart": 8 * apart / joint.size,
        "joint": bits_per_weight(encode(joint, DFLOAT11)),
        "reference": 8 * sum(field.nbytes for field in reference_fields(found).values()) / joint.size,
    }


def exponent_counts(size: fixtures.Size, model: str, seed: int) -> Row:
    """How often each exponent occurs among the weights of the matrices, as JSON."""
    counts = np.zeros(256, np.int64)
    for name, array in model_arrays(size, model, seed).items():
        if array.ndim == 2:
            bits = to_bits(cast(array, "bfloat16", name))
            counts += np.bincount(np.asarray(split(bits, float_format("bfloat16"))[0]), minlength=256)
    return {"histogram": json.dumps({int(e): int(counts[e]) for e in np.flatnonzero(counts)})}


# --- codecs of bytes ----------------------------------------------------------------------------------


def planes(array: np.ndarray) -> bytes:
    """All first bytes of the numbers, then all second ones."""
    return array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def from_planes(content: bytes | bytearray, like: np.ndarray) -> np.ndarray:
    """What `planes` took apart."""
    found = np.frombuffer(content, np.uint8).reshape(like.itemsize, -1).T
    return np.ascontiguousarray(found).reshape(-1).view(like.dtype).reshape(like.shape)


def byte_codec(codec: str, array: np.ndarray) -> tuple[Callable[[], bytes], Callable[[bytes], np.ndarray]]:
    """Compression of an array, and what brings it back; levels are the codecs' own defaults."""
    content = planes(array) if codec.endswith("_planes") else array.tobytes()
    back = from_planes if codec.endswith("_planes") else _from_bytes
    if codec.startswith("zlib"):
        return lambda: zlib.compress(content), lambda small: back(zlib.decompress(small), array)
    if codec.startswith("zstd"):
        zstandard = importlib.import_module("zstandard")
        return (lambda: zstandard.ZstdCompressor().compress(content),
                lambda small: back(zstandard.ZstdDecompressor().decompress(small), array))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of PyTorch, which it imports
        zipnn = importlib.import_module("zipnn")
    dtype = {"bfloat16": "bfloat16", "float16": "float16"}.get(array.dtype.name, "float32")
    options = {"input_format": "byte", "bytearray_dtype": dtype, "threads": 1}
    # It takes its input apart in place.
    return (lambda: bytes(zipnn.ZipNN(**options).compress(bytearray(content))),
            lambda small: back(zipnn.ZipNN(**options).decompress(small), array))  # fmt: skip


def byte_size(codec: str, array: np.ndarray) -> int:
    """Bytes of the array by a codec of bytes; never more than it has."""
    return min(len(byte_codec(codec, array)[0]()), array.nbytes)


def _from_bytes(content: bytes | bytearray, like: np.ndarray) -> np.ndarray:
    return np.frombuffer(content, like.dtype).reshape(like.shape)


# --- logits -------------------------------------------------------------------------------------------


def decoder_of(size: fixtures.Size, model: str, seed: int, dtype: str) -> tuple[Params, DecoderConfig]:
    """A language model, cast."""
    params = fixtures.params(size, model, seed)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params), fixtures.setting(size, model, "decode").decoder


def logits_row(size: fixtures.Size, model: str, seed: int, dtype: str) -> Row:
    """How many logits differ between the model and itself compressed, and the bytes of both."""
    params, config = decoder_of(size, model, seed, dtype)
    tokens = np.random.default_rng(seed).integers(0, config.vocabulary, (2, 64)).astype(np.int32)
    compressed = jax.device_put(compress_decoder(params, DFLOAT11))
    wanted = np.asarray(forward(params, config, tokens))
    found = np.asarray(compressed_forward(compressed, config, tokens))
    return {
        "logits": wanted.size,
        "changed": differing(found, wanted),
        "bytes": stored_bytes(compressed),
        "dense_bytes": stored_bytes(params),
    }


# --- times --------------------------------------------------------------------------------------------


def forward_times(config: Config, tokens: int) -> dict[str, np.ndarray]:
    """Seconds of a forward pass of f1 with weights as they are, compressed, and of decoding all of them alone."""
    params, decoder = decoder_of(config.size, "f1", 0, "bfloat16")
    compressed = jax.device_put(compress_decoder(params, DFLOAT11))
    length = min(16, tokens)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, decoder.vocabulary, (tokens // length, length)), jnp.int32)
    functions = {
        "dense": functools.partial(forward, params, decoder, ids),
        "compressed": functools.partial(compressed_forward, compressed, decoder, ids),
        "decode": functools.partial(_decode_all, compressed),
    }
    return interleave(functions, repetitions=config.repetitions, warmup=2)


@jax.jit
def _decode_all(params: Params) -> Params:
    """All weights, one layer at a time, as inside of the forward pass."""
    others = {name: leaf for name, leaf in params.items() if name != "layers"}
    return dense(others) | {"layers": jax.lax.map(dense, params["layers"])}


def contents(config: Config) -> list[tuple[str, str]]:
    """``(weights, dtype)`` that are decoded against the clock."""
    found = [("gaussian", "bfloat16"), ("gaussian", "float8_e4m3fn")]
    return [*found, ("minilm", "bfloat16")] if "minilm" in config.models else found


def decode_methods(config: Config, dtype: str) -> list[str]:
    """What can be timed here; ZipNN is for 16 bits."""
    peers = [peer for peer in config.peers if has_peer(peer)]
    if dtype == "float8_e4m3fn":
        peers = [peer for peer in peers if peer in ("zlib", "zstd")]
    native = ["native"] if huffman_native.available() else []
    return [*native, "numpy", "xla", "xla_fixed_rate", *peers, "copy"]


def weights_of(config: Config, content: str, dtype: str) -> np.ndarray:
    """The array that is decoded: the Gaussian one is scaled into the range of 8 bits."""
    if content == "minilm":
        found = model_arrays(config.size, "minilm", 0)
        return cast(max(found.values(), key=lambda array: array.size), dtype)
    drawn = np.random.default_rng(0).standard_normal(config.weights, np.float32)
    return cast(drawn * (448 / np.abs(drawn).max() if dtype == "float8_e4m3fn" else 0.02), dtype)


def decode_times(config: Config, content: str, dtype: str) -> dict[str, tuple[np.ndarray, Row]]:
    """Seconds of every repetition of each decoder, and what does not depend on it: bytes that come out, bits a weight
    of what goes in, cores in use, and weights that come back changed."""
    array = weights_of(config, content, dtype)
    codec = ECF8 if dtype == "float8_e4m3fn" else DFLOAT11
    compressed = {name: encode(array, dataclasses.replace(codec, coder=name)) for name in ("huffman", "fixed_rate")}
    held = {name: jax.device_put(one) for name, one in compressed.items()}
    functions: dict[str, Callable[[], Any]] = {}
    bits: dict[str, float] = {}
    for method in decode_methods(config, dtype):
        functions[method], bits[method] = _decoder(method, array, compressed, held)
    checked = {name: differing(np.asarray(function()), array) for name, function in functions.items()}
    seconds = interleave(functions, repetitions=config.repetitions, warmup=1)
    fixed = {
        name: {"bytes": array.nbytes, "bits": bits[name], "cores": cores(function), "changed": checked[name]}
        for name, function in functions.items()
    }
    return {name: (seconds[name], fixed[name]) for name in functions}


def _decoder(
    method: str, array: np.ndarray, compressed: dict[str, CompressedArray], held: dict[str, CompressedArray]
) -> tuple[Callable[[], Any], float]:
    """A function of no argument that gives the array, and the bits a weight of what it reads."""
    match method:
        case "native" | "numpy":
            one = compressed["huffman"]
            return functools.partial(decode_host, one, native=method == "native"), bits_per_weight(one)
        case "xla" | "xla_fixed_rate":
            coder = "huffman" if method == "xla" else "fixed_rate"
            return functools.partial(jax.jit(decode), held[coder]), bits_per_weight(compressed[coder])
        case "copy":
            return array.copy, 8.0 * array.itemsize
    compress, back = byte_codec(method, array)
    small = compress()
    return functools.partial(back, small), 8 * len(small) / array.size


def cores(function: Callable[[], Any]) -> float:
    """Seconds of all processors over those of the clock, in three calls."""
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(3):
        jax.block_until_ready(function())
    return (time.process_time() - busy) / (time.perf_counter() - start)
