"""Huffman chunks by native code: ``huffman_native.cc``, compiled on first use, called through `ctypes`.

    numbers = sign | symbol | low bits           in one pass over the stream and the rests, on the calling thread

NumPy decodes all lanes in lockstep, an array for each look-up, and joins numbers in further passes; compiled, eight
lanes take turns, two symbols a look-up, which is several times as fast. `hashml_kernels.native` says who compiles and
where the library lies. Nothing here is needed to install or import hashml: without a compiler `available` is false, a
warning is logged once, and `hashml.coding.huffman_chunks` takes its path in NumPy. The interpreter's lock is not held
meanwhile, so that threads can decode several arrays at once.
"""

import ctypes
import functools
import logging
from pathlib import Path

import numpy as np

from hashml_kernels.native import NativeUnavailable, build, cache_folder, compilers

SOURCE = Path(__file__).with_suffix(".cc")
JOINS = {(16, 7, False): 1, (8, 3, False): 2, (8, 3, True): 3, (8, 1, False): 4}
"""What can be joined while it is decoded: bits of a number, bits of its rest below the symbol, symbols in pairs."""
_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether there is a library, which is compiled now where there is none yet. Why not is logged once."""
    return _loaded()[0] is not None


def decode_lanes(
    words: np.ndarray,
    bases: np.ndarray,
    starts: np.ndarray,
    table: np.ndarray,
    *,
    group: int,
    steps: int,
    max_length: int,
    count: int,
    rest: np.ndarray | None = None,
    join: tuple[int, int, bool] | None = None,
) -> np.ndarray:
    """The symbols as uint8, or with a rest the numbers as unsigned integers.

    A damaged stream gives wrong numbers, never a read out of bounds; sizes are the caller's to check.

    Args:
        words, bases, starts: of `hashml.coding.huffman_chunks.Chunks`.
        table: of `hashml.coding.huffman.decode_table`, for ``max_length``, which is at most 14.
        group: lanes that share a base.
        steps: of a lane.
        max_length: bits of a look-up.
        count: of the numbers.
        rest: their signs and low bits, as `hashml.weights.float_split` lays them.
        join: one of `JOINS`, where there is a rest.

    Raises:
        NativeUnavailable: without a library.
        MemoryError: as it says.
    """
    library, reason = _loaded()
    if library is None:
        raise NativeUnavailable(f"there is no native library: {reason}")
    out = np.empty(count, np.uint16 if join is not None and join[0] == 16 else np.uint8)
    words, bases, starts, table = (
        np.require(array, dtype, ["C", "A"])
        for array, dtype in ((words, np.uint32), (bases, np.uint32), (starts, np.uint16), (table, np.uint16))
    )
    rest = np.empty(0, np.uint8) if rest is None else np.ascontiguousarray(rest)
    kind = 0 if join is None else JOINS[join]
    sizes = (len(starts), group, steps)
    failed = library.hashml_huffman_decode(words.ctypes.data, len(words), bases.ctypes.data, starts.ctypes.data,
                                           *sizes, table.ctypes.data, max_length, kind, rest.ctypes.data, count,
                                           out.ctypes.data)  # fmt: skip
    if failed:
        raise MemoryError(f"there is no memory to decode {count} numbers")
    return out


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    try:
        library = ctypes.CDLL(str(build(SOURCE, cache_folder(), compilers())))
    except (NativeUnavailable, OSError) as error:
        _log.warning("Huffman codes are decoded on the host by NumPy, which is slower than native code: %s", error)
        return None, str(error)
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.hashml_huffman_decode.argtypes = [pointer, whole, pointer, pointer, whole, whole, whole, pointer, number,
                                              number, pointer, whole, pointer]  # fmt: skip
    library.hashml_huffman_decode.restype = number
    return library, ""
