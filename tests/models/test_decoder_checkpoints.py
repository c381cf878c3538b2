"""A checkpoint gives the logits that transformers gives, or is refused by a message that says why."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hashml.exchange import ExchangeError
from hashml.models.decoder import DecoderConfig, forward, param_shapes
from hashml.models.decoder_checkpoints import load_decoder, save_decoder
from hashml.models.rotary import Rotary
from hashml.models.tokenization import decode

PLAIN = DecoderConfig(
    vocabulary=31, features=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24, tied=False, context=64
)


def random_params(config, dtype: Any = np.float32):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 3, dtype),
        param_shapes(config),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- against transformers -------------------------------------------------------------------------

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PEERS = {
    "Llama, grouped queries": ("LlamaForCausalLM", {}),
    "Llama, llama3 scaling, head_dim, gelu": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3, "head_dim": 8, "hidden_act": "gelu", "tie_word_embeddings": True},
    ),
    "Llama, linear scaling": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}},
    ),
    "Mistral, window": ("MistralForCausalLM", {"sliding_window": 5, "hidden_act": "gelu_new"}),
    "Qwen2, biases, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "Qwen2, window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
}


def peer(name):
    """A random model of transformers, its biases and norms random, too, and logits it gives for some tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    architecture, options = PEERS[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(SIZES | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def peer_logits(model, tokens):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


TOKENS = np.random.default_rng(1).integers(0, 31, (2, 20))


@pytest.mark.parametrize("name", PEERS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = peer(name)
    model.save_pretrained(tmp_path, max_shard_size="5KB" if "grouped" in name else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("grouped" in name)
    params, config, tokenizer = load_decoder(tmp_path)
    assert tokenizer is None
    expected = peer_logits(model, TOKENS)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(forward(params, config, jnp.asarray(TOKENS)), expected, atol=1e-4)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_narrow_tensors_are_widened_exactly(stored, tmp_path):
    torch = pytest.importorskip("torch")
    model = peer("Llama, grouped queries").to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    params, config, _ = load_decoder(tmp_path)
    assert params["head"].dtype == jnp.float32
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(forward(params, config, jnp.asarray(TOKENS)), peer_logits(model, TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(PLAIN, rotary=Rotary(500.0, "interleaved")),
        dataclasses.replace(PLAIN, tied=True, qkv_bias=True, sliding_window=4),
        dataclasses.replace(PLAIN, sliding_window=4, rotary=Rotary(scaling=("llama3", 8.0, 1.0, 4.0, 32))),
    ],
    ids=["interleaved", "qwen2", "mistral, llama3 scaling"],
)
def test_transformers_reads_what_we_write(config, tmp_path):
    params = random_params(config)
    save_decoder(tmp_path / "model", params, config)
    expected = forward(params, config, jnp.asarray(TOKENS))
    again = load_decoder(tmp_path / "model")
    np.testing.assert_allclose(forward(again.params, again.config, jnp.asarray(TOKENS)), expected, atol=1e-5)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    np.testing.assert_allclose(peer_logits(model, TOKENS), expected, atol=1e-4)


# --- folders, without transformers ----------------------------------------------------------------


@functools.cache
def plain_params():
    return random_params(PLAIN)


@pytest.fixture
def folder(tmp_path):
    save_decoder(tmp_path / "model", plain_params(), PLAIN)
    return tmp_path / "model"


def edit(folder, name="config.json", remove=(), **entries):
    content = json.loads((folder / name).read_text()) | entries
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def retensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip(dtype, tmp_path):
    params = random_params(PLAIN, jnp.dtype(dtype))
    save_decoder(tmp_path / "model", params, PLAIN)
    found = load_decoder(tmp_path / "model", jnp.dtype(dtype))
    assert found.config == PLAIN
    assert_same_tree(found.params, params)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_defaults_are_those_of_the_architectures(folder):
    edit(folder, remove=("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "head_dim", "hidden_act"))
    config = load_decoder(folder).config
    assert (config.rotary, config.norm_eps, config.head_dim, config.activation) == (Rotary(1e4), 1e-6, 4, "silu")


def test_old_rope_scaling_is_read(folder):
    edit(folder, remove=("rope_parameters",), rope_theta=7e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert load_decoder(folder).config.rotary == Rotary(7e4, scaling=("linear", 2.0))


def test_old_and_tied_leftovers_are_let_pass(tmp_path):
    config = dataclasses.replace(PLAIN, tied=True)
    params = random_params(config)
    save_decoder(tmp_path / "model", params, config)

    def leftovers(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    retensor(tmp_path / "model", leftovers)
    assert_same_tree(load_decoder(tmp_path / "model").params, params)


def test_one_table_under_either_name_and_two_that_differ(tmp_path):
    """As transformers has it: tied tables that are not equal are two."""
    config = dataclasses.replace(PLAIN, tied=True)
    params = random_params(config)
    save_decoder(tmp_path / "model", params, config)
    (content, path) = ((tmp_path / "model" / "model.safetensors").read_bytes(), tmp_path / "model")
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    retensor(path, lambda tensors: tensors.update({head: tensors.pop(table)}))
    found = load_decoder(path)
    assert found.config == config
    assert_same_tree(found.params, params)

    (path / "model.safetensors").write_bytes(content)
    retensor(path, lambda tensors: tensors.update({head: 2 * tensors[table]}))
    found = load_decoder(path)
    assert found.config == PLAIN
    assert_same_tree(found.params, params | {"head": 2 * params["embedding"].T})
    transformers = pytest.importorskip("transformers")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), 2 * params["embedding"])

    retensor(path, lambda tensors: tensors.update({head: np.ones((3, 16), np.float32)}))
    with pytest.raises(ExchangeError, match=r"'lm_head.weight' has shape \(3, 16\)"):
        load_decoder(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures is \['GPT2LMHeadModel'\]; allowed is one of LlamaFor",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*; allowed is none"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; allowed is one of default"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is None; allowed is a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; allowed is 1.0"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; allowed is silu"),
        ({"attention_bias": True}, "attention_bias is True; allowed is false"),
        ({"mlp_bias": True}, "mlp_bias is True; allowed is false"),
        ({"hidden_size": "16"}, "hidden_size is '16'; allowed is a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; allowed is a positive integer"),
        ({"num_key_value_heads": 3}, "config.json: kv_heads is 3; it divides heads, 4"),
        ({"vocab_size": None}, "vocab_size is None; allowed is a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; allowed is a finite number"),
        ({"num_hidden_layers": 3}, "config.json: num_hidden_layers is 3; its tensors are of 2 layers"),
        ({"num_hidden_layers": 1}, "config.json: num_hidden_layers is 1; its tensors are of 2 layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; its tensors are of 2 layers"),
        ({"head_dim": 2**50}, r"'model.layers.0.self_attn.q_proj.weight' has shape \(16, 16\)"),
        ({"intermediate_size": 23}, r"'model.layers.0.mlp.up_proj.weight' has shape \(24, 16\); .* \(23, 16\)"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused(folder, entries, message):
    edit(folder, **entries)
    with pytest.raises(ExchangeError, match=message) as raised:
        load_decoder(folder)
    assert str(folder) in str(raised.value)


def test_missing_superfluous_and_quantised_tensors_are_named(folder):
    name = "model.layers.1.self_attn.q_proj"
    content = (folder / "model.safetensors").read_bytes()
    for change, message in (
        (lambda tensors: tensors.pop(f"{name}.weight"), f"lacks 1 tensors .*: {name}.weight"),
        (lambda tensors: tensors.update({f"{name}.bias": np.ones(16, np.float32)}), f"no place for: {name}.bias"),
        (
            lambda tensors: tensors.update({f"{name}.qweight": np.ones(2, np.int32)}),
            "is of dtype I32; allowed are F32",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(15, np.float32)}),
            r"shape \(15,\); .* \(16,\)",
        ),
    ):
        (folder / "model.safetensors").write_bytes(content)
        retensor(folder, change)
        with pytest.raises(ExchangeError, match=message):
            load_decoder(folder)


def test_damaged_files_are_named(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for damaged in (b"", content[:5], content[:-1], content[: len(content) // 2], b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(ExchangeError, match=r"model\.safetensors is damaged or no safetensors file"):
            load_decoder(folder)
    save_file({}, file)
    with pytest.raises(ExchangeError, match=r"model\.safetensors holds no tensors"):
        load_decoder(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(ExchangeError, match=r"model\.safetensors is no file"):
        load_decoder(folder)
    for damaged, message in ((b"{", "config.json is no JSON"), (b"\xff", "is no JSON"), (b"[]", "holds a list")):
        (folder / "config.json").write_bytes(damaged)
        with pytest.raises(ExchangeError, match=message):
            load_decoder(folder)


def test_shards_and_their_index(folder):
    tensors = load_file(folder / "model.safetensors")
    expected = load_decoder(folder).params
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_same_tree(load_decoder(folder).params, expected)

    path.write_text(json.dumps({"weight_map": index["weight_map"] | {names[0]: "b.safetensors"}}))
    with pytest.raises(
        ExchangeError, match=f"b.safetensors lacks {names[0]}, which model.safetensors.index.json says"
    ):
        load_decoder(folder)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {names[0]: "../a.safetensors"}}))
    with pytest.raises(
        ExchangeError, match=r"names ../a.safetensors; allowed are safetensors files of the same folder"
    ):
        load_decoder(folder)
    for empty in ("{}", '{"weight_map": {}}'):
        path.write_text(empty)
        with pytest.raises(ExchangeError, match=r"index\.json has no weight_map"):
            load_decoder(folder)
    path.write_text(json.dumps(index))
    (folder / "b.safetensors").unlink()
    with pytest.raises(ExchangeError, match="index.json names b.safetensors, which is not there"):
        load_decoder(folder)
    # A single file goes first, whatever an older index beside it names.
    save_file(tensors, folder / "model.safetensors")
    assert_same_tree(load_decoder(folder).params, expected)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ExchangeError, match="pytorch_model.bin may be pickled and is not read; allowed are safetensors"
    ):
        load_decoder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    with pytest.raises(ExchangeError, match="is a pickled checkpoint"):
        load_decoder(folder / "pytorch_model.bin")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is not there"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("stored", "value", "asked"),
    [("float32", 1e6, "float16"), ("bfloat16", 1e6, "float16"), ("float32", 3.4e38, "bfloat16")],
)
def test_weights_beyond_a_dtype_are_no_infinities(folder, stored, value, asked):
    large = np.full(16, value, jnp.dtype(stored))
    retensor(folder, lambda tensors: tensors.update({"model.norm.weight": large}))
    with pytest.raises(ValueError, match=rf"dtype is {asked}; .*: tensor 'model.norm.weight' exceeds it"):
        load_decoder(folder, jnp.dtype(asked))
    assert load_decoder(folder, jnp.dtype(stored)).params["norm"][0] == large[0]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(folder, value, stored):
    def spoilt(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = np.ones((24, 16), jnp.dtype(stored))
        tensors["model.layers.1.mlp.up_proj.weight"][3, [2, 5]] = value

    retensor(folder, spoilt)
    with pytest.raises(ExchangeError, match=r"'model.layers.1.mlp.up_proj.weight' has 2 entries that are NaN or inf"):
        load_decoder(folder)


def test_dtypes_that_are_not_read(folder):
    with pytest.raises(ValueError, match="dtype is int8; allowed are float32, float16, bfloat16"):
        load_decoder(folder, jnp.int8)


def test_a_write_that_fails_leaves_nothing(tmp_path, folder):
    with pytest.raises(FileExistsError, match="model exists; save_decoder writes a new folder"):
        save_decoder(folder, plain_params(), PLAIN)
    wrong = plain_params() | {"norm": jnp.ones(3)}
    for params, config, message in (
        (wrong, PLAIN, "params has the shapes"),
        (plain_params(), dataclasses.replace(PLAIN, smear=True), "config.smear is True; allowed .* is False"),
        (plain_params(), dataclasses.replace(PLAIN, gated=False), "config.gated is False"),
        (plain_params(), dataclasses.replace(PLAIN, rotary=None), "config.rotary is None"),
        (
            plain_params() | {"norm": np.ones(16)},
            PLAIN,
            r"params\['norm'\] is float64; allowed are float32, float16, bfloat16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_decoder(tmp_path / "other", params, config)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_beside_the_model_is_read(folder):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    trained.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    trained.save(str(folder / "tokenizer.json"))
    edit(folder, bos_token_id=0, eos_token_id=[2, 3])
    found = load_decoder(folder).tokenizer
    assert found is not None
    assert (found.bos, found.stops) == (0, (2, 3))
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    found = load_decoder(folder).tokenizer
    assert found is not None
    assert (found.bos, found.stops) == (0, (7,))
    assert found.encode("") == [0]
    for text in ("the cat, 日本語 and  ünïcode\n\n🙂 the end", "a " * 60):
        ids = found.encode(text)
        assert ids == trained.encode(text).ids
        assert decode(found, ids) == text
        stream = found.stream(ids[:3])
        assert "".join(map(stream.push, ids[3:])) == text[len(trained.decode(ids[:3])) :]
    # Half a character is held back, and given up at the end.
    stream = found.stream()
    assert stream.push(found.encode("🙂")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert load_decoder(folder, tokenizer=False).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ExchangeError, match=r"tokenizer.json is damaged or no tokenizer.json"):
        load_decoder(folder)


def test_without_the_library_the_message_says_how_to_get_it(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizer.json needs the library tokenizers; .* pip install tokenizers"):
        load_decoder(folder)
