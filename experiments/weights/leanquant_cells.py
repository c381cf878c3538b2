"""The cells of `experiments.weights.leanquant`: a model, a way to quantise it, what it then does."""

import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data import cranfield, text_classification
from experiments.data.counter import permutation, stream
from experiments.kvcache import fixtures, language_models
from experiments.lab import compare
from experiments.retrieval.hashed_projection_cells import ndcg
from experiments.retrieval.linear_probe import accuracy, fit
from experiments.weights.trained_weights import minilm_file
from hashml.accounting import stored_bytes
from hashml.models.decoder import DecoderConfig, Params, init_params
from hashml.models.encoder_checkpoints import LoadedEncoder, minilm
from hashml.models.sentence_embeddings import embed_sentences
from hashml.weights.calibration import Hessian
from hashml.weights.grids import GridSpec
from hashml.weights.quantize_model import (
    QuantizedModel,
    dequantize_params,
    kernel_groups,
    model_hessians,
    quantize_decoder,
    quantize_encoder,
)
from hashml.weights.quantized import QuantizationSpec, quantize_matrix

MINILM = "minilm"
EXPONENTS = (1, 2, 3, 4)
_KINDS: dict[str, tuple[Any, str, int]] = {
    "rtn": ("rtn", "min_max", 0),
    "rtn_mse": ("rtn", "mse", 0),
    "gptq": ("gptq", "min_max", 0),
    "gptq_groups": ("gptq", "min_max", 0),
    "rtn_kmeans": ("rtn", "kmeans", 0),
    "gptq_kmeans": ("gptq", "kmeans", 0),
    "leanquant_affine": ("gptq", "range_search", 4),
} | {f"leanquant_{p}": ("gptq", "kmeans", p) for p in EXPONENTS}
CHECKED = {
    "stories": ("rtn", "gptq", "gptq_groups", "gptq_kmeans", "leanquant_4", "leanquant_affine"),
    MINILM: ("rtn", "gptq", "gptq_kmeans", "leanquant_4"),
}
"""What is tried on models that only check what f1 shows; on ``f1_relu_gqa`` as on ``stories``."""
MORE_BITS = {
    4: ("rtn", "gptq", "gptq_kmeans", "leanquant_4", "leanquant_affine"),
    8: ("rtn", "gptq", "leanquant_affine"),
}
"""What is tried on f1 at more bits than 3."""


_SIZE = dataclasses.replace(fixtures.DEFAULT, rows=16, calibration=32)


@dataclasses.dataclass(frozen=True)
class Config:
    """Models, ways to quantise, texts; the defaults are those of the claims."""

    models: tuple[str, ...] = ("f1", "f1_relu_gqa", "stories", MINILM)
    """One that is not installed is left out."""
    seeds: int = 3
    """Trained models of ``f1``; of others the stories, or test sequences, and the calibration text."""
    methods: tuple[str, ...] = tuple(_KINDS)
    """On f1 at 2 and 3 bits; elsewhere those of them that `CHECKED` and `MORE_BITS` name."""
    bits: tuple[int, ...] = (2, 3, 4, 8)
    """4 and 8 on f1 alone."""
    damping: float = 0.1
    size: fixtures.Size = _SIZE
    """Of the language models: ``rows`` test sequences, ``calibration`` sequences."""
    sentences: int = 64
    """That the encoder is calibrated on, of AG News."""
    classified: int = 800
    """Sentences of SST-2 that a classifier of the encoder's embeddings is trained on, and as many that it is tested
    on."""
    documents: int = 1400
    """Of Cranfield's 1,400, the first of them, cut at 400 characters."""
    queries: int = 225
    """That have an answer among them."""
    repetitions: int = 6
    """Of timings."""
    large: int = 512
    """Width of a decoder of 5 layers, with 20 million parameters at 512, that is quantised for its time alone."""


class Cell(NamedTuple):
    """A way to quantise a model; ``float`` with 32 bits leaves it as it is."""

    model: str
    method: str
    bits: int
    seed: int


def cells(config: Config) -> list[Cell]:
    """All rows of quality, in the order in which they are measured."""
    found = []
    for model in config.models:
        if model == MINILM and minilm_file() is None:
            continue
        ways = [("float", 32)]
        for bits in config.bits:
            if model == "f1":
                tried = MORE_BITS.get(bits, config.methods)
            else:
                tried = CHECKED.get(model, CHECKED["stories"]) if bits < 4 else ()
            ways += [(method, bits) for method in config.methods if method in tried]
        seeds = 1 if model == MINILM else config.seeds
        found += [Cell(model, method, bits, seed) for method, bits in ways for seed in range(seeds)]
    return found


def spec_of(method: str, bits: int, divisor: int = 1, damping: float = 0.1) -> QuantizationSpec:
    """The settings of a method.

    Args:
        method: one of those of the docstring of `experiments.weights.leanquant`.
        bits: of a code.
        divisor: that the inputs of all kernels have in common, for ``gptq_groups``: as many groups as take no more
            bytes, a scale of 2 and a zero of 1 each, than a table of ``2**bits`` numbers of 2.
        damping: of the Hessian.
    """
    solver, kind, exponent = _KINDS[method]
    most = 2 * 2**bits // 3 if method == "gptq_groups" else 1
    groups = max(each for each in range(1, most + 1) if divisor % each == 0)
    return QuantizationSpec(GridSpec(bits, kind, groups, exponent), solver, damping=damping)


# --- models -------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model and the text that it is calibrated on."""

    params: Params
    config: Any
    tokens: np.ndarray
    mask: np.ndarray | None
    """Of an encoder."""

    @property
    def names(self) -> list[str]:
        return [name for group in kernel_groups(self.config) for name in group]

    @property
    def divisor(self) -> int:
        return math.gcd(*(self.params["layers"][name].shape[-2] for name in self.names))


@functools.lru_cache(maxsize=4)
def subject(config: Config, model: str, seed: int) -> Subject:
    """The model of a seed."""
    if model == MINILM:
        loaded = _minilm()
        tokens, mask = _padded(loaded, text_classification.load("ag_news", "train")[0][: config.sentences])
        return Subject(loaded.params, loaded.config, tokens, mask)
    # One model of the others: a seed picks its texts.
    trained = seed if model == "f1" else 0
    decoder = fixtures.setting(config.size, model, "decode").decoder
    tokens = fixtures.calibration_text(config.size, model, seed)
    if model == "f1_relu_gqa":
        larger = dataclasses.replace(config.size, calibration=config.seeds * config.size.calibration)
        tokens = fixtures.calibration_text(larger, model, 0)[seed :: config.seeds]
    return Subject(fixtures.params(config.size, model, trained), decoder, tokens, None)


def quantized(config: Config, cell: Cell) -> tuple[QuantizedModel, float]:
    """The quantised model, and the seconds that took, compilation included."""
    own = subject(config, cell.model, cell.seed)
    spec = spec_of(cell.method, cell.bits, own.divisor, config.damping)
    start = time.perf_counter()
    if own.mask is not None:
        found = quantize_encoder(own.params, own.config, own.tokens, spec, mask=own.mask)
    else:
        found = quantize_decoder(own.params, own.config, own.tokens, spec)
    jax.block_until_ready(found.params)
    return found, time.perf_counter() - start


def measure(config: Config, cell: Cell) -> dict[str, float | None]:
    """Bits, proxy loss, quality of a cell."""
    own = subject(config, cell.model, cell.seed)
    if cell.method == "float":
        params, found = own.params, {"bits_per_weight": 32.0, "proxy": 0.0, "seconds": None}
    else:
        model, seconds = quantized(config, cell)
        kernels = {name: model.params["layers"][name] for name in own.names}
        weights = sum(own.params["layers"][name].size for name in own.names)
        found = {
            "bits_per_weight": 8 * stored_bytes(kernels) / weights,
            "proxy": float(sum(losses.sum() for losses in model.losses.values())),
            "seconds": seconds,
        }
        params = dequantize_params(model.params)
    quality: dict[str, float | None] = dict.fromkeys(("nll", "cosine", "ndcg", "accuracy"))
    if cell.model == MINILM:
        quality |= _encoder_quality(config, params)
    else:
        quality["nll"] = _held_out(config, cell.model, cell.seed, params, own.config)
    return found | quality


def _held_out(config: Config, model: str, seed: int, params: Params, decoder: DecoderConfig) -> float:
    """Nats a token of test sequences; those of f1's models are the same."""
    if model == "f1_relu_gqa":
        larger = dataclasses.replace(config.size, rows=config.seeds * config.size.rows)
        tokens = fixtures.texts(larger, model)[0][seed :: config.seeds]
    else:
        tokens = fixtures.texts(config.size, model, seed if model == "stories" else 0)[0]
    return float(np.asarray(language_models.next_token_nll(params, decoder, tokens), np.float64).mean())


# --- the encoder --------------------------------------------------------------------------------------


@functools.cache
def _minilm() -> LoadedEncoder:
    return minilm()


def _padded(loaded: LoadedEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of sentences, cut at 64 tokens."""
    assert loaded.tokenizer is not None
    ids = [each[:64] for each in loaded.tokenizer.encode(texts)]
    mask = np.arange(max(map(len, ids))) < np.array([len(each) for each in ids])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([np.asarray(each, np.int32) for each in ids])
    return tokens, mask


class _Texts(NamedTuple):
    """What embeddings are made of: sentences to train on, to test on, documents and queries."""

    texts: list[str]
    labels: np.ndarray
    """Of the sentences."""
    relevant: np.ndarray
    """Documents of a query."""


@functools.lru_cache(maxsize=1)
def _texts(classified: int, documents: int, queries: int) -> _Texts:
    sentences: list[str] = []
    labels = []
    for part in ("train", "test"):
        texts, classes = text_classification.load("sst2", part)
        chosen = permutation(stream(0, "leanquant", part), len(texts))[:classified]
        sentences += [texts[row] for row in chosen]
        labels.append(np.asarray(classes)[chosen])
    collection = cranfield.load()
    relevant = collection.relevant[:, :documents]
    answered = np.flatnonzero(relevant.any(axis=1))[:queries]
    searched = [text[:400] for text in collection.documents[:documents]]
    asked = [collection.queries[row] for row in answered]
    return _Texts(sentences + searched + asked, np.concatenate(labels), relevant[answered])


def _embedded(config: Config, params: Params) -> np.ndarray:
    loaded = _minilm()
    assert loaded.tokenizer is not None
    texts = _texts(config.classified, config.documents, config.queries).texts
    return embed_sentences(params, loaded.config, loaded.tokenizer, texts)


@functools.lru_cache(maxsize=1)
def _exact(config: Config) -> np.ndarray:
    return _embedded(config, _minilm().params)


def _encoder_quality(config: Config, params: Params) -> dict[str, float | None]:
    """Cosine with the exact embeddings, accuracy of a classifier of them, nDCG@10 of a search."""
    exact = _exact(config)
    vectors = exact if params is _minilm().params else _embedded(config, params)
    own = _texts(config.classified, config.documents, config.queries)
    train, test, documents, queries = np.split(
        vectors, np.cumsum([config.classified, config.classified, config.documents])
    )
    labels, held = own.labels[: config.classified], config.classified // 4
    probe = fit(
        train[held:], labels[held:], train[:held], labels[:held],
        learning_rates=(3e-3, 1e-2, 3e-2), epochs=20, batch=64, seed=0,
    )  # fmt: skip
    ranking = np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :10]
    return {
        "cosine": float((vectors * exact).sum(axis=1).mean()),
        "accuracy": accuracy(probe, test, own.labels[config.classified :]),
        "ndcg": ndcg(ranking, own.relevant),
    }


# --- time ---------------------------------------------------------------------------------------------

TIMED = ("gptq", "leanquant_4", "leanquant_affine")


@functools.lru_cache(maxsize=8)
def timings(config: Config, model: str, bits: int) -> dict[str, dict[str, float]]:
    """Seconds to solve all kernels of the first layer, their Hessians being there, in turns."""
    own = subject(config, model, 0)
    kernels: list[tuple[np.ndarray, Hessian]] = []
    for group in model_hessians(own.params, own.config, own.tokens, own.mask):
        if group.layer > 0:
            break
        kernels += [(np.asarray(own.params["layers"][name][0].T), group.hessian) for name in group.names]

    def solve(method: str) -> list[Any]:
        spec = spec_of(method, bits, damping=config.damping)
        return [quantize_matrix(weights, hessian, spec) for weights, hessian in kernels]

    functions = {method: functools.partial(solve, method) for method in TIMED}
    found = compare(functions, base="gptq", repetitions=config.repetitions, warmup=1)
    return {method: {name: float(value) for name, value in each._asdict().items()} for method, each in found.items()}


def large(config: Config) -> dict[str, float]:
    """Seconds to quantise a decoder of random weights by LeanQuant at 3 bits, with calibration and compilation."""
    width = config.large
    shape = DecoderConfig(vocabulary=16 * width, features=width, layers=5, heads=width // 64, kv_heads=width // 64,
                          head_dim=64, hidden=8 * round(width / 3), context=config.size.length)  # fmt: skip
    params = init_params(jax.random.key(0), shape)
    drawn = np.random.default_rng(0).integers(0, shape.vocabulary, (config.size.calibration, config.size.length))
    tokens = drawn.astype(np.int32)
    start = time.perf_counter()
    jax.block_until_ready(quantize_decoder(params, shape, tokens, spec_of("leanquant_4", 3)).params)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "weights": float(sum(leaf.size for leaf in jax.tree.leaves(params)))}
