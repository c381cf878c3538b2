"""KIVI: per-channel scales over blocks of tokens, what they are for, and that a block is coded for good."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.kvcache.contract import CodecState
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys, kivi

B, H, D, G = 2, 2, 32, 32
OUTLIERS = (3, 17, 30)


@functools.partial(jax.jit, static_argnames="codec")
def coded(codec, x, valid=None):
    """Rows, and what they decode to."""
    valid = jnp.ones(x.shape[:3], bool) if valid is None else valid
    rows = codec.quantise({}, {}, x, valid)
    return rows, codec.decode({}, CodecState(rows, {}))


def tokens(count, outliers=(), seed=0):
    """Channels with an AR(1) correlation of 1/2 over tokens; those of ``outliers`` are ten times as large."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, H, count, D))
    for n in range(1, count):
        x[:, :, n] = 0.5 * x[:, :, n - 1] + np.sqrt(0.75) * x[:, :, n]
    x[..., list(outliers)] *= 10
    return jnp.asarray(x, jnp.float32)


def error(codec, x, channels=None):
    channels = np.arange(D) if channels is None else channels
    return float(((coded(codec, x)[1] - x) ** 2)[..., channels].mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_error_exceeds_half_its_blocks_scale(bits):
    x = tokens(2 * G, OUTLIERS)
    rows, decoded = coded(KiviKeys(bits, G), x)
    scale = np.repeat(np.asarray(rows["scale"], np.float32), G, axis=2)
    assert rows["scale"].shape == rows["minimum"].shape == (B, H, 2, D)
    assert (np.abs(decoded - x) <= scale / 2 * 1.001 + 1e-5).all()


def test_equals_fake_quantisation_of_the_same_blocks():
    """The paper's formula in NumPy, with minima that are float16 numbers."""
    x = np.asarray(tokens(2 * G).astype(jnp.float16), np.float64)
    rows, decoded = coded(KiviKeys(2, G), jnp.asarray(x, jnp.float32))
    blocks = x.reshape(B, H, 2, G, D)
    low, high = blocks.min(3, keepdims=True), blocks.max(3, keepdims=True)
    scale = ((high - low) / 3).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(rows["scale"], scale[:, :, :, 0], rtol=2**-10)
    fake = np.clip(np.rint((blocks - low) / scale), 0, 3) * scale + low
    np.testing.assert_allclose(decoded, fake.reshape(x.shape), atol=1e-4)


def test_eight_bits_are_near_exact():
    """The error of a uniform quantiser, scale / sqrt(12), with scale = range / 255 of some 4 deviations."""
    x = tokens(2 * G, OUTLIERS)
    relative = np.abs(coded(KiviKeys(8, G), x)[1] - x) / np.abs(x).max(axis=2, keepdims=True)
    assert relative.max() < 2 / 255 / 2 * 1.01


def test_keys_per_channel_values_per_token():
    """With a few large channels, scales per channel are far better, without them no better: the paper's finding."""
    per_channel, per_token = KiviKeys(2, G), IntGroup(2, G)
    with_outliers, without = tokens(8 * G, OUTLIERS), tokens(8 * G)
    assert error(per_channel, with_outliers) < 0.5 * error(per_token, with_outliers)
    # A large channel spoils only itself: the others have the errors they had without it. Per token they lose all.
    ordinary = np.setdiff1d(np.arange(D), OUTLIERS)
    np.testing.assert_allclose(error(per_channel, with_outliers, ordinary), error(per_channel, without, ordinary))
    assert error(per_token, with_outliers, ordinary) > 0.8 * float((with_outliers[..., ordinary] ** 2).mean())
    # A channel's range over 32 correlated tokens and a token's over 32 channels are alike.
    assert error(per_token, without) < 1.25 * error(per_channel, without)
    # Values that tokens scale, as attention sinks do, turn it around.
    scaled = without.at[:, :, ::G].mul(10.0)
    assert error(per_token, scaled) < 0.5 * error(per_channel, scaled)


def test_a_blocks_bytes_do_not_depend_on_other_blocks_or_rows():
    x = tokens(3 * G)
    rows, _ = coded(KiviKeys(2, G), x)
    first, _ = coded(KiviKeys(2, G), x[1:, :, :G])
    other, _ = coded(KiviKeys(2, G), x.at[:, :, G:].set(99.0))
    for found in (first, {name: leaf[1:] for name, leaf in other.items()}):
        np.testing.assert_array_equal(found["q"][:, :, :G], rows["q"][1:, :, :G])
        for leaf in ("scale", "minimum"):
            np.testing.assert_array_equal(found[leaf][:, :, :1], rows[leaf][1:, :, :1])


def test_tokens_that_are_not_there_move_no_scale():
    """Whatever stands in a hole, each head with its own holes: bytes of the others are as of a shorter block."""
    x = tokens(G)
    valid = np.random.default_rng(1).random((B, H, G)) < 0.6
    holes = jnp.where(jnp.asarray(valid)[..., None], x, jnp.asarray([1e9, -1e9] * (D // 2), jnp.float32))
    rows, decoded = coded(KiviKeys(2, G), holes, jnp.asarray(valid))
    zeros, _ = coded(KiviKeys(2, G), jnp.where(jnp.asarray(valid)[..., None], x, 0), jnp.asarray(valid))
    for b in range(B):
        for h in range(H):
            mine = np.asarray(x[b, h])[valid[b, h]]
            np.testing.assert_array_less(np.asarray(rows["minimum"], np.float32)[b, h, 0], mine.min(0) + 1e-7)
            np.testing.assert_allclose(rows["scale"][b, h, 0], np.ptp(mine, axis=0) / 3, rtol=2e-3)
            scale = np.asarray(rows["scale"], np.float32)[b, h, 0]
            assert (np.abs(np.asarray(decoded[b, h])[valid[b, h]] - mine) <= scale / 2 * 1.001 + 1e-5).all()
    np.testing.assert_array_equal(rows["scale"], zeros["scale"])
    nothing, decoded = coded(KiviKeys(2, G), holes, jnp.zeros((B, H, G), bool))
    assert (nothing["scale"] == 0).all()
    assert jnp.isfinite(decoded).all()


@pytest.mark.parametrize(("bits", "token"), [(2, 98304), (4, 163840)])
def test_bytes_of_a_token_are_as_published(bits, token):
    """LLaMA-7b: 3 bits a value for 2-bit codes in groups of 32, 5.3 times less than the 524288 of fp16."""
    states = [jax.eval_shape(lambda c=codec: c.init(1, 32, 64, 128, jnp.float16)) for codec in kivi(bits)]
    assert 32 * stored_bytes(states) == 64 * token
    assert kivi(bits) == (KiviKeys(bits, 32), IntGroup(bits, 32))
    assert KiviKeys(bits).granularity == 32
    assert KiviKeys(bits).space == "post_rope"
