"""``config.json`` of Hugging Face folders, read as a `DecoderConfig` and written from one.

Llama, Mistral and Qwen2 are one decoder with switches. Each switch that changes the numbers is honoured or refused;
an absent one has the default of its architecture in transformers.
"""

import json
import os
import sys
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
_FULL_LAYERS = 28
_SPECIAL = {"LlamaForCausalLM": (1, 2), "MistralForCausalLM": (1, 2), "Qwen2ForCausalLM": (None, None)}
"""BOS and EOS."""
_ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Numbers that they need."""
_ORIGINAL = "original_max_position_embeddings"
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_TYPES["llama3"], _ORIGINAL)


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
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8, or of brackets without end
        raise ExchangeError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExchangeError(f"{path} holds a {type(content).__name__}; allowed is a JSON object")
    return content


class _Fields:
    """Reads entries of ``config.json`` by type; messages name the file and the entry."""

    def __init__(self, path: str | os.PathLike[str], said: dict[str, Any]) -> None:
        self.path, self.said = path, said

    def refuse(self, name: str, value: Any, allowed: str) -> ExchangeError:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        return ExchangeError(f"{self.path}: {name} is {shown}; allowed is {allowed}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.said.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | int) -> float:
        value = self.said.get(name)
        value = default if value is None else value
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not abs(value) <= sys.float_info.max:
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
    activation = "silu" if said.get("hidden_act") is None else said["hidden_act"]
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise fields.refuse("hidden_act", activation, ", ".join(_ACTIVATIONS))
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", width // heads)
    # Absent, they are those of the architecture; null, as many as queries have.
    kv_heads = heads if "num_key_value_heads" in said else _KV_HEADS.get(architecture, heads)
    context = fields.integer("max_position_embeddings", _CONTEXT[architecture])
    try:
        return DecoderConfig(
            vocabulary=fields.integer("vocab_size"),
            features=width,
            layers=fields.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads", kv_heads),
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
    named, kind = fields.said.get("architectures"), fields.said.get("model_type")
    if (named is not None or kind is None) and named not in [[known] for known in ARCHITECTURES]:
        raise fields.refuse("architectures", named, f"one of {', '.join(ARCHITECTURES)}")
    if kind is not None and (not isinstance(kind, str) or kind not in _MODEL_TYPES):
        raise fields.refuse("model_type", kind, f"one of {', '.join(_MODEL_TYPES)}")
    architecture = named[0] if named else _MODEL_TYPES[str(kind)]
    if kind is not None and architecture != _MODEL_TYPES[kind]:
        raise fields.refuse("model_type", kind, f"that of architectures, {architecture}")
    return architecture


def _rotary(fields: _Fields, context: int) -> Rotary:
    # An older entry goes before the newer one, as in transformers, whose own files have the newer one alone.
    name = "rope_scaling" if fields.said.get("rope_scaling") else "rope_parameters"
    said = fields.said.get(name) or {}
    if not isinstance(said, dict):
        raise fields.refuse(name, said, "an object")
    inner = _Fields(f"{fields.path}: {name}", said)
    for entry, value in said.items():
        if entry not in _ROPE:
            raise inner.refuse(entry, value, f"none, only {', '.join(_ROPE)}")
    kind = said.get("rope_type", said.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise inner.refuse("rope_type", kind, f"one of {', '.join(_ROPE_TYPES)}")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
    if (part := inner.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))) != 1.0:
        raise inner.refuse("partial_rotary_factor", part, "1.0: whole heads are rotated")
    if missing := [entry for entry in _ROPE_TYPES[kind] if said.get(entry) is None]:
        raise inner.refuse(missing[0], None, f"a number, which rope_type {kind!r} needs")
    values = [inner.number(entry, 0.0) for entry in _ROPE_TYPES[kind]]
    if kind == "llama3":
        # That of the whole goes before that of the rotation, as in transformers.
        values.append(fields.number(_ORIGINAL, inner.number(_ORIGINAL, context)))
    return Rotary(theta, "half", None if kind == "default" else (kind, *values))


def _sliding_window(fields: _Fields, architecture: str) -> int | None:
    said, layers, window = fields.said, fields.integer("num_hidden_layers"), None
    qwen2 = architecture == "Qwen2ForCausalLM"
    if architecture == "MistralForCausalLM" or (qwen2 and fields.switch("use_sliding_window")):
        null = said.get("sliding_window", _WINDOW) is None
        window = None if null else fields.integer("sliding_window", _WINDOW)
    kinds = said.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise fields.refuse("layer_types", kinds, f"a list of num_hidden_layers = {layers} entries")
        possible = ["full_attention"] if window is None else ["sliding_attention"]
        possible = ["full_attention", *possible] if qwen2 and window is not None else possible
        for kind in possible:
            if kinds == [kind] * layers:
                return window if kind == "sliding_attention" else None
        raise fields.refuse("layer_types", kinds, f"one type for all layers: {' or '.join(possible)}")
    if qwen2 and window is not None:
        full = said.get("max_window_layers", _FULL_LAYERS)
        if not isinstance(full, int) or isinstance(full, bool) or 0 < full < layers:
            raise fields.refuse(
                "max_window_layers", full, f"0, or num_hidden_layers = {layers}: all layers have windows, or none has"
            )
        return None if full >= layers else window
    return window


def special_tokens(folder: Path, said: dict[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """BOS and the tokens that end a text; ``generation_config.json`` goes before ``config.json``.

    An entry that ``config.json`` lacks has the default of its architecture, and null is none.
    """
    generation = folder / "generation_config.json"
    defaults = dict(
        zip(("bos_token_id", "eos_token_id"), _SPECIAL[_architecture(_Fields(folder, said))], strict=True)
    )
    both = [*([read_json(generation)] if generation.exists() else []), defaults | said]

    def first(name: str) -> list[int]:
        for content in both:
            value = content.get(name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in values):
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
        names = ("rope_type", *_ROPE_TYPES["llama3"], _ORIGINAL)
        rope |= dict(zip(names, config.rotary.scaling, strict=False))
        if (original := rope.get(_ORIGINAL, 0)) != int(original):
            raise ValueError(
                f"config.rotary.scaling has the context {original}; allowed in a Hugging Face folder is an integer"
            )
        rope |= {_ORIGINAL: int(original)} if original else {}
    kind = "qwen2" if config.qkv_bias else "llama" if config.sliding_window is None else "mistral"
    if kind == "llama" and config.features % config.heads:
        raise ValueError(
            f"config.heads is {config.heads}; allowed in a Hugging Face folder of a Llama are divisors of features, "
            f"{config.features}"
        )
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
