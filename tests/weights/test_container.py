"""Files: byte for byte back, no damage passes, nothing half written, one tensor in memory at a time, refusals."""

import contextlib
import hashlib
import json
import os
import resource
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from hashml.exchange import ExchangeError, save_module
from hashml.weights import container
from hashml.weights.container import file_info, load_compressed, pack, unpack
from hashml.weights.dfloat11 import DFLOAT11
from hashml.weights.ecf8 import ECF8
from hashml.weights.lossless import CompressedArray, decode_host, entropy_limit

CODECS = {dtype: codec for codec in (DFLOAT11, ECF8) for dtype in codec.dtypes}
NAMES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint8": "U8",
    "int64": "I64",
    "bool": "BOOL",
}


def gaussian(shape, dtype, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(dtype)


TENSORS = {
    "a.scalar": gaussian((), ml_dtypes.bfloat16)[...],
    "b.empty": np.zeros((0, 3), ml_dtypes.bfloat16),
    "c.weight": gaussian((30, 41), ml_dtypes.bfloat16),
    "d.odd": gaussian(7, ml_dtypes.float8_e4m3fn),
    "e.float8": gaussian((17, 61), ml_dtypes.float8_e4m3fn),
    "f.float8": gaussian((64, 25), ml_dtypes.float8_e5m2),
    "g.half": gaussian((21, 77), np.float16),
    "h.norm": gaussian(5, np.float32),
    "i.ids": np.arange(3),
    "züge": np.array([True, False, True]),
}


def write(path, tensors, metadata=None, pad=3):
    """A safetensors file by hand: any dtype, order of the mapping, padded header."""
    header, place = {"__metadata__": metadata} if metadata else {}, 0
    for name, array in tensors.items():
        offsets = [place, place + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        place += array.nbytes
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in tensors.values()))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A source and its packed file, not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    source = write(folder / "source.safetensors", TENSORS, {"format": "pt", "note": 'a "quote"'})
    pack(source, folder / "packed", CODECS)
    return source, folder / "packed"


# --- round trip -----------------------------------------------------------------------------------


def test_the_file_comes_back_byte_for_byte(packed, tmp_path):
    source, file = packed
    seen = []
    unpack(file, tmp_path / "back", progress=lambda *step: seen.append(step))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert seen == [(name, i + 1, len(TENSORS)) for i, name in enumerate(TENSORS)]
    assert sorted(os.listdir(tmp_path)) == ["back"]


def test_arrays_are_loaded_with_their_bits(packed):
    found = load_compressed(packed[1])
    assert [*found] == [*TENSORS]
    for name, array in TENSORS.items():
        loaded = found[name]
        back = decode_host(loaded) if isinstance(loaded, CompressedArray) else loaded
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert isinstance(found["c.weight"], CompressedArray)
    assert isinstance(found["e.float8"], CompressedArray)
    assert isinstance(found["h.norm"], np.ndarray)


@pytest.mark.parametrize("tensors", [{}, {"w": np.zeros(0, np.float32)}], ids=["none", "empty"])
def test_files_with_nothing_in_them(tmp_path, tensors):
    source = write(tmp_path / "source", tensors)
    pack(source, tmp_path / "packed", CODECS)
    unpack(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_infos_numbers_are_those_of_arrays_and_files(packed):
    source, file = packed
    info = file_info(file, verify=True)
    assert info.original_bytes == source.stat().st_size
    assert info.file_bytes == file.stat().st_size
    assert [tensor.name for tensor in info.tensors] == [*TENSORS]
    for tensor in info.tensors:
        array = TENSORS[tensor.name]
        assert (tensor.dtype, tensor.shape, tensor.original_bytes) == (
            NAMES[array.dtype.name],
            array.shape,
            array.nbytes,
        )
        if tensor.coder == "copy":
            assert tensor.stored_bytes == tensor.limit_bytes == array.nbytes
        else:
            assert tensor.limit_bytes == pytest.approx(entropy_limit(array) * array.size / 8, rel=1e-4)
            assert tensor.limit_bytes < tensor.stored_bytes < array.nbytes
            assert tensor.stored_bytes % 8 == 0


def test_other_tools_read_the_file_and_tensors_are_aligned(packed):
    with safe_open(packed[1], framework="numpy") as file:
        assert set(file.keys()) == set(TENSORS)
        assert [*file.metadata()] == ["hashml"]
        np.testing.assert_array_equal(file.get_tensor("h.norm"), TENSORS["h.norm"])
        assert file.get_slice("c.weight").get_dtype() == "U8"
    content = packed[1].read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    for entry in (header := json.loads(content[8 : 8 + length])):
        if entry != "__metadata__":
            width = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(header[entry]["dtype"], 1)
            assert header[entry]["data_offsets"][0] % width == 0


def test_equal_files_make_equal_files(packed, tmp_path):
    pack(packed[0], tmp_path / "again", CODECS)
    assert (tmp_path / "again").read_bytes() == packed[1].read_bytes()


def test_modules_and_packed_files_can_be_packed(packed, tmp_path):
    save_module(tmp_path / "module", {"w": gaussian((20, 30), ml_dtypes.bfloat16)}, geometry={"seed": 3})
    for source in (tmp_path / "module", packed[1]):
        pack(source, tmp_path / "out", CODECS)
        unpack(tmp_path / "out", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """The peak of eight tensors is that of one, not of eight."""
    peaks = []
    for count in (1, 8):
        tensors = {f"layers.{i}": gaussian(2**18, ml_dtypes.bfloat16, i) for i in range(count)}
        tensors |= {f"copied.{i}": gaussian(2**17, np.float32, i) for i in range(count)}
        source = write(tmp_path / "source", tensors)
        del tensors
        tracemalloc.start()
        pack(source, tmp_path / "packed", CODECS)
        unpack(tmp_path / "packed", tmp_path / "back")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(packed):
    return packed[1].read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=2500)
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_no_changed_byte_passes(content, tmp_path, place, change):
    """2,500 changes of one byte: each is an error, none a tensor."""
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= change
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ExchangeError):
        load_compressed(tmp_path / "damaged")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data())
def test_damage_leaves_no_output(content, packed, tmp_path, data):
    """Bytes replaced, inserted, cut out or appended anywhere: an error and no file, or the same file."""
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(start + 12, len(content))))
    damaged = content[:start] + data.draw(st.binary(max_size=12)) + content[stop:]
    (tmp_path / "damaged").write_bytes(damaged)
    (tmp_path / "back").unlink(missing_ok=True)
    try:
        unpack(tmp_path / "damaged", tmp_path / "back")
    except ExchangeError:
        assert damaged != content
        assert sorted(os.listdir(tmp_path)) == ["damaged"]
    else:
        assert damaged == content
        assert (tmp_path / "back").read_bytes() == packed[0].read_bytes()


def test_no_truncated_file_passes(content, tmp_path):
    for length in [*range(0, 200), *range(200, len(content), 37)]:
        (tmp_path / "cut").write_bytes(content[:length])
        for read in (load_compressed, file_info):
            with pytest.raises(ExchangeError, match="cut is damaged or no safetensors file"):
                read(tmp_path / "cut")


def test_verifying_finds_what_the_header_alone_does_not(content, tmp_path):
    (tmp_path / "damaged").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    file_info(tmp_path / "damaged")
    with pytest.raises(ExchangeError, match="disagrees with its checksum; the file was altered"):
        file_info(tmp_path / "damaged", verify=True)


def test_a_decoder_that_errs_is_found_before_the_file_has_its_name(packed, tmp_path, monkeypatch):
    def wrong(compressed):
        found = decode_host(compressed).copy()
        found.reshape(-1).view(np.uint8)[-1] ^= 0x80
        return found

    monkeypatch.setattr(container, "decode_host", wrong)
    with pytest.raises(ExchangeError, match="does not decode to the original; nothing was written"):
        pack(packed[0], tmp_path / "out", CODECS)
    with pytest.raises(ExchangeError, match="what it decodes to is not what was packed"):
        unpack(packed[1], tmp_path / "out")
    assert not os.listdir(tmp_path)


# --- what fails leaves things as they were ---------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(room):
    """The system refuses to write beyond so many bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_full_disk_or_an_interrupt_leaves_the_old_file_and_no_other(packed, tmp_path, monkeypatch, verb, error):
    source = packed[0] if verb == "pack" else packed[1]
    call = (
        (lambda: pack(source, tmp_path / "out", CODECS))
        if verb == "pack"
        else (lambda: unpack(source, tmp_path / "out"))
    )
    before, stamp = source.read_bytes(), source.stat().st_mtime_ns
    (tmp_path / "out").write_bytes(b"old")
    if error is OSError:
        for room in (0, 100, 2000, 5000):
            with files_of_at_most(room), pytest.raises(OSError, match="File too large"):
                call()
    else:
        monkeypatch.setattr(container, "_check" if verb == "unpack" else "_compare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert (tmp_path / "out").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]
    assert (source.read_bytes(), source.stat().st_mtime_ns) == (before, stamp)


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_source_is_never_the_target(packed, tmp_path):
    source, file = packed
    os.symlink(source, tmp_path / "link")
    for call in (lambda: pack(source, tmp_path / "link", CODECS), lambda: unpack(file, file)):
        with pytest.raises(ValueError, match="the source itself; allowed is another file"):
            call()


# --- refusals -------------------------------------------------------------------------------------


def test_foreign_files_are_named(packed, tmp_path):
    (tmp_path / "text").write_text("no tensors here, only text that is long enough")
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "plain")
    save_module(tmp_path / "module", {"w": np.ones(3, np.float32)}, geometry={})
    for read in (load_compressed, file_info, lambda path: unpack(path, tmp_path / "out")):
        with pytest.raises(ExchangeError, match="text is damaged or no safetensors file"):
            read(tmp_path / "text")
        with pytest.raises(
            ExchangeError, match="plain has no 'hashml' entry in its header: it was not written by pack"
        ):
            read(tmp_path / "plain")
        with pytest.raises(ExchangeError, match="module is a module of save_module"):
            read(tmp_path / "module")
        with pytest.raises(ExchangeError, match="is a directory"):
            read(tmp_path)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")
    with pytest.raises(ExchangeError, match="text is damaged or no safetensors file"):
        pack(tmp_path / "text", tmp_path / "out", CODECS)
    assert not (tmp_path / "out").exists()


def test_an_unknown_dtype_is_refused_and_a_codec_for_another_one(packed, tmp_path):
    text = b'{"w":{"dtype":"F7","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "odd").write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0")
    with pytest.raises(ExchangeError, match=r"odd is damaged or no safetensors file: .*F7"):
        pack(tmp_path / "odd", tmp_path / "out", CODECS)
    with pytest.raises(ValueError, match=r"codecs\['float32'\] is 'ecf8', which is for float8_e4m3fn, float8_e5m2"):
        pack(packed[0], tmp_path / "out", {"float32": ECF8})
    with pytest.raises(IsADirectoryError, match="is a directory; allowed is a file to write"):
        pack(packed[0], tmp_path, CODECS)
    with pytest.raises(FileNotFoundError):
        pack(packed[0], tmp_path / "no" / "folder", CODECS)
    assert os.listdir(tmp_path) == ["odd"]


def test_a_newer_version_is_refused(content, tmp_path):
    """A forger's file, whose checksum is right."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    said = json.loads(header["__metadata__"]["hashml"])
    said |= {"version": 2, "checksum": "0" * 64}
    header["__metadata__"]["hashml"] = json.dumps(said)
    text = json.dumps(header).encode()
    text = text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)
    (tmp_path / "newer").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(ExchangeError, match="format version 2; this library reads 1"):
        load_compressed(tmp_path / "newer")


def test_a_dtype_that_numpy_lacks_is_copied_and_not_loaded(tmp_path):
    text = b'{"w":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "scales").write_bytes(struct.pack("<Q", len(text)) + text + b"\1\2\3\4")
    pack(tmp_path / "scales", tmp_path / "packed", CODECS)
    unpack(tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "scales").read_bytes()
    with pytest.raises(ExchangeError, match="tensor 'w' is of dtype F8_E8M0, which NumPy lacks"):
        load_compressed(tmp_path / "packed")
