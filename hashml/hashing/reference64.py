"""The hash of the reference implementations in NumPy int64, to reproduce their layouts (host only).

    h(a, b) = (r[3] a + r[2] b + r[1]) mod 2038074743,   r = [P, 50 draws of RandomState(1024)]

Facts of the ROBE and ROAST repositories (apd10/universal_memory_allocation). It is the plain linear
hash: the blocks of every row lie at one fixed pattern of distances from its first block.
"""

import numpy as np
from jaxtyping import Int64, Integer

REFERENCE_PRIME = 2038074743
_SEED, _DRAWS = 1024, 50


def reference64(a: Integer[np.ndarray, "..."], b: Integer[np.ndarray, "..."] | int) -> Int64[np.ndarray, "..."]:
    """Hash of the pairs (a, b), which broadcast; int64 in [0, 2038074743).

    Raises:
        ValueError: for keys that are negative or not below 2**31, where the products might overflow.
    """
    for name, key in (("a", a), ("b", b)):
        key = np.asarray(key)
        if key.size and (int(key.min()) < 0 or int(key.max()) >= 2**31):
            raise ValueError(f"{name} spans {int(key.min())}..{int(key.max())}; it must lie in [0, 2**31)")
    r = np.random.RandomState(_SEED).randint(0, REFERENCE_PRIME, _DRAWS).astype(np.int64)
    # r is [P, draws...] in the reference: its r[1], r[2], r[3] are the first three draws.
    return (np.asarray(a, np.int64) * r[2] + np.asarray(b, np.int64) * r[1] + r[0]) % REFERENCE_PRIME


def reference64_slots(
    rows: Integer[np.ndarray, " n"], *, features: int, block_size: int, budget: int
) -> Int64[np.ndarray, "n {features}"]:
    """Slots of the coordinates of ``rows`` in the reference kernels of ROBE, which do not wrap.

    ``slot(x, t) = h(x, t // Z) mod (budget - Z + 1) + t mod Z``; ``rows`` are ids plus the offset of
    their table.

    Raises:
        ValueError: for a budget smaller than a block, or rows out of range.
    """
    if budget < block_size:
        raise ValueError(f"budget is {budget}; it must be at least block_size = {block_size}")
    coordinate = np.arange(features)
    base = reference64(np.asarray(rows)[:, None], coordinate // block_size) % (budget - block_size + 1)
    return base + coordinate % block_size
