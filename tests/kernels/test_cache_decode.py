"""Every backend equals a loop over rows, heads and slots in float64, and the cache's own attention."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml.kvcache import attending
from hashml.kvcache.contract import Codec, CodecState
from hashml.kvcache.coupled import Coupled as CoupledCodec
from hashml.kvcache.full import KeepAll
from hashml.kvcache.integer import IntGroup
from hashml.kvcache.kivi import KiviKeys
from hashml.kvcache.spec import LayerSpec, Rope
from hashml.kvcache.state import LayerTables, init_layer
from hashml.models.rotary import Rotary
from hashml_kernels.cache_decode import (
    Coupled,
    CoupledFormat,
    Dense,
    DenseFormat,
    IntegerFormat,
    KiviFormat,
    Quantised,
    cache_decode,
    formats,
    pallas_mosaic_tpu,
    pallas_triton,
    shapes,
    sines,
    xla,
)
from hashml_kernels.half_floats import half_to_float

EPS = float(np.finfo(np.float32).eps)


class Case(NamedTuple):
    keys: formats.Format
    values: formats.Format
    pairs: formats.Pairs | None = None
    queries: int = 1
    slots: int = 83
    width: int = 32
    own: bool = False
    sliding_window: int | None = None
    recent: int = 0
    dense: str = "float32"
    heads: int = 2


# No number of slots is a multiple of a tile, unless a block of scales asks for it.
ANY = {
    "integers": Case(IntegerFormat(4, 8), IntegerFormat(8, 32), queries=2, recent=5),
    "rotated_integers": Case(
        IntegerFormat(2, 8), IntegerFormat(4, 16), "half", own=True, sliding_window=40, recent=9
    ),
    "neighbours": Case(IntegerFormat(8, 32), DenseFormat(), "interleaved", recent=3, dense="bfloat16"),
    "kivi": Case(KiviFormat(2, 16), IntegerFormat(2, 32), queries=2, slots=80, recent=7),
    "kivi_values": Case(DenseFormat(), KiviFormat(4, 16), "half", slots=80, own=True, dense="float16"),
    "coupled": Case(CoupledFormat(8), CoupledFormat(4), "half", queries=2, own=True, sliding_window=1),
    "coupled_together": Case(CoupledFormat(4), CoupledFormat(8), "half", queries=2, recent=2),
    "coupled_neighbours": Case(CoupledFormat(2), CoupledFormat(1), "interleaved", recent=1),
    "one": Case(CoupledFormat(1), IntegerFormat(1, 16), "half", 1, 1, 16, heads=1),
}
XLA_ALONE = {
    "three_bits": Case(IntegerFormat(3, 5), KiviFormat(5, 3), "half", 3, 81, 10, sliding_window=50, recent=4),
    "ten_bits": Case(CoupledFormat(3, 10), CoupledFormat(2, 3), "interleaved", 2, 67, 6),
}
TPU = {
    "integers": Case(IntegerFormat(4, 32), IntegerFormat(8, 64), queries=2, slots=201, width=64, recent=5, heads=1),
    "kivi": Case(KiviFormat(2, 32), IntegerFormat(2, 32), slots=224, width=128, recent=7),
    "coupled": Case(CoupledFormat(8), CoupledFormat(8), "half", slots=333, width=128, recent=3, sliding_window=99),
    "neighbours": Case(CoupledFormat(4), CoupledFormat(2), "interleaved", 1, 140, 64, own=True),
    "dense": Case(DenseFormat(), KiviFormat(8, 64), "half", slots=192, width=128, dense="bfloat16", heads=1),
    "one_channel": Case(CoupledFormat(1), IntegerFormat(8, 128), "half", slots=150, width=128, heads=1),
}
CASES = [("reference", name) for name in ("kivi", "coupled_neighbours", "ten_bits")]
CASES += [("xla", name) for name in (*ANY, *XLA_ALONE)]
CASES += [("pallas_triton", name) for name in ANY] + [("pallas_mosaic_tpu", name) for name in TPU]


def case_of(backend: str, name: str) -> Case:
    return TPU[name] if backend == "pallas_mosaic_tpu" else (ANY | XLA_ALONE)[name]


def draw_leaves(case: Case, form: formats.Format, batch: int, rng: np.random.Generator) -> formats.Leaves:
    one = shapes.Case("", batch, case.heads, case.heads, case.slots, form, form, width=case.width, dense=case.dense)
    drawn = shapes.draw(one, rng)[1 : 1 + len(one.leaves(form))]
    return type(one.leaves(form))(*map(jnp.asarray, drawn))


def draw(case: Case, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and static arguments: rows that are full, half full with holes, and empty, slots in any order."""
    rng, batch = np.random.default_rng(seed), 3
    lines = case.heads if case.own else 1
    pos = np.stack([rng.permutation(case.slots) for _ in range(batch * lines)]).reshape(batch, lines, case.slots)
    pos[1][rng.random(pos[1].shape) < 0.4] = -1
    pos[2] = -1
    query_pos = np.array([case.slots + case.recent - 1, case.slots // 2, 5])
    arrays: dict[str, Any] = {
        "q": rng.standard_normal((batch, case.heads * case.queries, case.width)) / np.sqrt(case.width),
        "keys": draw_leaves(case, case.keys, batch, rng),
        "values": draw_leaves(case, case.values, batch, rng),
        "pos": pos,
        "query_pos": query_pos,
    }
    if case.recent:
        exact = rng.standard_normal((2, batch, case.heads, case.recent, case.width))
        arrays |= {"window_keys": exact[0], "window_values": exact[1]}
        arrays["window_pos"] = np.stack([query_pos[0] - np.arange(case.recent), *[[-1] * case.recent] * 2])
    kinds = {"f": np.float32, "i": np.int32}
    arrays = {
        name: array if isinstance(array, tuple) else jnp.asarray(array.astype(kinds[array.dtype.kind]))
        for name, array in arrays.items()
    }
    static: dict[str, Any] = {"key_format": case.keys, "value_format": case.values}
    if case.pairs:
        static["rotation"] = shapes.frequencies(case.width), case.pairs
    return arrays, static | {"sliding_window": case.sliding_window}


@functools.cache
def program(case: Case, implementation: Any):
    """The op, compiled once for all tests of a case."""
    static = draw(case)[1]
    # Interpreted kernels are long programs that run once: LLVM's passes would take most of the time.
    options = {"xla_backend_optimization_level": 0} if implementation.startswith("pallas") else None
    return jax.jit(
        lambda arrays: cache_decode(**arrays, **static, implementation=implementation), compiler_options=options
    )


def run(case: Case, implementation: str, arrays: dict[str, Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
    out, lse = program(case, implementation)(draw(case)[0] if arrays is None else arrays)
    assert out.dtype == lse.dtype == jnp.float32
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


# --- the loop -------------------------------------------------------------------------------------


def numbers(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The codes of a row, bit by bit."""
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return stream @ (1 << np.arange(bits))


def decoded(form: formats.Format, leaves: Any, b: int, h: int, n: int, width: int) -> np.ndarray:
    """One slot, in float64."""
    leaves = [np.asarray(leaf) for leaf in leaves]
    if isinstance(form, DenseFormat):
        return leaves[0][b, h, n].astype(np.float64)
    row, channel = leaves[0][b, h, n], np.arange(width)
    if isinstance(form, CoupledFormat):
        codes = numbers(row, width // form.channels, form.bits)
        group, place = np.divmod(channel, form.channels)
        return leaves[1][h, group, codes[group], place].astype(np.float64)
    per_slot = isinstance(form, IntegerFormat)
    scale, low = (leaf[b, h, n if per_slot else n // form.group].astype(np.float64) for leaf in leaves[1:])
    place = channel // form.group if per_slot else channel
    return low[place] + numbers(row, width, form.bits) * scale[place]


def loop(arrays: dict[str, Any], static: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """``(out, lse)``, and bounds for the errors that float32 makes of them."""
    q, pos = np.asarray(arrays["q"], np.float64), np.asarray(arrays["pos"])
    batch, query_heads, width = q.shape
    heads = arrays["keys"][0].shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], formats.MASKED)
    bounds = np.zeros(q.shape), np.full(q.shape[:2], 1e23)  # the second is the rounding of -1e30
    sliding_window = static["sliding_window"] or 10**9
    for b in range(batch):
        now = int(arrays["query_pos"][b])
        for h in range(heads):
            tokens = [
                (int(p), decoded(static["key_format"], arrays["keys"], b, h, n, width), n)
                for n, p in enumerate(pos[b, h if pos.shape[1] > 1 else 0])
                if 0 <= p <= now and p > now - sliding_window
            ]
            keys = [rotated(k, p, static.get("rotation")) for p, k, _ in tokens]
            values = [decoded(static["value_format"], arrays["values"], b, h, n, width) for *_, n in tokens]
            for r, p in enumerate(np.asarray(arrays["window_pos"][b]) if "window_pos" in arrays else ()):
                if 0 <= p <= now and p > now - sliding_window:
                    keys.append(np.asarray(arrays["window_keys"][b, h, r], np.float64))
                    values.append(np.asarray(arrays["window_values"][b, h, r], np.float64))
            for j in range(h * query_heads // heads, (h + 1) * query_heads // heads) if keys else ():
                k, v = np.array(keys), np.array(values)
                logits = k @ q[b, j]
                weights = np.exp(logits - logits.max())
                lse[b, j] = logits.max() + np.log(weights.sum())
                weights /= weights.sum()
                out[b, j] = weights @ v
                error = logit_error(k, q[b, j], static.get("rotation"), now)
                bounds[1][b, j] = error + EPS * (len(k) + 8 + 2 * np.abs(logits).max())
                # Each weight is off by twice that in relation, and numbers by what their parts are rounded.
                bounds[0][b, j] = (2 * bounds[1][b, j]) * (weights @ np.abs(v)) + 4 * EPS * np.abs(v).max()
    return out, lse, *bounds


def logit_error(keys: np.ndarray, q: np.ndarray, rotation: Any, now: int) -> float:
    """Of sums of products, of numbers made of a minimum and a code up to three times their size, and of angles."""
    width = len(q)
    error = 3 * (width + 4) * np.abs(keys * q).sum(axis=1).max()
    if rotation is not None:
        frequencies, pairs = rotation
        order = np.arange(width).reshape(2, -1) if pairs == "half" else np.arange(width).reshape(-1, 2).T
        sizes = np.linalg.norm(keys[:, order], axis=1) * np.linalg.norm(q[order], axis=0)
        error += (sizes @ (4 * width + 3 * now * frequencies.astype(np.float64))).max()
    return EPS * error


def rotated(x: np.ndarray, pos: int, rotation: Any) -> np.ndarray:
    if rotation is None:
        return x
    frequencies, pairs = rotation
    x, half = x.copy(), len(x) // 2
    for i, angle in enumerate(np.asarray(frequencies, np.float64) * pos):
        a, b = (i, i + half) if pairs == "half" else (2 * i, 2 * i + 1)
        x[a], x[b] = x[a] * np.cos(angle) - x[b] * np.sin(angle), x[a] * np.sin(angle) + x[b] * np.cos(angle)
    return x


@functools.cache
def truth(case: Case) -> tuple[np.ndarray, ...]:
    return loop(*draw(case))


def assert_equals_the_loop(case: Case, backend: str) -> None:
    out, lse, out_bound, lse_bound = truth(case)
    got_out, got_lse = run(case, backend)
    assert np.all(np.abs(got_out - out) <= out_bound)
    assert np.all(np.abs(got_lse - lse) <= lse_bound)
    assert out_bound.max() < 1e-2  # while results are of size one


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_backend_equals_the_loop(backend, name):
    assert_equals_the_loop(case_of(backend, name), backend)


@pytest.fixture
def _compiled_anew():
    """For tests that change a module's numbers."""
    program.cache_clear()
    yield
    program.cache_clear()


@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize(("name", "least", "size"), [("kivi", 10, 16), ("coupled", 7, 7)])
def test_blocks_of_xla_may_have_any_size(monkeypatch, name, least, size):
    """The last one begins early; blocks of scales stay whole."""
    monkeypatch.setattr(xla, "LEAST_SLOTS", least)
    monkeypatch.setattr(xla, "BLOCK_FLOATS", 1)
    assert xla.block_slots(*operands_of(ANY[name])) == size
    assert_equals_the_loop(ANY[name], "xla")


def operands_of(case: Case) -> tuple[formats.Operands, formats.DecodeGeometry]:
    one = shapes.Case(
        "", 3, case.heads * case.queries, case.heads, case.slots, case.keys, case.values, case.pairs, case.width
    )
    return one.operands(), one.geometry


@pytest.mark.usefixtures("_compiled_anew")
def test_triton_programs_share_slots_and_query_heads(monkeypatch):
    """Two programs for three query heads: one of them has a head of zeros."""
    monkeypatch.setattr(pallas_triton, "_PART", 16)
    monkeypatch.setattr(pallas_triton, "_MOST_QUERIES", 2)
    case = ANY["kivi"]._replace(queries=3)
    plan = pallas_triton._Plan.of(*operands_of(case))
    assert plan.parts > 1
    assert (plan.shares, plan.queries) == (2, 2)
    assert_equals_the_loop(case, "pallas_triton")


@pytest.mark.parametrize("queries", [1, 3, 5, 8, 11])
def test_triton_threads_hold_no_more_outputs_than_registers(queries):
    """With 64 numbers a thread the compiler spilled, up to 31 KiB. So fewer heads share a program."""
    for case in (case._replace(query_heads=queries * case.heads) for case in shapes.CASES):
        plan = pallas_triton._Plan.of(case.operands(), case.geometry)
        assert plan.tile * case.width * plan.queries * plan.heads / 128 <= 32
        assert plan.tile >= 8
        assert (plan.shares - 1) * plan.queries < queries <= plan.shares * plan.queries


def test_tpu_kernel_under_the_simulator():
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    simulate = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    case = TPU["coupled"]._replace(recent=0, heads=1, slots=200)
    arrays, static = draw(case)
    frequencies, pairs = static["rotation"]
    q = arrays["q"].reshape(3, case.heads, case.queries, case.width)
    keys, values, pos, query_pos = (arrays[name] for name in ("keys", "values", "pos", "query_pos"))
    operands = formats.Operands(q, keys, values, pos, query_pos, jnp.asarray(frequencies))
    geometry = formats.DecodeGeometry(case.keys, case.values, pairs, case.sliding_window)
    assert case.slots > pallas_mosaic_tpu._Plan.of(operands, geometry).slots > case.slots / 2  # a last, ragged block
    got = pallas_mosaic_tpu.partials(operands, geometry, interpret=simulate)
    for one, expected, bound in zip(got, truth(case), truth(case)[2:], strict=False):
        assert np.all(np.abs(np.asarray(one, np.float64).reshape(expected.shape) - expected) <= bound)


EMPTY = [("reference", "kivi"), ("xla", "neighbours"), ("xla", "kivi_values")]
EMPTY += [("pallas_triton", name) for name in ("integers", "neighbours", "kivi_values")]
EMPTY += [("pallas_mosaic_tpu", name) for name in ("integers", "dense")]


@pytest.mark.parametrize(("backend", "name"), EMPTY)
def test_what_lies_in_empty_slots_has_no_effect(backend, name):
    """NaN as numbers and scales of slots without a token, of blocks without one, and in the exact window."""
    case = case_of(backend, name)
    arrays, _ = draw(case)
    shared = max(map(formats.granularity, (case.keys, case.values)))
    arrays["pos"] = arrays["pos"].at[1, :, :shared].set(-1)  # a whole block, beside blocks with tokens
    empty = np.broadcast_to(np.asarray(arrays["pos"]) < 0, (3, case.heads, case.slots))[..., None]
    assert empty.any()

    def spoilt(form: formats.Format, leaves: Any) -> Any:
        group = formats.granularity(form)
        unseen = empty.reshape(3, case.heads, -1, group, 1).all(axis=3)
        return type(leaves)(
            *(leaf if leaf.dtype == jnp.uint8 else jnp.where(unseen, jnp.nan, leaf) for leaf in leaves)
        )

    changed = {"keys": spoilt(case.keys, arrays["keys"]), "values": spoilt(case.values, arrays["values"])}
    if case.recent:
        unseen = np.asarray(arrays["window_pos"] < 0)[:, None, :, None]
        assert unseen.any()
        changed |= {name: jnp.where(unseen, jnp.nan, arrays[name]) for name in ("window_keys", "window_values")}
    for got, expected in zip(run(case, backend, arrays | changed), run(case, backend, arrays), strict=True):
        np.testing.assert_array_equal(got, expected)


# --- parts and pieces -----------------------------------------------------------------------------


def test_parts_of_a_softmax_merge_to_the_whole():
    rng = np.random.default_rng(1)
    logits, values = rng.standard_normal((4, 5, 7)) * 30, rng.standard_normal((4, 5, 7, 3))
    logits[0, 2], logits[1] = -np.inf, -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.log(np.exp(logits).sum(axis=-1))
        parts = np.nan_to_num(np.einsum("nsc,nscd->nsd", np.exp(logits - lse[..., None]), values))
    out, whole = xla.merge(
        jnp.asarray(parts, jnp.float32), jnp.asarray(np.where(np.isinf(lse), formats.MASKED, lse), jnp.float32)
    )
    flat = logits.reshape(4, -1)[[0, 2, 3]]  # row 1 sees nothing, and one part of row 0
    weights = np.exp(flat - flat.max(axis=-1, keepdims=True))
    expected = np.einsum("nc,ncd->nd", weights, values.reshape(4, -1, 3)[[0, 2, 3]]) / weights.sum(-1, keepdims=True)
    rounding = 100 * EPS * np.abs(logits[np.isfinite(logits)]).max()  # exponents of parts are rounded
    np.testing.assert_allclose(np.asarray(out)[[0, 2, 3]], expected, atol=rounding)
    np.testing.assert_allclose(
        np.asarray(whole)[[0, 2, 3]], flat.max(axis=-1) + np.log(weights.sum(-1)), atol=rounding
    )
    np.testing.assert_array_equal(out[1], 0.0)
    assert whole[1] == jnp.float32(formats.MASKED)


def test_sines_up_to_the_largest_angle():
    most = int(sines.MOST_ANGLE)
    assert most > 2**20  # of the longest contexts
    rng = np.random.default_rng(2)
    angles = np.concatenate(
        [
            np.arange(most + 1),
            rng.uniform(0, most, 100_000),
            rng.uniform(0, 2, 10_000),
            np.arange(int(most / (np.pi / 2))) * (np.pi / 2),
        ]
    ).astype(np.float32)
    exact = angles.astype(np.float64)
    # Operation by operation no product is fused with a sum, as on a TPU.
    for function in (jax.jit(sines.sine_and_cosine), sines.sine_and_cosine):
        sin, cos = function(jnp.asarray(angles))
        # An ulp or two of a result up to 1.
        assert np.abs(np.asarray(sin) - np.sin(exact)).max() <= EPS
        assert np.abs(np.asarray(cos) - np.cos(exact)).max() <= EPS


def test_half_precision_from_its_bits():
    """Every finite float16, subnormal ones too."""
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits.view(np.float16)
    finite = np.isfinite(numbers)
    got = np.asarray(jax.jit(half_to_float)(jnp.asarray(bits)))
    np.testing.assert_array_equal(got[finite], numbers[finite].astype(np.float32))


# --- the cache's own attention --------------------------------------------------------------------

ROTARY = Rotary()
LAYERS: dict[str, tuple[Codec, Codec, Rope, formats.Format, formats.Format]] = {
    "integers": (IntGroup(4, 8), IntGroup(2, 16), "write", IntegerFormat(4, 8), IntegerFormat(2, 16)),
    "raw_integers": (IntGroup(8, 16), IntGroup(4, 8), "read", IntegerFormat(8, 16), IntegerFormat(4, 8)),
    "kivi": (KiviKeys(2, 8), IntGroup(2, 16), "write", KiviFormat(2, 8), IntegerFormat(2, 16)),
    "coupled": (CoupledCodec(4, 8), CoupledCodec(8, 8), "read", CoupledFormat(4), CoupledFormat(8)),
}


def leaves_of(state: CodecState, table: Any) -> formats.Leaves:
    slots = state.slots
    if "code" in slots:
        return Coupled(slots["code"], table["codebook"])
    return Quantised(slots["q"], slots["scale"], slots["minimum"])


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_attention_of_the_cache(name):
    """The arrays of `hashml.kvcache` as they are, through the codecs' own encoding."""
    key_codec, value_codec, rope, key_format, value_format = LAYERS[name]
    spec = LayerSpec(
        kv_heads=2, query_heads=4, head_dim=16, slots=24, window=8, flush=8, key_codec=key_codec,
        value_codec=value_codec, policy=KeepAll(), rotary=ROTARY, rope=rope, sliding_window=20,
    )  # fmt: skip
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def table(codec: Codec):
        if isinstance(codec, CoupledCodec):
            return {"codebook": normal(2, 16 // codec.channels, 256, codec.channels).astype(jnp.float16)}
        return None

    tables = LayerTables(table(key_codec), table(value_codec))
    q, query_pos = normal(2, 4, 1, 16), jnp.asarray([[27], [11]], jnp.int32)
    taken = np.stack([np.arange(24), np.where(np.arange(24) < 11, np.arange(24), -1)])[:, None]
    window_pos = np.array([[24, 25, 26, 27, -1, -1, -1, -1], [11, -1, -1, -1, -1, -1, -1, -1]])

    @jax.jit
    def both(keys, values, window_keys, window_values):
        valid = jnp.ones((2, 2, 24), bool)
        layer = init_layer(spec, 2)._replace(
            keys=CodecState(key_codec.quantise(tables.keys, {}, keys, valid), {}),
            values=CodecState(value_codec.quantise(tables.values, {}, values, valid), {}),
            pos=jnp.asarray(taken, jnp.int32),
            window_keys=window_keys,
            window_values=window_values,
            window_pos=jnp.asarray(window_pos, jnp.int32),
        )
        reads = rope == "read"
        found = cache_decode(
            ROTARY.rotate(q, query_pos[:, None])[:, :, 0] / 4.0,
            leaves_of(layer.keys, tables.keys),
            leaves_of(layer.values, tables.values),
            layer.pos,
            query_pos[:, 0],
            key_format=key_format,
            value_format=value_format,
            window_keys=ROTARY.rotate(window_keys, layer.window_pos[:, None]) if reads else window_keys,
            window_values=window_values,
            window_pos=layer.window_pos,
            rotation=(ROTARY.frequencies(16), "half") if reads else None,
            sliding_window=20,
        )
        return attending.attend(spec, tables, layer, q, query_pos), found

    stores = normal(2, 2, 24, 16), normal(2, 2, 24, 16), normal(2, 2, 8, 16), normal(2, 2, 8, 16)
    (expected, attention), (out, lse) = both(*stores)
    logits = np.where(attention.valid, np.asarray(attention.logits, np.float64), -np.inf)
    # Logits of at most 20 in size, and sums of 32 terms, in another order.
    np.testing.assert_allclose(out, expected[:, :, 0], atol=64 * 20 * EPS)
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(axis=-1)).reshape(2, 4), atol=64 * 20 * EPS)


def test_without_slots_the_window_is_all():
    case = Case(CoupledFormat(4), DenseFormat(), slots=0, width=16, recent=6)
    arrays, static = draw(case._replace(slots=1))
    arrays["pos"] = arrays["pos"][:, :, :0]
    arrays["keys"] = arrays["keys"]._replace(codes=arrays["keys"].codes[:, :, :0])
    arrays["values"] = Dense(arrays["values"].values[:, :, :0])
    expected, lse, out_bound, lse_bound = loop(arrays, static)
    out, got = cache_decode(**arrays, **static)
    assert np.all(np.abs(out - expected) <= out_bound)
    assert np.all(np.abs(got - lse) <= lse_bound)
    assert np.abs(expected[0]).max() > 0
