"""Decoders of the Llama family in Hugging Face folders and llama2.c files, to and from the params of `decoder`.

A folder holds ``config.json``, ``model.safetensors`` (or several such files that ``model.safetensors.index.json``
names) and perhaps ``tokenizer.json``. Kernels lie ``[out, in]`` there, one tensor a layer, and the pairs of the
rotation are halves (see `rotary`). Every size and switch of ``config.json`` is either honoured or refused, and every
tensor is used or refused: what a model computed elsewhere it computes here, or it is not loaded. Nothing is
unpickled.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig, Params, param_shapes
from hashml.models.folder_config import read_config, read_json, special_tokens, written_config
from hashml.models.llama2c import load_llama2c
from hashml.models.rotary import half_from_interleaved
from hashml.models.tokenization import Tokenizer, load_tokenizer

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
}
_TOP = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


class LoadedDecoder(NamedTuple):
    """What a checkpoint holds."""

    params: Params
    config: DecoderConfig
    tokenizer: Tokenizer | None
    """``None`` if none lies there, or none was asked for."""


def load_decoder(
    path: str | os.PathLike[str], dtype: DTypeLike = jnp.float32, *, tokenizer: bool | str | os.PathLike[str] = True
) -> LoadedDecoder:
    """A decoder from a Hugging Face folder (Llama, Mistral, Qwen2) or from a llama2.c file.

    Args:
        path: the folder, or the file; beside the file, a single ``tok*.bin`` is its tokenizer.
        dtype: of the params: float32, float16 or bfloat16, whatever is stored.
        tokenizer: whether to read the tokenizer, too, or the path of another one.

    Raises:
        ExchangeError: for another architecture, quantised weights, a switch this decoder lacks, tensors that are
            missing, superfluous or of a wrong shape, and for damaged files; the message names the file.
        FileNotFoundError: if there is nothing at ``path``.
        ImportError: if a ``tokenizer.json`` is to be read and the library ``tokenizers`` is not there.
        ValueError: for another dtype, and for weights that exceed float16.
    """
    if jnp.dtype(dtype).name not in _DTYPES.values():
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}; allowed are {', '.join(_DTYPES.values())}")
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, dtype, tokenizer)
    if path.suffix == ".safetensors":
        raise ExchangeError(f"{path} is a file of tensors alone; allowed is the folder with its config.json")
    params, config = load_llama2c(path, dtype)
    if tokenizer is True:
        found = sorted(path.parent.glob("tok*.bin"))
        if len(found) > 1:
            raise ExchangeError(f"{path}: {len(found)} tokenizers lie beside it, {_few(map(str, found))}; name one")
        tokenizer = found[0] if found else False
    reader = None
    if not isinstance(tokenizer, bool):
        reader = load_tokenizer(tokenizer, vocabulary=config.vocabulary, bos=1, stops=(1, 2))
    return LoadedDecoder(params, config, reader)


def _load_folder(path: Path, dtype: DTypeLike, tokenizer: bool | str | os.PathLike[str]) -> LoadedDecoder:
    said = read_json(path / "config.json")
    config = read_config(path / "config.json", said)
    if tokenizer is True:
        beside = path / "tokenizer.json"
        tokenizer = beside if beside.exists() else False
    reader = None
    if not isinstance(tokenizer, bool):
        bos, stops = special_tokens(path, said)
        reader = load_tokenizer(tokenizer, vocabulary=config.vocabulary, bos=bos, stops=stops)
    with contextlib.ExitStack() as files:
        return LoadedDecoder(_params(config, _tensors(path, files), jnp.dtype(dtype)), config, reader)


# --- tensors --------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    file: Path
    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]


def _tensors(path: Path, files: contextlib.ExitStack) -> dict[str, _Stored]:
    """Every tensor of the folder by name, not read yet."""
    if (path / _INDEX).exists():
        weights = read_json(path / _INDEX).get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise ExchangeError(f"{path / _INDEX} has no weight_map of tensor names to file names")
        names = sorted(set(weights.values()))
    elif (path / _SINGLE).exists():
        weights, names = None, [_SINGLE]
    else:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        there = f"; {_few(pickled)} may be pickled and is not read" if pickled else ""
        raise ExchangeError(f"{path} has neither {_SINGLE} nor {_INDEX}{there}; allowed are safetensors")
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ExchangeError(
            f"{path / _INDEX} names {_few(outside)}; allowed are safetensors files of the same folder"
        )
    if absent := [name for name in names if not (path / name).exists()]:
        raise ExchangeError(f"{path / _INDEX} names {_few(absent)}, which is not there")
    found: dict[str, _Stored] = {}
    for name in names:
        file = path / name
        with _readable(file):
            handle = files.enter_context(safe_open(file, framework="numpy"))
            for tensor in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if weights is None or weights.get(tensor) == name:
                    found[tensor] = _stored(file, handle, tensor)
    if weights is not None and (absent := sorted(set(weights) - set(found))):
        file = path / weights[absent[0]]
        raise ExchangeError(f"{file} lacks {_few(absent)}, which {_INDEX} says it holds")
    return found


def _stored(file: Path, handle: Any, name: str) -> _Stored:
    view = handle.get_slice(name)
    if view.get_dtype() not in _DTYPES:
        raise ExchangeError(
            f"{file}: tensor {name!r} is of dtype {view.get_dtype()}; allowed are {', '.join(_DTYPES)}, not quantised"
        )
    return _Stored(file, lambda: handle.get_tensor(name), tuple(view.get_shape()))


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ExchangeError(f"{file} is damaged or no safetensors file: {error}") from error


def _params(config: DecoderConfig, tensors: dict[str, _Stored], dtype: np.dtype) -> Params:
    """The tree of `param_shapes`, each leaf filled tensor by tensor, so that no layer is in memory twice."""
    shapes = param_shapes(config)
    where = {name: [_TOP[name]] for name in shapes if name != "layers"}
    where |= {name: [f"model.layers.{i}.{_NAMES[name]}" for i in range(config.layers)] for name in shapes["layers"]}
    wanted = {name for names in where.values() for name in names}
    ignored = {_TOP["head"]} if config.tied else set()
    place = next(iter(tensors.values())).file.parent if tensors else "the folder"
    if missing := sorted(wanted - set(tensors)):
        raise ExchangeError(f"{place} lacks {len(missing)} tensors that its config.json asks for: {_few(missing)}")
    superfluous = sorted(
        name for name in set(tensors) - wanted - ignored if not name.endswith(".rotary_emb.inv_freq")
    )
    if superfluous:
        raise ExchangeError(
            f"{place} has {len(superfluous)} tensors that its config.json has no place for: {_few(superfluous)}"
        )

    leaves = {name: shape for name, shape in shapes.items() if name != "layers"} | shapes["layers"]
    for name, shape in leaves.items():
        one = shape[1:] if name in shapes["layers"] else shape
        one = one[::-1] if name != "embedding" else one
        for tensor in where[name]:
            if tensors[tensor].shape != one:
                file, _, found = tensors[tensor]
                raise ExchangeError(f"{file}: tensor {tensor!r} has shape {found}; config.json asks for {one}")

    def filled(name: str) -> jax.Array:
        host = np.empty(leaves[name], dtype)
        parts = host if name in shapes["layers"] else host[None]
        for part, tensor in zip(parts, where[name], strict=True):
            with _readable(tensors[tensor].file):
                values = tensors[tensor].read()
            target = part if name == "embedding" else part.T
            try:
                with np.errstate(over="raise", under="ignore"):
                    target[...] = values.astype(dtype)
            except FloatingPointError:
                file = tensors[tensor].file
                raise ValueError(f"dtype is {dtype.name}; {file}: tensor {tensor!r} exceeds it") from None
        return jnp.asarray(host)

    return {
        name: {inner: filled(inner) for inner in shapes["layers"]} if name == "layers" else filled(name)
        for name in shapes
    }


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- writing --------------------------------------------------------------------------------------


def save_decoder(path: str | os.PathLike[str], params: Params, config: DecoderConfig) -> None:
    """Writes a folder that `load_decoder` and transformers read; it appears whole or not at all.

    Interleaved pairs are written as halves. The architecture is Llama; Mistral with a sliding window; Qwen2 with
    biases.

    Args:
        path: a folder that does not exist yet, or is empty.
        params: of the model, in float32, float16 or bfloat16.
        config: of the model.

    Raises:
        ValueError: for what these architectures lack (smeared keys, no gate, no rotation), and for params of other
            names or shapes.
        FileExistsError: if something is at ``path``.
    """
    path = Path(path)
    said = written_config(config)
    shapes = param_shapes(config)
    found = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if found != shapes:
        raise ValueError(f"params has the shapes {found}; those of config are {shapes}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists; save_decoder writes a new folder")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    beside.mkdir(parents=True)
    try:
        save_file(dict(_named(params, config)), beside / _SINGLE, metadata={"format": "pt"})
        said["dtype"] = params["embedding"].dtype.name
        (beside / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _named(params: Params, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in _TOP.items():
        if name in params:
            host = np.asarray(params[name])
            yield tensor, np.ascontiguousarray(host.T if name == "head" else host)
    for name, stacked in params["layers"].items():
        for i, host in enumerate(np.asarray(stacked)):
            if name.removesuffix("_bias") in ("query", "key"):
                host = _halves(host, config)
            yield f"model.layers.{i}.{_NAMES[name]}", np.ascontiguousarray(host.T)


def _halves(host: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """The columns of each head in the order in which pairs are halves."""
    if config.rotary is None or config.rotary.pairs == "half":
        return host
    heads = host.reshape(*host.shape[:-1], -1, config.head_dim)
    return heads[..., half_from_interleaved(config.head_dim)].reshape(host.shape)
