"""Models a layer at a time: as by hand, in bounded memory, and after a kill with the same bits."""

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.exchange import ExchangeError
from hashml.models import decoder, encoder
from hashml.models.decoder import DecoderConfig
from hashml.models.encoder import EncoderConfig
from hashml.weights.calibration import calibrate
from hashml.weights.quantize_model import (
    dequantize_params,
    kernel_groups,
    model_hessians,
    quantize_decoder,
    quantize_encoder,
)
from hashml.weights.quantized import QuantizationSpec, dequantize, matmul, preset, quantize_matrix
from hashml.weights.quantized_dense import QuantizedKernel

CONFIG = DecoderConfig(
    vocabulary=40, features=16, layers=3, heads=2, kv_heads=2, head_dim=8, hidden=24, rotary=None, qkv_bias=True
)
PARAMS = decoder.init_params(jax.random.key(0), CONFIG)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 40, (6, 10)).astype(np.int32)
SPEC, TABLES = preset("gptq", 3), preset("leanquant", 3)
SQUARE, WIDE, TALL = 16 * (6 + 3), 24 * (6 + 3), 16 * (9 + 3)
"""Bytes of packed kernels: 3 bits of 16 or 24 columns, a scale of 2 bytes and a zero of one a row."""
TEXT = EncoderConfig(vocabulary=40, features=16, layers=2, heads=2, hidden=16, context=12, pooler=False)
TEXT_PARAMS = encoder.init_params(jax.random.key(1), TEXT)


@pytest.fixture(scope="module")
def small():
    told = []
    model = quantize_decoder(PARAMS, CONFIG, TOKENS, SPEC, progress=lambda *both: told.append(both))
    return model, told


def _equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# --- by hand --------------------------------------------------------------------------------------


def _norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_eps) * scale


def _attend(q, k, v):
    """Causal attention without positions, ``[B, n, features]``."""
    batch, n, _ = q.shape
    q, k, v = (a.reshape(batch, n, 2, 8).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = np.where(np.tri(n, dtype=bool), q @ k.swapaxes(2, 3) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = weights / weights.sum(axis=-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(batch, n, 16)


def test_equals_each_kernel_by_hand(small):
    """The forward pass in NumPy: inputs of a group come from what is quantised before it, x from all of a layer."""
    model, told = small
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    x = params["embedding"][TOKENS]
    for index in range(CONFIG.layers):
        own = {name: leaf[index] for name, leaf in params["layers"].items()}

        def quantized(inputs, *names, own=own, index=index):
            hessian = calibrate(inputs.astype(np.float32))
            for name in names:
                weights = own[name].T.astype(np.float32)
                found = np.asarray(dequantize(quantize_matrix(weights, hessian, SPEC)))
                np.testing.assert_array_equal(dequantize(model.params["layers"][name])[index], found, name)
                # Half the trace with the Hessian, by its definition: the mean squared error of the outputs.
                missing = inputs.reshape(-1, inputs.shape[-1]) @ (weights - found).T
                expected = (missing**2).sum(axis=1).mean()
                np.testing.assert_allclose(model.losses[name][index], expected, rtol=1e-4)
                own[name] = found.T.astype(np.float64)

        u = _norm(x, own["attention_norm"])
        quantized(u, "query", "key", "value")
        out = _attend(*(u @ own[name] + own[f"{name}_bias"] for name in ("query", "key", "value")))
        quantized(out, "output")
        x = x + out @ own["output"]
        u = _norm(x, own["mlp_norm"])
        quantized(u, "gate", "up")
        gate = u @ own["gate"]
        hidden = gate / (1 + np.exp(-gate)) * (u @ own["up"])
        quantized(hidden, "down")
        x = x + hidden @ own["down"]
    assert told == [(7 * layer + done, 21) for layer in range(3) for done in (3, 4, 6, 7)]


def test_codes_run_where_kernels_ran(small):
    model, _ = small
    assert all(isinstance(model.params["layers"][name], QuantizedKernel) for name in model.losses)
    assert model.params["embedding"] is PARAMS["embedding"]
    assert model.params["layers"]["query_bias"] is PARAMS["layers"]["query_bias"]
    dense = dequantize_params(model.params)
    assert dense["layers"]["up"].shape == PARAMS["layers"]["up"].shape
    expected = np.asarray(decoder.forward(dense, CONFIG, jnp.asarray(TOKENS)))
    found = decoder.forward(model.params, CONFIG, jnp.asarray(TOKENS))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    kernels = {name: model.params["layers"][name] for name in model.losses}
    assert stored_bytes(kernels) == 3 * (4 * SQUARE + 2 * WIDE + TALL)


def test_an_encoder_runs_from_codes():
    mask = np.arange(10) < np.array([10, 3, 7, 10, 1, 5])[:, None]
    model = quantize_encoder(TEXT_PARAMS, TEXT, TOKENS, TABLES, mask=mask)
    assert set(model.losses) == {"query", "key", "value", "output", "up", "down"}
    arguments = TEXT, jnp.asarray(TOKENS), jnp.asarray(mask)
    expected = np.asarray(encoder.forward(dequantize_params(model.params), *arguments))
    found = encoder.forward(model.params, *arguments, dense=matmul)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Whatever stands at padding, and rows of padding alone, change nothing.
    other = np.concatenate([np.where(mask, TOKENS, 39 - TOKENS), TOKENS[:1]])
    same = quantize_encoder(TEXT_PARAMS, TEXT, other, TABLES, mask=np.concatenate([mask, np.zeros((1, 10), bool)]))
    _equal(same.params, model.params)


def test_padding_of_a_decoder_is_not_calibrated_on():
    """Sequences cut at 7 tokens, or filled up to 10."""
    positions = np.where(np.arange(10) < 7, np.arange(10), -1)[None].repeat(6, axis=0)
    padded = model_hessians(PARAMS, CONFIG, TOKENS, positions)
    cut = model_hessians(PARAMS, CONFIG, TOKENS[:, :7])
    for _ in range(4):
        one, other = next(padded), next(cut)
        assert (one.layer, one.names) == (other.layer, other.names)
        assert int(one.hessian.tokens) == int(other.hessian.tokens) == 42
        np.testing.assert_allclose(one.hessian.matrix, other.hessian.matrix, rtol=1e-4, atol=1e-6)


# --- a run that is killed, and its memory ---------------------------------------------------------


class Killed(Exception):
    """In place of a signal."""


def test_a_resumed_run_ends_with_the_same_bits(small, tmp_path):
    def kill(done: int, _: int) -> None:
        if done >= 10:
            raise Killed

    with pytest.raises(Killed):
        quantize_decoder(PARAMS, CONFIG, TOKENS, SPEC, folder=tmp_path, progress=kill)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["layer-0000.safetensors"]
    told = []
    model = quantize_decoder(PARAMS, CONFIG, TOKENS, SPEC, folder=tmp_path, progress=lambda *both: told.append(both))
    assert told == [(7, 21), *small[1][4:]]
    _equal(model.params, small[0].params)
    _equal(model.losses, small[0].losses)
    assert len(list(tmp_path.iterdir())) == 3

    for other in ({"spec": TABLES}, {"tokens": TOKENS[:5]}, {"params": _with(PARAMS, "up", 2.0)}):
        arguments: dict[str, Any] = {"params": PARAMS, "config": CONFIG, "tokens": TOKENS, "spec": SPEC} | other
        with pytest.raises(ExchangeError, match=f"geometry disagrees.*{next(iter(other))}: file"):
            quantize_decoder(**arguments, folder=tmp_path)
    last = tmp_path / "layer-0002.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(ExchangeError, match="layer-0002.safetensors: checksum disagrees"):
        quantize_decoder(PARAMS, CONFIG, TOKENS, SPEC, folder=tmp_path)


def _with(params: Any, name: str, value: float) -> Any:
    layers = params["layers"]
    return params | {"layers": layers | {name: layers[name].at[1, 3, 2].set(value)}}


def test_memory_does_not_grow_with_layers():
    """Between two groups: x of all tokens, one layer, and what is finished, packed; no Hessian."""
    finished = {3: 3 * SQUARE, 4: 4 * SQUARE, 6: 4 * SQUARE + 2 * WIDE, 7: 4 * SQUARE + 2 * WIDE + TALL}
    before, held = _live(), []

    def tell(done: int, _: int) -> None:
        layer, place = divmod(done - 1, 7)
        losses = 4 * done
        held.append(_live() - before - layer * finished[7] - finished[place + 1] - losses)

    quantize_decoder(PARAMS, CONFIG, TOKENS, SPEC, progress=tell)
    assert held[8:] == held[4:8]
    x, kernels, vectors, batches = 4 * TOKENS.size * 16, 4 * (4 * 16 * 16 + 3 * 16 * 24), 4 * 5 * 16, 9 * TOKENS.size
    assert max(held) <= x + kernels + vectors + batches + 64


def _live() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


# --- what is refused ------------------------------------------------------------------------------


def test_groups_of_kernels():
    assert kernel_groups(CONFIG) == (("query", "key", "value"), ("output",), ("gate", "up"), ("down",))
    smeared = dataclasses.replace(CONFIG, smear=True, gated=False)
    assert kernel_groups(smeared) == (("query", "value"), ("key",), ("output",), ("up",), ("down",))
    assert kernel_groups(TEXT) == (("query", "key", "value"), ("output",), ("up",), ("down",))


def test_refusals():
    def run(params: Any = PARAMS, tokens: Any = TOKENS, spec: QuantizationSpec = SPEC, **options: Any) -> None:
        quantize_decoder(params, CONFIG, tokens, spec, **options)

    with pytest.raises(ValueError, match=r"tokens has the shape \(0, 10\): there is no calibration data"):
        run(tokens=TOKENS[:0])
    with pytest.raises(ValueError, match="positions has no token: there is no calibration data"):
        run(positions=np.full(TOKENS.shape, -1))
    with pytest.raises(ValueError, match="tokens has 40; allowed are 0 to 39"):
        run(tokens=np.full((2, 3), 40))
    with pytest.raises(ValueError, match="bits is 5; allowed are 1, 2, 3, 4, 8"):
        run(spec=preset("leanquant", 5))
    with pytest.raises(ValueError, match="kernel 'down': groups is 16; it must divide the 24 columns"):
        run(spec=preset("gptq", 3, groups=16))
    with pytest.raises(ValueError, match="layer 1, 'up': weights are NaN or infinite"):
        run(params=_with(PARAMS, "up", np.nan))
    with pytest.raises(ValueError, match="inputs of layer 0, query and key and value: x or its square is NaN"):
        run(params=PARAMS | {"embedding": PARAMS["embedding"] * np.inf})
    with pytest.raises(ValueError, match="encoder takes|at most 12 tokens"):
        quantize_encoder(TEXT_PARAMS, TEXT, np.zeros((1, 13), np.int32), SPEC)
