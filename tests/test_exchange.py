import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from hashml.exchange import ExchangeError, load_module, read_header, save_module

GEOMETRY = {"map": "block", "budget": 12, "sizes": [3, 5], "seed": 7, "signs": True, "scale": 0.1}
PARAMS = {
    "embedding": {"memory": jnp.arange(12, dtype=jnp.float32) / 7},
    "top": {"kernel": jnp.ones((2, 3), jnp.bfloat16) / 3, "step": jnp.int32(4)},
}


def assert_same_tree(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "module.safetensors"


# --- round trip -----------------------------------------------------------------------------------


def test_round_trip_is_bit_identical(path):
    save_module(path, PARAMS, geometry=GEOMETRY, metadata={"note": "züge"})
    params, geometry = load_module(path, geometry=GEOMETRY)
    assert_same_tree(params, PARAMS)
    assert geometry == GEOMETRY
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert read_header(path).metadata == {"note": "züge"}
    assert read_header(path).geometry == GEOMETRY


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64"]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3, 2)])
def test_every_dtype_and_shape(path, dtype, shape):
    leaf = jax.random.bits(jax.random.key(0), shape, "uint8").astype(dtype)
    save_module(path, {"x": leaf}, geometry={})
    assert_same_tree(load_module(path)[0], {"x": leaf})


def test_values_without_order_survive(path):
    """NaN payloads, signed zeros and infinities are bits like others."""
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 0x00000001], np.uint32)
    save_module(path, {"x": bits.view(np.float32)}, geometry={})
    assert np.asarray(load_module(path)[0]["x"]).view(np.uint32).tolist() == bits.tolist()


@pytest.mark.parametrize(
    "leaf",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(12, dtype=np.int32)[::2],
        np.arange(3, dtype=">i4"),
        np.float32(2.5),
    ],
    ids=["transposed", "strided", "big-endian", "scalar"],
)
def test_any_layout_in_memory(path, leaf):
    save_module(path, {"x": leaf}, geometry={})
    np.testing.assert_array_equal(load_module(path)[0]["x"], leaf)


names = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=5)
trees = st.recursive(
    st.integers(0, 3).map(lambda n: np.arange(n, dtype=np.float32)),
    lambda children: st.dictionaries(names, children, min_size=1, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(names.filter(lambda name: name != "__metadata__"), trees, max_size=3))
def test_any_tree_of_dicts(path, tree):
    save_module(path, tree, geometry={})
    assert_same_tree(load_module(path)[0], jax.tree.map(jnp.asarray, tree))


def test_equal_modules_make_equal_files(path):
    turned = {key: PARAMS[key] for key in reversed(PARAMS)}
    save_module(path, PARAMS, geometry=GEOMETRY, metadata={"b": "1", "a": "2"})
    first = path.read_bytes()
    save_module(path, turned, geometry=dict(reversed(GEOMETRY.items())), metadata={"a": "2", "b": "1"})
    assert path.read_bytes() == first


def test_other_tools_read_the_file(path):
    save_module(path, PARAMS, geometry=GEOMETRY)
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"embedding/memory", "top/kernel", "top/step"}
        assert json.loads(file.metadata()["hashml"])["geometry"]["seed"] == 7
        np.testing.assert_array_equal(file.get_tensor("embedding/memory"), PARAMS["embedding"]["memory"])


# --- refusals of a file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, r"seed: file 7, given 8"),
        ({"budget": 13}, r"budget: file 12, given 13"),
        ({"sizes": [3, 6]}, r"sizes: file \[3,5\], given \[3,6\]"),
        ({"block": 4}, r"block: file nothing, given 4"),
        ({"signs": 1}, r"signs: file true, given 1"),
        ({"seed": 8, "map": "tile"}, r'map: file "block", given "tile"; seed: file 7, given 8'),
    ],
)
def test_another_geometry_is_refused(path, change, message):
    save_module(path, PARAMS, geometry=GEOMETRY)
    with pytest.raises(ExchangeError, match=message):
        load_module(path, geometry=GEOMETRY | change)


def test_a_geometry_entry_left_out_is_refused(path):
    save_module(path, PARAMS, geometry=GEOMETRY)
    with pytest.raises(ExchangeError, match="seed: file 7, given nothing"):
        load_module(path, geometry={key: value for key, value in GEOMETRY.items() if key != "seed"})


def test_tuples_and_lists_are_one_geometry(path):
    save_module(path, PARAMS, geometry={"sizes": (3, 5)})
    assert load_module(path, geometry={"sizes": (3, 5)})[1] == {"sizes": [3, 5]}


def load_as(path, content):
    path.write_bytes(content)
    return load_module(path)


def test_no_flipped_bit_passes(path):
    save_module(path, {"w": PARAMS["top"]["kernel"]}, geometry={"seed": 7, "scale": 0.5}, metadata={"m": "x"})
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            with pytest.raises(ExchangeError):
                load_as(path, damaged)


def test_no_truncated_file_passes(path):
    save_module(path, {"w": jnp.arange(4.0)}, geometry={"seed": 7})
    content = path.read_bytes()
    for length in range(len(content)):
        with pytest.raises(ExchangeError):
            load_as(path, content[:length])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_no_damage_passes(path, data):
    """Bytes replaced, inserted, cut out or appended anywhere."""
    save_module(path, PARAMS, geometry=GEOMETRY)
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(start + 12, len(content))))
    damaged = content[:start] + data.draw(st.binary(max_size=12)) + content[stop:]
    try:
        params, geometry = load_as(path, damaged)
    except ExchangeError:
        return
    assert_same_tree(params, PARAMS)
    assert geometry == GEOMETRY


def forge(path, tensors, **changes):
    """A well-formed file with a header of the caller's making."""
    header = {"version": 1, "geometry": {}, "metadata": {}, "checksum": ""} | changes
    save_file(tensors, path, metadata={"hashml": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "checksum disagrees, the header says ''"),
        ({"version": 2}, "format version 2; this library reads 1"),
        ({"geometry": [1]}, "damaged header"),
        ({"metadata": {"a": 1}}, "damaged header"),
        ({"metadata": None}, "damaged header"),
        ({"extra": 1}, "damaged header"),
        ({"geometry": {"scale": float("inf")}}, "damaged header"),
    ],
)
def test_a_foreign_header_is_refused(path, changes, message):
    forge(path, {"w": np.ones(3, np.float32)}, **changes)
    with pytest.raises(ExchangeError, match=message):
        load_module(path)


@pytest.mark.parametrize("tensors", [("a", "a/b"), ("a/b", "a/b/c")])
def test_a_tensor_below_a_tensor_is_refused(path, tensors):
    """Only a forger can write it, with a right checksum; it must not become another tree."""
    content = {name: np.ones(2, np.float32) for name in tensors}
    forge(path, content)
    with pytest.raises(ExchangeError) as error:
        load_module(path)
    (checksum,) = [word.strip("';") for word in str(error.value).split() if len(word.strip("';")) == 64]
    forge(path, content, checksum=checksum)
    with pytest.raises(ExchangeError, match=r"lies (below|above) another tensor"):
        load_module(path)


def test_a_plain_safetensors_file_is_refused(path):
    save_file({"w": np.ones(3)}, path)
    for read in (load_module, read_header):
        with pytest.raises(ExchangeError, match="not written by save_module"):
            read(path)


def test_a_dtype_that_numpy_lacks_is_refused(path):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]},"__metadata__":%s}'
    fields = json.dumps({"version": 1, "geometry": {}, "metadata": {}, "checksum": ""})
    text = header % json.dumps({"hashml": fields}).encode()
    with pytest.raises(ExchangeError):
        load_as(path, struct.pack("<Q", len(text)) + text + b"\0\0")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ExchangeError, match="is a directory"):
        load_module(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_module(tmp_path / "nowhere")


def test_a_double_is_not_rounded_silently(path):
    save_module(path, {"w": np.array([0.1, 0.2])}, geometry={})
    with pytest.raises(ExchangeError, match="tensor 'w' is float64"):
        load_module(path)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(load_module(path)[0]["w"], [0.1, 0.2])


# --- refusals of a module, and what they leave ------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a/b": jnp.ones(1)}, ValueError, r"params\['a/b'\] has a '/'"),
        ({"a": {"b": {}}}, ValueError, r"params\['a'\]\['b'\] is an empty mapping"),
        ({"__metadata__": jnp.ones(1)}, ValueError, "keeps this name"),
        ({"a": jnp.ones(2, jnp.int4)}, ValueError, r"params\['a'\] is of dtype int4; allowed are bool"),
        ({"a": jax.random.key(0)}, ValueError, r"params\['a'\] is of dtype key"),
        ({"a": np.array([None])}, ValueError, r"params\['a'\] is of dtype object"),
        ({"a": {1: jnp.ones(1)}}, TypeError, r"params\['a'\]\[1\] has a key of type int"),
        ({"a": [jnp.ones(1)]}, TypeError, r"params\['a'\] is of type list"),
        ({"a": {"b": 3.0}}, TypeError, r"params\['a'\]\['b'\] is of type float"),
    ],
)
def test_params_that_the_file_cannot_hold(path, params, error, message):
    with pytest.raises(error, match=message):
        save_module(path, params, geometry={})
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("geometry", "error", "message"),
    [
        ({"seed": np.int64(3)}, TypeError, r"geometry\['seed'\] is np.int64\(3\) of type int64"),
        ({"sizes": [1, {2}]}, TypeError, r"geometry\['sizes'\]\[1\] is \{2\} of type set"),
        ({"sub": {1: 2}}, TypeError, r"geometry\['sub'\]\[1\] has a key of type int"),
        ({"scale": float("nan")}, ValueError, r"geometry\['scale'\] is nan; allowed are finite floats"),
    ],
)
def test_geometry_that_json_cannot_say(path, geometry, error, message):
    with pytest.raises(error, match=message):
        save_module(path, PARAMS, geometry=geometry)
    save_module(path, PARAMS, geometry={})
    with pytest.raises(error, match=message):
        load_module(path, geometry=geometry)


def test_a_failed_save_leaves_the_old_file_and_no_other(path, monkeypatch):
    save_module(path, PARAMS, geometry=GEOMETRY)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_module(path, {"w": jnp.zeros(3)}, geometry={})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_whole(path):
    save_module(path, PARAMS, geometry=GEOMETRY)
    save_module(path, {"w": jnp.zeros(3)}, geometry={"seed": 1})
    assert_same_tree(load_module(path, geometry={"seed": 1})[0], {"w": jnp.zeros(3)})
    assert list(path.parent.iterdir()) == [path]
