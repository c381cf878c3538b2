"""``config.json`` is read as transformers reads it, or refused by a message that names the entry."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig
from hashml.models.folder_config import read_config, read_json, special_tokens, written_config
from hashml.models.rotary import Rotary

KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


def said(kind="llama", **entries) -> dict[str, Any]:
    sizes = {
        "vocab_size": 31,
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "intermediate_size": 24,
        "max_position_embeddings": 512,
    }
    return sizes | {"model_type": kind, "architectures": [KINDS[kind]]} | entries


def read(kind="llama", **entries) -> DecoderConfig:
    return read_config("config.json", said(kind, **entries))


def theirs(kind="llama", **entries):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, KINDS[kind]).config_class.from_dict(said(kind, **entries))


# --- as transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.7}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 50.0},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0},
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 1e3,
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_scaling": {}, "rope_theta": 1e3},
        {"rope_scaling": LLAMA3 | {ORIGINAL: 32}, "rope_theta": 500.0},
        {"rope_scaling": LLAMA3, "rope_theta": 500.0},
        {"rope_scaling": LLAMA3, "rope_theta": 500.0, ORIGINAL: 32},
        {"rope_scaling": LLAMA3 | {ORIGINAL: 32}, "rope_theta": 500.0, ORIGINAL: 64},
        {"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 4.0}},
    ],
    ids=str,
)
def test_the_rotation(entries):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = LlamaRotaryEmbedding(theirs(**json.loads(json.dumps(entries)))).inv_freq.numpy()
    rotary = read(**entries).rotary
    assert rotary is not None
    np.testing.assert_allclose(rotary.frequencies(16), expected, rtol=5e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 2}], ids=str)
def test_key_heads(kind, entries):
    entries = {"num_attention_heads": 64} | entries  # a multiple of all defaults
    found = read(kind, **entries).kv_heads
    if kind == "mistral" and None in entries.values():
        assert found == 64  # as its class says, which its types then forbid
    else:
        assert found == theirs(kind, **entries).num_key_value_heads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "entries",
    [{}, {"bos_token_id": None, "eos_token_id": None}, {"eos_token_id": [5, 6]}, {"bos_token_id": 0}],
    ids=str,
)
def test_special_tokens(kind, entries, tmp_path):
    expected = theirs(kind, **entries)
    stops = expected.eos_token_id if isinstance(expected.eos_token_id, list) else [expected.eos_token_id]
    stops = tuple(stop for stop in stops if stop is not None)
    assert special_tokens(tmp_path, said(kind, **entries)) == (expected.bos_token_id, stops)
    # What the other file says goes first, and what it does not say comes from here.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert special_tokens(tmp_path, said(kind, **entries)) == (expected.bos_token_id, (7,))


@pytest.mark.parametrize(
    ("kind", "entries", "window"),
    [
        ("llama", {"sliding_window": 5}, None),
        ("llama", {"layer_types": ["full_attention"] * 3}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3}, 5),
        ("mistral", {"sliding_window": None, "layer_types": ["full_attention"] * 3}, None),
        ("qwen2", {"sliding_window": 5}, None),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True}, None),  # 28 layers have none
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, 5),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 3}, None),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 5),
        ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
    ],
)
def test_windows(kind, entries, window):
    assert read(kind, **entries).sliding_window == window


# --- refused --------------------------------------------------------------------------------------

WINDOW = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        (
            "llama",
            {"architectures": None, "model_type": "gpt2"},
            "model_type is 'gpt2'; allowed is one of llama, mis",
        ),
        ("llama", {"architectures": None, "model_type": None}, "architectures is None; allowed is one of LlamaFor"),
        ("llama", {"architectures": None, "model_type": ["llama"]}, r"model_type is \['llama'\]; allowed is one of"),
        ("llama", {"architectures": []}, r"architectures is \[\]; allowed is one of LlamaFor"),
        ("llama", {"architectures": [["x"]]}, r"architectures is \[\['x'\]\]; allowed is one of LlamaFor"),
        ("llama", {"model_type": "mistral"}, "model_type is 'mistral'; allowed is that of architectures, LlamaForC"),
        ("mistral", {"model_type": "llama"}, "model_type is 'llama'; allowed is that of architectures, MistralForC"),
        ("llama", {"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]; allowed is silu"),
        ("llama", {"hidden_act": False}, "hidden_act is False; allowed is silu"),
        ("llama", {"rope_theta": 10**400}, "rope_theta is 1000.*; allowed is a finite number"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; allowed is an object"),
        ("llama", {"rope_parameters": {"rope_type": ["default"]}}, r"rope_type is \['default'\]; allowed is one of"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 50.0}}},
            "rope_parameters: full_attention is .*; allowed is none, only rope_type",
        ),
        (
            "llama",
            {"rope_scaling": {"mrope_section": [1, 1]}},
            r"rope_scaling: mrope_section is \[1, 1\]; allowed is",
        ),
        ("llama", {"rope_scaling": LLAMA3, ORIGINAL: "8192"}, f"{ORIGINAL} is '8192'; allowed is a finite number"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "one type for all layers: full_attention$"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "one type for all layers: sliding_attention$"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; allowed is a positive integer"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "one type for all layers: full_attention$"),
        (
            "qwen2",
            WINDOW | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types is .*; allowed is one type for all layers: full_attention or sliding_attention",
        ),
        ("qwen2", WINDOW | {"layer_types": 3}, "layer_types is 3; allowed is a list of num_hidden_layers = 3"),
        ("qwen2", WINDOW | {"layer_types": "full_attention"}, "layer_types is 'full_attention'; allowed is a list"),
        ("qwen2", WINDOW | {"layer_types": []}, r"layer_types is \[\]; allowed is a list of num_hidden_layers = 3"),
        ("qwen2", WINDOW | {"layer_types": ["sliding_attention"]}, "allowed is a list of num_hidden_layers = 3"),
        ("qwen2", WINDOW | {"layer_types": [["a"], ["a"], ["a"]]}, "layer_types is .*; allowed is one type for all"),
        ("qwen2", WINDOW | {"max_window_layers": None}, "max_window_layers is None; allowed is 0, or num_hidden_lay"),
        ("qwen2", WINDOW | {"max_window_layers": "1"}, "max_window_layers is '1'; allowed is 0"),
        (
            "qwen2",
            WINDOW | {"max_window_layers": 1},
            "max_window_layers is 1; allowed is 0, or num_hidden_layers = 3",
        ),
    ],
)
def test_what_is_wrong_is_named(kind, entries, message):
    with pytest.raises(ExchangeError, match=message) as raised:
        read(kind, **entries)
    assert str(raised.value).startswith("config.json: ")
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000])
def test_brackets_without_end_are_no_json(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ExchangeError, match=r"config\.json is no JSON"):
        read_json(tmp_path / "config.json")


def test_special_tokens_are_integers():
    for value in (True, "2", 2.0):
        with pytest.raises(ExchangeError, match="eos_token_id is .*; allowed are integers"):
            special_tokens(Path("absent"), said(eos_token_id=value))


@pytest.mark.parametrize("entries", [{"head_dim": 2**50}, {"num_hidden_layers": 10**12}, {"vocab_size": 10**30}])
def test_sizes_are_read_without_arrays_of_them(entries):
    """Frequencies, or types, of so many would not fit any memory."""
    for kind, window in (("llama", {}), ("qwen2", WINDOW | {"max_window_layers": 0})):
        config = read(kind, **window, **entries)
        ours = {"head_dim": config.head_dim, "num_hidden_layers": config.layers, "vocab_size": config.vocabulary}
        assert entries.items() <= ours.items()


# --- written --------------------------------------------------------------------------------------


def test_what_a_folder_cannot_say_is_refused():
    config = read()
    assert config.rotary is not None
    for change, message in (
        ({"heads": 5, "kv_heads": 5}, "config.heads is 5; allowed .* of a Llama are divisors of features, 512"),
        ({"rotary": Rotary(50.0, scaling=("llama3", 8.0, 1.0, 4.0, 32.7))}, "has the context 32.7; .* is an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            written_config(dataclasses.replace(config, **change))


def test_both_forms_of_the_rotation_agree():
    """Readers take one or the other."""
    config = DecoderConfig(31, 64, 3, 4, 2, 16, 24, rotary=Rotary(50.0, scaling=("llama3", 8.0, 1.0, 4.0, 32)))
    written = written_config(config)
    for without in ("rope_scaling", "rope_parameters"):
        assert read_config("config.json", {k: v for k, v in written.items() if k != without}) == config
