"""What FAIR is compared with: other ways to train one recommender on devices that cannot hold its tables.

    drop small         devices below a capacity take no part (`drop_small`)
    smallest for all   every device at the least capacity (`smallest_for_all`)
    per size           a server for each size; nothing flows between them (`per_size_round`)
    inconsistent       FAIR with a hash function of each device's own (`own_subspace_table`)
    width slicing      the first columns of the table; a column is averaged over those who hold it (`sliced_table`)
                       HeteroFL: Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264
    low rank           the best table of rank r down, factors trained, their product up (`low_rank_table`)
                       FedHM: Yao et al. 2021, arXiv 2111.14655
    whole              everybody holds the table, `whole_table`: FedAvg (McMahan et al. 2017), an upper bound

All are forms or groups of `hashml.distributed.federated_round`, so that rounds, local steps and bytes are
accounted alike. Only the tables are compressed: the towers are small, and HeteroFL's are not sliced here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hashml.distributed.fair import DeviceGroup, Forms, Salt, ServerState, TableForm, federated_round, subspace_table
from hashml.sharing.budgets import check_positive
from hashml.sharing.maps import SharingMap

Capacities = Sequence[float | int] | Float[np.ndarray, " N"]
"""Of each device, the share of a table that it can hold, in (0, 1]."""


def drop_small(capacities: Capacities, *, least: float | int = 1) -> Bool[np.ndarray, " N"]:
    """Which devices take part where those below ``least`` are left out.

    Raises:
        ValueError: for a capacity outside (0, 1], or where no device is left.
    """
    known = _checked(capacities)
    kept = known >= least
    if not kept.any():
        raise ValueError(f"least is {least}; no device has that capacity, the largest being {known.max()}")
    return kept


def smallest_for_all(capacities: Capacities) -> Float[np.ndarray, " N"]:
    """The capacities where every device does as the smallest.

    Raises:
        ValueError: for a capacity outside (0, 1].
    """
    known = _checked(capacities)
    return np.full_like(known, known.min())


def own_subspace_table(make_map: Callable[[Salt], SharingMap]) -> TableForm:
    """FAIR without consistency: each device folds the table by a map of its own salt."""
    return subspace_table(make_map)._replace(common=False)


def width_within(columns: int, capacity: float | int) -> int:
    """Columns of a sliced table that a device can hold; 0 where not one fits.

    Raises:
        TypeError, ValueError: for no columns, or a capacity outside (0, 1].
    """
    check_positive(columns=columns)
    return int(columns * float(_checked([capacity])[0]))


def sliced_table(columns: int, width: int) -> TableForm:
    """HeteroFL: the first ``width`` of the ``columns``; a device reads zeros in the others.

    Raises:
        TypeError, ValueError: for sizes that are no positive ints, or a width beyond the columns.
    """
    check_positive(columns=columns, width=width)
    if width > columns:
        raise ValueError(f"width is {width}; it must not exceed columns = {columns}")

    def widened(rows: Array) -> Array:
        return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, columns - width)])

    return TableForm(
        download=lambda table, salt: table[:, :width],
        read=lambda memory, ids, salt: widened(memory.at[ids].get(mode="promise_in_bounds")),
        upload=lambda memory, salt: widened(memory),
        covers=(np.arange(columns) < width).astype(np.float32),
    )


def low_rank_within(rows: int, columns: int, capacity: float | int) -> int:
    """The greatest rank whose two factors fit a capacity; 0 where not even rank one does.

    Raises:
        TypeError, ValueError: for sizes that are no positive ints, or a capacity outside (0, 1].
    """
    check_positive(rows=rows, columns=columns)
    return int(rows * columns * float(_checked([capacity])[0]) / (rows + columns))


def low_rank_table(rank: int) -> TableForm:
    """FedHM: factors ``[n, r]`` and ``[r, d]`` of the table's truncated singular value decomposition.

    Each factor takes the square root of the singular values, so that Adam's steps suit both alike. Products
    are not linear in the factors: every device's is multiplied out before the mean.

    Raises:
        TypeError, ValueError: for a rank that is no positive int.
    """
    check_positive(rank=rank)

    def decompose(table: Array, salt: Salt) -> tuple[Array, Array]:
        if rank > min(table.shape):
            raise ValueError(f"rank is {rank}; a table of shape {table.shape} has rank {min(table.shape)} at most")
        left, values, right = jnp.linalg.svd(table, full_matrices=False)
        root = jnp.sqrt(values[:rank])
        return left[:, :rank] * root, root[:, None] * right[:rank]

    return TableForm(
        download=decompose,
        read=lambda factors, ids, salt: factors[0].at[ids].get(mode="promise_in_bounds") @ factors[1],
        upload=lambda factors, salt: factors[0] @ factors[1],
        linear=False,
    )


def per_size_round(
    states: Sequence[ServerState], groups: Sequence[DeviceGroup], classes: Sequence[Forms], **options: Any
) -> list[ServerState]:
    """A round for each size by itself: a server a class, which hears its own devices alone.

    Args:
        states, groups, classes: one a size.
        **options: of `hashml.distributed.federated_round`.

    Raises:
        ValueError: where their numbers differ, and as there.
    """
    if not len(states) == len(groups) == len(classes):
        raise ValueError(
            f"got {len(states)} states, {len(groups)} groups and {len(classes)} classes; each size has one of each"
        )
    alone = zip(states, groups, classes, strict=True)
    return [federated_round(state, [group], [forms], **options) for state, group, forms in alone]


def _checked(capacities: Capacities) -> Float[np.ndarray, " N"]:
    known = np.asarray(capacities, np.float64)
    wrong = known[~((known > 0) & (known <= 1))]
    if wrong.size or not known.size:
        raise ValueError(f"capacities hold {wrong[:3].tolist()}; they must be in (0, 1], of one device at least")
    return known
