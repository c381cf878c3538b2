"""What holds of every codec: rows fit the store, codes are idempotent, tokens independent, bytes as counted."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.accounting import stored_bytes
from hashml.kvcache.contract import Codec, CodecState
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.dense import Dense
from hashml.kvcache.integer import Float8, Int8, IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.kvquant import NonUniformKeys, NonUniformValues
from hashml.kvcache.think import ThinK

B, H, J, D, C = 2, 2, 2, 16, 8
RNG = np.random.default_rng(0)
SIGNPOSTS = jnp.asarray([-1.0, -0.4, 0.1, 0.8])
RANGES = {"low": jnp.full((H, D), -2.0), "high": jnp.linspace(1, 3, H * D).reshape(H, D), "table": SIGNPOSTS}


def book(channels, bits):
    """A random codebook, as float16 holds it."""
    return {"codebook": jnp.asarray(RNG.normal(size=(H, D // channels, 2**bits, channels)), jnp.float16)}


class Case(NamedTuple):
    codec: Codec
    params: dict
    bits: float
    """A value's, by hand, in heads of width 128 with 64 slots."""


CASES = {
    "dense": Case(Dense(), {}, 32),
    "int8": Case(Int8(), {}, 8 + 16 / 128),
    "fp8": Case(Float8(), {}, 8 + 16 / 128),
    "int4 in 16s": Case(IntGroup(4, 16), {}, 4 + 32 / 16),
    "int2 in 8s": Case(IntGroup(2, 8), {}, 2 + 32 / 8),
    "int3 in 4s": Case(IntGroup(3, 4), {}, 3 + 32 / 4),
    "kivi 2": Case(KiviKeys(2, 4), {}, 2 + 32 / 4),
    "nuq keys": Case(NonUniformKeys(2), RANGES, 2),
    "nuq keys, outliers": Case(NonUniformKeys(2, 2), RANGES, 2 + 24 * 2 / 128),
    "nuq values": Case(NonUniformValues(2), {"table": SIGNPOSTS}, 2 + 32 / 128),
    "nuq values, outlier": Case(NonUniformValues(2, 1), {"table": SIGNPOSTS}, 2 + 32 / 128 + 24 / 128),
    "cq 2c8b": Case(Coupled.named("2c8b"), book(2, 8), 4),
    "cq 8c8b": Case(Coupled.named("8c8b"), book(8, 8), 1),
    "cq 8c10b": Case(Coupled.named("8c10b"), book(8, 10), 1.25),
    "cq 4c3b": Case(Coupled(4, 3), book(4, 3), 0.75),
    # int(128 * 0.4) = 51 of 128 channels go, and the 77 kept ones are a byte each a head.
    "think": Case(ThinK(Dense(), 0.4), {}, 32 * 77 / 128 + 8 * 77 / 128 / 64),
    "think, int": Case(ThinK(IntGroup(4, 4), 0.5), {}, (4 + 32 / 4) / 2 + 8 / 2 / 64),
    "think, kivi": Case(ThinK(KiviKeys(2, 4), 0.5), {}, (2 + 32 / 4) / 2 + 8 / 2 / 64),
    "think, cq": Case(ThinK(Coupled(4, 8), 0.5, pair_tied=True), book(4, 8), 2 / 2 + 8 / 2 / 64),
    # 51 of 128 go, and of the 77 kept ones there are 3 more, up to a multiple of 8.
    "think, int, padded": Case(ThinK(IntGroup(4, 8), 0.4, multiple_of=8), {}, (4 + 4) * 80 / 128 + 8 * 80 / 128 / 64),
    "think, cq, neighbours": Case(ThinK(Coupled(4, 8), 0.5, True, pairs="interleaved"), book(4, 8), 1 + 8 / 2 / 64),
    "think, nuq": Case(ThinK(NonUniformKeys(2, 1), 0.25, True), RANGES, 2 * 0.75 + 24 / 128 + 8 * 0.75 / 64),
}
MEASURES_ANEW = ("nuq values", "nuq values, outlier")
"""Signposts do not end at -1 and 1, so what was decoded has a smaller range, and other codes."""


@functools.partial(jax.jit, static_argnames="codec")
def quantise(codec, params, fixed, x):
    return codec.quantise(params, fixed, x, jnp.ones(x.shape[:3], bool))


@functools.partial(jax.jit, static_argnames="codec")
def decode(codec, params, rows, fixed):
    return codec.decode(params, CodecState(rows, fixed))


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def test_rows_are_the_store_and_roles_name_its_leaves(name):
    """G rows of codes are G slots: shapes and dtypes are those of `init`, so writing copies and casts nothing."""
    codec, params, _ = CASES[name]
    codec.check(D)
    empty = codec.init(B, H, C, D, jnp.float32)
    rows = quantise(codec, params, empty.fixed, normal(B, H, C, D))
    assert {k: (x.shape, x.dtype) for k, x in rows.items()} == {k: (x.shape, x.dtype) for k, x in empty.slots.items()}
    assert set(codec.roles) == {*empty.slots, *empty.fixed}
    assert set(codec.roles.values()) <= {"payload", "scales", "index"}
    assert isinstance(codec, Codec)
    assert hash(codec) == hash(eval(repr(codec)))


def test_codes_of_what_was_decoded_are_its_codes(name):
    codec, params, _ = CASES[name]
    fixed = codec.init(B, H, C, D, jnp.float32).fixed
    rows = quantise(codec, params, fixed, 2 * normal(B, H, C, D) + 0.3)
    decoded = decode(codec, params, rows, fixed)
    assert decoded.shape == (B, H, C, D)
    assert decoded.dtype == jnp.float32
    again = quantise(codec, params, fixed, decoded)
    codes = next(k for k in ("x", "q", "code") if k in rows)
    if name not in MEASURES_ANEW:
        np.testing.assert_array_equal(again[codes], rows[codes])
        # KVQuant's outliers are chosen by distance anew, and one that lay inside its range may be another channel.
        if "outlier_index" not in rows:
            np.testing.assert_allclose(decode(codec, params, again, fixed), decoded, rtol=1e-3, atol=1e-6)


def test_a_token_is_coded_alone(name):
    """Without its neighbours, in another batch and at another place, the bytes are the same."""
    codec, params, _ = CASES[name]
    if codec.granularity > 1:
        pytest.skip("shares scales over tokens; see test_kivi")
    x = normal(B, H, C, D)
    fixed = codec.init(B, H, C, D, jnp.float32).fixed
    rows = quantise(codec, params, fixed, x)
    alone = quantise(codec, params, {k: f[1:] for k, f in fixed.items()}, x[1:, :, 5:6])
    turned = quantise(codec, params, {k: f[::-1] for k, f in fixed.items()}, x[::-1, :, ::-1])
    for leaf, whole in rows.items():
        np.testing.assert_array_equal(alone[leaf], whole[1:, :, 5:6])
        np.testing.assert_array_equal(turned[leaf], whole[::-1, :, ::-1])


def test_bytes_are_as_counted_by_hand(name):
    codec, _, bits = CASES[name]
    codec.check(128)
    state = jax.eval_shape(lambda: codec.init(3, 5, 64, 128, jnp.float32))
    assert 8 * stored_bytes(state) == bits * 3 * 5 * 64 * 128


def test_an_empty_store_decodes_to_something_finite(name):
    codec, params, _ = CASES[name]
    for slots in (C, 0):
        empty = codec.init(B, H, slots, D, jnp.float32)
        decoded = decode(codec, params, *empty)
        assert decoded.shape == (B, H, slots, D)
        assert jnp.isfinite(decoded).all()


def test_logits_and_sums_are_those_of_decoded_tokens(name):
    """NumPy's inner products; raw keys are turned first by whatever `rotate` is."""
    codec, params, _ = CASES[name]
    fixed = codec.init(B, H, C, D, jnp.float32).fixed
    state = CodecState(quantise(codec, params, fixed, normal(B, H, C, D)), fixed)
    decoded = np.asarray(decode(codec, params, *state), np.float64)
    q, probs = normal(B, H, J, 3, D), jax.nn.softmax(normal(B, H, J, 3, C))
    turn = np.where(np.arange(D) % 2, -1.0, 1.0).astype(np.float32)
    read, turned, out = jax.jit(
        lambda state, q, probs: (
            codec.logits(params, state, q, None),
            codec.logits(params, state, q, lambda k: k * turn),
            codec.weighted_sum(params, state, probs),
        )
    )(state, q, probs)
    logits = functools.partial(np.einsum, "bhjnd,bhcd->bhjnc", np.asarray(q, np.float64))
    np.testing.assert_allclose(read, logits(decoded), atol=1e-4)
    np.testing.assert_allclose(turned, logits(decoded * turn), atol=1e-4)
    np.testing.assert_allclose(out, np.einsum("bhjnc,bhcd->bhjnd", np.asarray(probs, np.float64), decoded), atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "int8", "fp8", "int2 in 8s", "kivi 2", "nuq keys, outliers",
                                  "nuq values, outlier", "cq 8c8b", "think, cq"])  # fmt: skip
def test_takes_bfloat16(name):
    """The same codes as of the same numbers in float32."""
    codec, params, _ = CASES[name]
    x = normal(B, H, C, D, dtype=jnp.bfloat16)
    fixed = codec.init(B, H, C, D, jnp.bfloat16).fixed
    rows, wide = quantise(codec, params, fixed, x), quantise(codec, params, fixed, x.astype(jnp.float32))
    for leaf in rows:
        np.testing.assert_array_equal(rows[leaf].astype(jnp.float32), wide[leaf].astype(jnp.float32))


# --- integers -------------------------------------------------------------------------------------

INTEGERS = [Int8(), *(IntGroup(bits, 8) for bits in (1, 2, 3, 4, 8))]


@pytest.mark.parametrize("codec", INTEGERS, ids=str)
@pytest.mark.parametrize("offset", [0, 12.34, -300])
def test_no_error_exceeds_half_a_scale(codec, offset):
    """Nor half a step of the float16 minimum over the number of steps, which counts for small groups far from 0."""
    x = normal(B, H, C, D) * jnp.asarray(np.geomspace(0.1, 100, C)[:, None], jnp.float32) + offset
    rows = quantise(codec, {}, {}, x)
    decoded = np.asarray(decode(codec, {}, rows, {}), np.float64)
    scale = np.repeat(np.asarray(rows["scale"], np.float64), D // rows["scale"].shape[-1], axis=-1)
    rounding = 1e-6 * np.abs(x)  # of float32
    if "minimum" in rows:
        step = np.abs(np.spacing(np.asarray(rows["minimum"]))).astype(np.float64)
        rounding += np.repeat(step, 8, axis=-1) / (2 * (2**codec.bits - 1))
    assert (np.abs(decoded - x) <= scale / 2 * 1.001 + rounding).all()
    again = quantise(codec, {}, {}, jnp.asarray(decoded, jnp.float32))
    np.testing.assert_array_equal(again["q"], rows["q"])


def test_groups_equal_the_formula():
    """KIVI's and everybody's min-max integers, in NumPy, where the minimum is a float16 and so is no concern."""
    x = np.asarray(normal(B, H, C, D).astype(jnp.float16), np.float64)
    rows = quantise(IntGroup(4, 8), {}, {}, jnp.asarray(x, jnp.float32))
    grouped = x.reshape(B, H, C, 2, 8)
    low = grouped.min(-1, keepdims=True)
    scale = ((grouped.max(-1, keepdims=True) - low) / 15).astype(np.float16)
    np.testing.assert_array_equal(rows["minimum"], low[..., 0])
    np.testing.assert_allclose(rows["scale"], scale[..., 0], rtol=2**-10)
    fake = low + np.rint((grouped - low) / scale) * scale
    np.testing.assert_allclose(decode(IntGroup(4, 8), {}, rows, {}), fake.reshape(x.shape), atol=1e-5)
    ends = np.take_along_axis(fake, grouped.argmax(-1)[..., None], -1)[..., 0]
    assert (np.abs(ends - grouped.max(-1)) <= 15 * 2**-11 * scale[..., 0]).all()


@pytest.mark.parametrize("codec", [Int8(), Float8(), IntGroup(2, 8), KiviKeys(2, 4)], ids=str)
def test_constant_tokens_are_exact(codec):
    """Zeros are; with a minimum, constants that float16 holds too, others to 2^-20; without one, all to 2^-11."""
    with_minimum = isinstance(codec, IntGroup | KiviKeys)
    for constant in (0.0, 2.5, -384.0, 1.2345678):
        x = jnp.full((1, 1, 4, D), constant)
        decoded = decode(codec, {}, quantise(codec, {}, {}, x), {})
        exact = constant == 0 or (with_minimum and constant == np.float16(constant))
        np.testing.assert_allclose(decoded, x, rtol=0 if exact else 2**-20 if with_minimum else 2**-11)


def test_int8_is_symmetric_and_never_saturates():
    x = jnp.stack([jnp.linspace(-3, 3, D), jnp.linspace(3, -3, D)])[None, None]
    rows = quantise(Int8(), {}, {}, x)
    assert rows["q"].min() == -127
    assert rows["q"].max() == 127
    np.testing.assert_array_equal(rows["q"][..., 0, :], -rows["q"][..., 1, :])


def test_fp8_keeps_relative_precision_beside_a_large_value():
    """Three mantissa bits: 2^-4 of every value that is not subnormal, where int8 has lost the small ones."""
    x = jnp.asarray([*np.geomspace(1e-2, 1, D - 1), 100.0], jnp.float32)[None, None, None]
    error = {type(c): np.abs(decode(c, {}, quantise(c, {}, {}, x), {}) / x - 1) for c in (Float8(), Int8())}
    assert error[Float8].max() <= 2**-4 + 1e-3
    assert error[Int8].max() == 1


NAN_SPOILS = {
    "dense": "itself", "int8": "token", "fp8": "token", "int4 in 16s": "token", "int2 in 8s": "group of 8",
    "kivi 2": "channel of a block", "nuq keys": "nothing", "nuq keys, outliers": "itself", "nuq values": "token",
    "nuq values, outlier": "token but its outliers", "cq 8c8b": "nothing", "think": "itself",
}  # fmt: skip
"""What a NaN in one channel of one token makes of the decoded tokens."""


@pytest.mark.parametrize("name", NAN_SPOILS)
def test_a_nan_spoils_what_the_docstring_says(name):
    """And nothing else; where it spoils nothing it is hidden, in a number that means nothing."""
    codec, params, _ = CASES[name]
    row, channel = 5, 2
    x = normal(B, H, C, D)
    broken = x.at[1, 0, row, channel].set(jnp.nan)
    fixed = codec.init(B, H, C, D, jnp.float32).fixed
    spoilt = np.zeros((B, H, C, D), bool)
    place = {"itself": (row, channel), "token": row, "token but its outliers": row, "group of 8": (row, slice(8)),
             "nothing": slice(0), "channel of a block": (slice(4, 8), channel)}[NAN_SPOILS[name]]  # fmt: skip
    spoilt[1, 0][place] = True
    rows = [quantise(codec, params, fixed, y) for y in (x, broken)]
    if "outliers" in NAN_SPOILS[name]:
        spoilt[1, 0, row, np.asarray(rows[1]["outlier_index"])[1, 0, row]] = False
    decoded = [np.asarray(decode(codec, params, one, fixed)) for one in rows]
    np.testing.assert_array_equal(np.isnan(decoded[1]), spoilt)
    elsewhere = np.ones((B, H, C), bool)
    elsewhere[1, 0, 4 : 8 if codec.granularity > 1 else 6] = codec.granularity > 1
    elsewhere[1, 0, row] = False
    same = elsewhere[..., None] & ~spoilt
    np.testing.assert_array_equal(decoded[0][same], decoded[1][same])


def test_huge_and_tiny_values_stay_finite():
    """Scales end where float16 does; nothing is NaN, whatever comes in."""
    for codec in (Int8(), Float8(), IntGroup(2, 8), KiviKeys(2, 4), NonUniformValues(2, 1)):
        params = {"table": SIGNPOSTS} if isinstance(codec, NonUniformValues) else {}
        for size in (1e30, 1e5, 1e-5, 1e-9, 1e-40):
            decoded = decode(codec, params, quantise(codec, params, {}, size * normal(1, 1, 4, D)), {})
            assert jnp.isfinite(decoded).all()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntGroup(0), "bits is 0; allowed are 1 to 8"),
        (lambda: IntGroup(9), "bits is 9; allowed are 1 to 8"),
        (lambda: IntGroup(4, 0), "group is 0; it must be at least 1"),
        (lambda: KiviKeys(16), "bits is 16; allowed are 1 to 8"),
        (lambda: KiviKeys(2, -4), "group is -4; it must be at least 1"),
        (lambda: Coupled(0, 8), "channels is 0; it must be at least 1"),
        (lambda: Coupled(8, 17), "bits is 17; allowed are 1 to 16"),
        (lambda: Coupled.named("8b8c"), "name is '8b8c'; allowed are channels and bits"),
        (lambda: NonUniformKeys(9), "bits is 9; allowed are 1 to 8"),
        (lambda: NonUniformValues(2, -1), "outliers is -1; it is not negative"),
        (lambda: ThinK(Dense(), 1.0), "dropped is 1.0; a part of the channels is at least 0 and below 1"),
        (lambda: ThinK(Dense(), multiple_of=0), "multiple_of is 0; it must be at least 1"),
    ],
)
def test_refuses_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("codec", "width", "message"),
    [
        (IntGroup(4, 32), 48, "group is 32; it must divide the head's width, 48"),
        (Coupled(8, 8), 20, "channels is 8; it must divide the head's width, 20"),
        (NonUniformKeys(2, 16), 16, "outliers is 16; it must be less than the head's width, 16"),
        (NonUniformKeys(2, 1), 320, "the head's width is 320; the channel of an outlier is a byte"),
        (NonUniformValues(3), 20, "the head's width is 20; its codes of 3 bits must fill whole bytes"),
        (ThinK(ThinK(Dense())), 16, "its channels are pruned already"),
        (ThinK(Coupled(4, 4)), 16, "pair_tied must be True"),
        (ThinK(NonUniformKeys(2)), 16, "pair_tied must be True"),
        (ThinK(KiviKeys(2), pair_tied=True), 16, "for keys after rotation; pair_tied must be False"),
        (
            ThinK(Dense(), pair_tied=True),
            15,
            "the head's width is 15; pair_tied with Dense\\(\\) needs a multiple of 2",
        ),
        (ThinK(Coupled(4, 4), pair_tied=True), 20, "needs a multiple of 8, so that whole groups"),
        (ThinK(IntGroup(2, 8), 0.3), 16, "group is 8; it must divide the head's width, 12"),
        (ThinK(Dense(), 0.3, multiple_of=8), 20, "multiple_of is 8; it must divide the head's width, 20"),
    ],
)
def test_refuses_heads_that_do_not_fit(codec, width, message):
    with pytest.raises(ValueError, match=message):
        codec.check(width)


def test_refuses_parameters_of_another_codec():
    x, valid = normal(B, H, C, D), jnp.ones((B, H, C), bool)
    with pytest.raises(ValueError, match="codebook is of shape .*; CQ-4c8b needs \\[heads, groups, 256, 4\\]"):
        Coupled(4, 8).quantise(book(8, 8), {}, x, valid)
    with pytest.raises(ValueError, match="x has width 8; the codebook is of 4 groups of 4 channels"):
        Coupled(4, 8).quantise(book(4, 8), {}, x[..., :8], valid)
    with pytest.raises(ValueError, match="table is of shape \\(4,\\); 3 bits need \\[8\\]"):
        NonUniformValues(3).quantise({"table": SIGNPOSTS}, {}, x, valid)
    with pytest.raises(ValueError, match="x has 6 tokens; they are quantised in blocks of group, 4"):
        KiviKeys(2, 4).quantise({}, {}, x[:, :, :6], valid[:, :, :6])
