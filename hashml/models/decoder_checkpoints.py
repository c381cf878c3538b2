"""Decoders of the Llama family in Hugging Face folders and llama2.c files, to and from the params of `decoder`.

A folder holds ``config.json``, tensors as `folder_tensors` reads them and perhaps ``tokenizer.json``. The pairs of
the rotation are halves (see `rotary`). Every size and switch of ``config.json`` is either honoured or refused: what a
model computed elsewhere it computes here, or it is not loaded.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig, Params, param_shapes
from hashml.models.folder_config import read_config, read_json, special_tokens, written_config
from hashml.models.folder_tensors import DTYPES, SINGLE, Stored, few, read_params, readable, stored_tensors
from hashml.models.llama2c import load_llama2c
from hashml.models.rotary import half_from_interleaved
from hashml.models.tokenization import Tokenizer, load_tokenizer

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
            missing, superfluous, of a wrong shape or not finite, and for damaged files; the message names the file.
        FileNotFoundError: if there is nothing at ``path``.
        ImportError: if a ``tokenizer.json`` is to be read and the library ``tokenizers`` is not there.
        ValueError: for another dtype, and for weights that exceed it.
    """
    if jnp.dtype(dtype).name not in DTYPES.values():
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}; allowed are {', '.join(DTYPES.values())}")
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, dtype, tokenizer)
    if path.suffix == ".safetensors":
        raise ExchangeError(f"{path} is a file of tensors alone; allowed is the folder with its config.json")
    params, config = load_llama2c(path, dtype)
    if tokenizer is True:
        found = sorted(path.parent.glob("tok*.bin"))
        if len(found) > 1:
            raise ExchangeError(f"{path}: {len(found)} tokenizers lie beside it, {few(map(str, found))}; name one")
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
        tensors = stored_tensors(path, files)
        found = [re.match(r"model\.layers\.(\d{1,9})\.", name) for name in tensors]
        layers = max((int(layer[1]) + 1 for layer in found if layer), default=0)
        if layers != config.layers:  # before the names of so many layers are made
            raise ExchangeError(
                f"{path / 'config.json'}: num_hidden_layers is {config.layers}; its tensors are of {layers} layers"
            )
        config, tensors = _tied(config, tensors, jnp.dtype(dtype))
        return LoadedDecoder(_params(config, tensors, jnp.dtype(dtype)), config, reader)


def _tied(
    config: DecoderConfig, tensors: dict[str, Stored], dtype: np.dtype
) -> tuple[DecoderConfig, dict[str, Stored]]:
    """As transformers ties: either name may hold the one table, and two tables that differ are two."""
    table, head = tensors.get(_TOP["embedding"]), tensors.get(_TOP["head"])
    if not config.tied or head is None:
        return config, tensors
    rest = {name: tensor for name, tensor in tensors.items() if name != _TOP["head"]}
    if table is None:
        return config, rest | {_TOP["embedding"]: head}
    if table.shape == head.shape and {table.dtype, head.dtype} <= DTYPES.keys():
        with readable(table.file), readable(head.file), np.errstate(all="ignore"):
            if np.array_equal(table.read().astype(dtype), head.read().astype(dtype)):
                return config, rest
    return dataclasses.replace(config, tied=False), tensors


def _params(config: DecoderConfig, tensors: dict[str, Stored], dtype: np.dtype) -> Params:
    shapes = param_shapes(config)
    names = {name: [_TOP[name]] for name in shapes if name != "layers"}
    names |= {name: [f"model.layers.{i}.{_NAMES[name]}" for i in range(config.layers)] for name in shapes["layers"]}
    return read_params(
        shapes,
        names,
        tensors,
        dtype,
        tables=("embedding",),
        ignored=lambda name: name.endswith(".rotary_emb.inv_freq"),
    )


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
        ValueError: for what these architectures lack (smeared keys, no gate, no rotation, of Llama features that
            heads do not divide), and for params of other names, shapes or dtypes.
        FileExistsError: if something is at ``path``.
    """
    path = Path(path)
    said = written_config(config)
    shapes = param_shapes(config)
    found = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if found != shapes:
        raise ValueError(f"params has the shapes {found}; those of config are {shapes}")
    for place, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype.name not in DTYPES.values():
            raise ValueError(
                f"params{jax.tree_util.keystr(place)} is {leaf.dtype.name}; allowed are {', '.join(DTYPES.values())}"
            )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists; save_decoder writes a new folder")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    beside.mkdir(parents=True)
    try:
        save_file(dict(_named(params, config)), beside / SINGLE, metadata={"format": "pt"})
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
