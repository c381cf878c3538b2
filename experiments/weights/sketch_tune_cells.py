"""The cells of `experiments.weights.sketch_tune`: a model made small, what of it is trained, and what it scores."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments.data import language
from experiments.kvcache import fixtures
from experiments.kvcache.language_models import next_token_nll
from experiments.weights import compressed_models as models
from hashml.accounting import stored_bytes
from hashml.models.decoder import DecoderConfig, Params
from hashml.weights.quantize_model import dequantize_params
from hashml.weights.quantized import QuantizationSpec, preset
from hashml.weights.sketch_tune import sketch_spec, tables_of, with_tables

BASE: language.Name = "wikitext2"
TARGET: language.Name = "tiny_shakespeare"
DENSE = ("full", "kernels", "lora")
ADAPTERS = ("lora", "qlora", "qlora_bytes", "frozen")


@dataclasses.dataclass(frozen=True)
class Config:
    """Bits, groups and contenders; the defaults are those of the claims."""

    bits: tuple[int, ...] = (4, 3, 2)
    groups: tuple[int, ...] = (1, 4)
    """Tables a row of the sketch (GPR); all other grids have one a row."""
    control_bits: tuple[int, ...] = (3, 2)
    """Where other grids are tuned, and where adapters get equal bytes."""
    dense: tuple[str, ...] = DENSE
    """What starts from the dense model."""
    exponent: int = 3
    """Of the importance of columns, 3 or 4 in the reference; not searched."""
    steps: int = 300
    search_steps: int = 75
    """Of each learning rate that is tried, on the model of seed 0; they divide ``steps``."""
    batch_size: int = 8
    """Pieces of a step, each of"""
    sequence: int = 64
    """tokens."""
    scored: int = 256
    """Pieces of test text, and of validation text."""
    table_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    adapter_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    full_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: int = 3
    """Models f1, each with an order of batches and adapters of its own."""
    size: fixtures.Size = models.SIZE


@dataclasses.dataclass(frozen=True)
class Cell:
    """``grid`` scores a model that is made small and nothing else, ``tuned`` one that was adapted."""

    part: str
    method: str
    bits: int | None
    groups: int | None


def cells(config: Config) -> list[Cell]:
    """All contenders."""
    found = [Cell("grid", "dense", None, None), *(Cell("tuned", name, None, None) for name in config.dense)]
    for bits in config.bits:
        grids = [("rtn", 1), ("kmeans", 1), *(("sketch", groups) for groups in config.groups)]
        found += [Cell("grid", method, bits, groups) for method, groups in grids]
        controlled = bits in config.control_bits
        found += [
            Cell("tuned", method, bits, groups)
            for method, groups in (*grids, ("qlora", 1), ("qlora_bytes", 1), ("frozen", 1))
            if controlled or method in ("sketch", "qlora", "frozen")
        ]
    return found


# --- what is small, and what is trained ---------------------------------------------------------------


def spec_of(config: Config, method: str, bits: int, groups: int) -> QuantizationSpec:
    """How the base of a method is quantised. QLoRA's is an even grid, as it comes without calibration."""
    match method:
        case "sketch" | "frozen":
            return sketch_spec(bits, groups, exponent=config.exponent)
        case "kmeans":
            return preset("rtn_kmeans", bits, groups=groups)
        case _:
            return preset("rtn", bits, groups=groups)


def rank_of(config: Config, method: str, bits: int | None) -> int:
    """Of adapters: the least that gives them as many floats as the sketch of one table a row has, at ``bits`` or at
    the most bits for a dense base; with equal bytes, the largest that stays within the sketch's."""
    model = models.decoder_config(config.size)
    rows = sum(count * outputs for count, _, outputs in models.kernel_shapes(model).values())
    tables, each = rows * 2 ** (bits or max(config.bits)), models.floats_of_a_rank(model)
    if method == "qlora_bytes":
        # Two bytes a float on both sides; an even grid has a scale and a zero of a byte, 3 bytes a row.
        return (2 * tables - 3 * rows) // (2 * each)
    return math.ceil(tables / each)


def table_loss(tables: Any, params: Params, tokens: Array, config: DecoderConfig) -> Float[Array, ""]:
    return next_token_nll(with_tables(params, tables), config, tokens).mean()


def kernel_loss(kernels: Params, params: Params, tokens: Array, config: DecoderConfig) -> Float[Array, ""]:
    return next_token_nll(models.with_kernels(params, kernels), config, tokens).mean()


def full_loss(params: Params, nothing: Any, tokens: Array, config: DecoderConfig) -> Float[Array, ""]:
    return next_token_nll(params, config, tokens).mean()


@dataclasses.dataclass(frozen=True)
class Start:
    """Where tuning begins: a loss, what is trained, what is frozen, and how a model comes of both."""

    loss: models.Loss
    trained: Any
    frozen: Any
    rates: tuple[float, ...]
    kept: Any
    """What is stored of the kernels beside what is trained."""

    def finished(self, trained: Any) -> Params:
        """Dense parameters, of what is stored in 16 bits."""
        trained = models.restored(models.halved(trained))
        if self.loss is table_loss:
            return dequantize_params(with_tables(self.frozen, trained))
        if self.loss is kernel_loss:
            return models.with_kernels(self.frozen, trained)
        return models.merged(self.frozen, trained) if self.loss is models.adapted_loss else trained


@functools.lru_cache(maxsize=2)
def start(config: Config, cell: Cell, seed: int) -> Start:
    model, dense = models.decoder_config(config.size), fixtures.params(config.size, "f1", seed)
    if cell.method == "full":
        return Start(full_loss, dense, None, config.full_rates, None)
    if cell.method == "kernels":
        return Start(kernel_loss, models.kernels(dense, model), dense, config.full_rates, None)
    small = dense
    if cell.method != "lora":
        assert cell.bits is not None
        assert cell.groups is not None
        small = models.quantized(config.size, seed, spec_of(config, cell.method, cell.bits, cell.groups))
    kept = models.kernels(small, model)
    if cell.method in ADAPTERS:
        # Decoded once: the same numbers as products with codes.
        frozen = dequantize_params(small)
        most = max(rank_of(config, "qlora", bits) for bits in config.bits)
        rank = rank_of(config, cell.method, cell.bits)
        drawn = models.draw_adapters(jax.random.key(seed), frozen, model, rank, most)
        return Start(models.adapted_loss, drawn, frozen, config.adapter_rates, kept)
    codes, tables = {name: matrix.codes for name, matrix in kept.items()}, tables_of(small)
    # Written out as tables, every kind of grid is the same program.
    return Start(table_loss, tables, with_tables(small, tables), config.table_rates, codes)


# --- scores -------------------------------------------------------------------------------------------


def scores(config: Config, cell: Cell, seed: int) -> dict[str, Any]:
    """Nats a byte on both texts' test parts, bytes of the kernels and what is trained of them."""
    return _grid(config, cell, seed) if cell.part == "grid" else _tuned(config, cell, seed)


def _grid(config: Config, cell: Cell, seed: int) -> dict[str, Any]:
    params, model = fixtures.params(config.size, "f1", seed), models.decoder_config(config.size)
    if cell.method != "dense":
        assert cell.bits is not None
        assert cell.groups is not None
        params = models.quantized(config.size, seed, spec_of(config, cell.method, cell.bits, cell.groups))
    stored = stored_bytes(models.halved(models.kernels(params, model)))
    return _scored(config, dequantize_params(params)) | _about(0, None, stored)


def _tuned(config: Config, cell: Cell, seed: int) -> dict[str, Any]:
    began, rate = start(config, cell, seed), chosen_rate(config, cell)
    trained = _trained(config, began, rate, config.steps, seed)
    rank, counted = None, trained
    if cell.method in ADAPTERS:
        rank = rank_of(config, cell.method, cell.bits)
        counted = models.cut(trained, rank)
    floats = sum(leaf.size for leaf in jax.tree.leaves(counted))
    if cell.method == "full":
        counted = models.kernels(trained, models.decoder_config(config.size))
    stored = stored_bytes(models.halved((began.kept, counted)))
    edges = (min(began.rates), max(began.rates)) if len(began.rates) > 1 else ()
    return _scored(config, began.finished(trained)) | _about(floats, rank, stored) | {
        "learning_rate": rate,
        "at_the_edge": rate in edges,
    }  # fmt: skip


def _about(floats: int, rank: int | None, stored: int) -> dict[str, Any]:
    empty = {"learning_rate": None, "at_the_edge": None}
    return {"trained_floats": floats, "rank": rank, "kernel_bytes": stored} | empty


def _scored(config: Config, params: Params) -> dict[str, float]:
    model = models.decoder_config(config.size)
    base, target = (models.held_out(text, config.sequence, config.scored)[1] for text in (BASE, TARGET))
    return {"base_nll": models.mean_nll(params, model, base), "nll": models.mean_nll(params, model, target)}


def _trained(config: Config, began: Start, rate: float, steps: int, seed: int) -> Any:
    tokens = models.batches(TARGET, config.sequence, config.batch_size, steps, seed)
    model = models.decoder_config(config.size)
    return models.tune(began.loss, began.trained, began.frozen, tokens, rate, model, config.search_steps)


@functools.lru_cache(maxsize=64)
def chosen_rate(config: Config, cell: Cell) -> float:
    """The learning rate of the least validation loss after few steps, on the model of seed 0."""
    began, model = start(config, cell, 0), models.decoder_config(config.size)
    if len(began.rates) == 1:
        return began.rates[0]
    validation, _ = models.held_out(TARGET, config.sequence, config.scored)
    losses = [
        models.mean_nll(began.finished(_trained(config, began, rate, config.search_steps, 0)), model, validation)
        for rate in began.rates
    ]
    return began.rates[int(np.nanargmin(losses))]
