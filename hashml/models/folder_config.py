"""``config.json`` of Hugging Face folders, read as a `DecoderConfig` and written from one.

Llama, Mistral and Qwen2 are one decoder with switches. Each switch that changes the numbers is honoured or refused;
an absent one has the default of its architecture in transformers.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig
from hashml.models.rotary import Rotary

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_MODEL_TYPES = {"llama": ARCHITECTURES[0], "mistral": ARCHITECTURES[1], "qwen2": ARCHITECTURES[2]}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_KV_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32}
_CONTEXT = {"LlamaForCausalLM": 2048, "MistralForCausalLM": 131072, "Qwen2ForCausalLM": 32768}
_WINDOW = 4096
_ROPE_TYPES = ("default", "linear", "llama3")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ExchangeError: if the file is not one.
        FileNotFoundError: if there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; a Hugging Face folder has a {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ExchangeError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExchangeError(f"{path} holds a {type(content).__name__}; allowed is a JSON object")
    return content


class _Fields:
    """Reads entries of ``config.json`` by type; messages name the file and the entry."""

    def __init__(self, path: str | os.PathLike[str], said: dict[str, Any]) -> None:
        self.path, self.said = path, said

    def refuse(self, name: str, value: Any, allowed: str) -> ExchangeError:
        return ExchangeError(f"{self.path}: {name} is {value!r}; allowed is {allowed}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.said.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | int) -> float:
        value = self.said.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.refuse(name, value, "a finite number")
        return float(value)

    def switch(self, name: str, default: bool = False) -> bool:
        value = self.said.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value


def read_config(path: str | os.PathLike[str], said: dict[str, Any]) -> DecoderConfig:
    """The configuration that a ``config.json`` describes.

    Args:
        path: of the file, for messages.
        said: its content.

    Raises:
        ExchangeError: for what this decoder does not compute.
    """
    fields = _Fields(path, said)
    architecture = _architecture(fields)
    if said.get("quantization_config") is not None:
        raise fields.refuse(
            "quantization_config", said["quantization_config"], "none: weights that are not quantised"
        )
    for name in ("attention_bias", "mlp_bias"):
        if fields.switch(name):
            raise fields.refuse(name, True, "false")
    activation = said.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        raise fields.refuse("hidden_act", activation, ", ".join(_ACTIVATIONS))
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", width // heads)
    context = fields.integer("max_position_embeddings", _CONTEXT[architecture])
    try:
        return DecoderConfig(
            vocabulary=fields.integer("vocab_size"),
            features=width,
            layers=fields.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads", _KV_HEADS.get(architecture, heads)),
            head_dim=head_dim,
            hidden=fields.integer("intermediate_size"),
            activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]  # values of a dict are plain str
            gated=True,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=fields.switch("tie_word_embeddings"),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            rotary=_rotary(fields, context),
            context=context,
            sliding_window=_sliding_window(fields, architecture),
        )
    except ExchangeError:
        raise
    except ValueError as error:  # sizes that do not fit together
        raise ExchangeError(f"{path}: {error}") from error


def _architecture(fields: _Fields) -> str:
    named = fields.said.get("architectures")
    if named is None and fields.said.get("model_type") in _MODEL_TYPES:
        return _MODEL_TYPES[fields.said["model_type"]]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise fields.refuse("architectures", named, f"one of {', '.join(ARCHITECTURES)}")
    return named[0]


def _rotary(fields: _Fields, context: int) -> Rotary:
    name = "rope_parameters" if fields.said.get("rope_parameters") is not None else "rope_scaling"
    said = fields.said.get(name) or {}
    if not isinstance(said, dict):
        raise fields.refuse(name, said, "an object")
    inner = _Fields(f"{fields.path}: {name}", said)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise inner.refuse("rope_type", kind, f"one of {', '.join(_ROPE_TYPES)}")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
    if (part := inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))) != 1.0:
        raise inner.refuse("partial_rotary_factor", part, "1.0: whole heads are rotated")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
    if missing := [entry for entry in needed if said.get(entry) is None]:
        raise inner.refuse(missing[0], None, f"a number, which rope_type {kind!r} needs")
    values = [inner.number(entry, 0.0) for entry in needed]
    if kind == "llama3":
        values.append(inner.number("original_max_position_embeddings", context))
    return Rotary(theta, "half", None if kind == "default" else (kind, *values))


def _sliding_window(fields: _Fields, architecture: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        if "sliding_window" in fields.said and fields.said["sliding_window"] is None:
            return None
        return fields.integer("sliding_window", _WINDOW)
    if not fields.switch("use_sliding_window") or fields.said.get("sliding_window", _WINDOW) is None:
        return None
    layers, full = fields.integer("num_hidden_layers"), fields.said.get("max_window_layers", 28)
    kinds = fields.said.get("layer_types") or [
        "sliding_attention" if i >= full else "full_attention" for i in range(layers)
    ]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise fields.refuse("layer_types", kinds, "one type for all layers, full_attention or sliding_attention")
    return fields.integer("sliding_window", _WINDOW)


def special_tokens(folder: Path, said: dict[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """BOS and the tokens that end a text; ``generation_config.json`` goes before ``config.json``."""
    generation = folder / "generation_config.json"
    both = [*([read_json(generation)] if generation.exists() else []), said]

    def first(name: str) -> list[int]:
        for content in both:
            value = content.get(name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(entry, int) for entry in values):
                raise ExchangeError(f"{folder}: {name} is {value!r}; allowed are integers")
            if values:
                return values
        return []

    bos = first("bos_token_id")
    return (bos[0] if bos else None), tuple(first("eos_token_id"))


def written_config(config: DecoderConfig) -> dict[str, Any]:
    """``config.json`` of a model with this configuration.

    Raises:
        ValueError: for what none of the architectures has.
    """
    for name, value, allowed in (("smear", config.smear, False), ("gated", config.gated, True)):
        if value != allowed:
            raise ValueError(f"config.{name} is {value}; allowed in a Hugging Face folder is {allowed}")
    if config.rotary is None:
        raise ValueError("config.rotary is None; allowed in a Hugging Face folder is a Rotary")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary.theta}
    if config.rotary.scaling is not None:
        names = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= dict(zip(names, config.rotary.scaling, strict=False))
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    kind = "qwen2" if config.qkv_bias else "llama" if config.sliding_window is None else "mistral"
    said: dict[str, Any] = {
        "architectures": [_MODEL_TYPES[kind]],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "hidden_size": config.features,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.sliding_window is not None:
        said["sliding_window"] = config.sliding_window
        if kind == "qwen2":
            said |= {"use_sliding_window": True, "max_window_layers": 0}
            said["layer_types"] = ["sliding_attention"] * config.layers
    # Readers older than rope_parameters look here.
    said["rope_theta"] = config.rotary.theta
    said["rope_scaling"] = (
        None if config.rotary.scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    return said
