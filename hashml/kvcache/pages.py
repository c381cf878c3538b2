"""Slots in pages of a shared pool (Kwon et al. 2023, arXiv 2309.06180), so that what is dropped is freed.

Slots of a row and head are logical: ``table[b, h, slot // size]`` names the page of the pool where they lie, -1 for
none. Pages are given out when a slot of theirs is first written, and go back on a stack when all their slots are
empty. All shapes are static.

Rows and heads share the pool. When it has too few pages for all that a step wants, the first rows are served; in the
others a token fights for a slot of the pages that they hold, as if these were all the slots there are, and `missed`
counts it. So what a row keeps may then depend on its neighbours; with ``pages`` for all slots it never does.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

if TYPE_CHECKING:
    from hashml.kvcache.spec import LayerSpec


class Pages(NamedTuple):
    """Which page is whose.

    Attributes:
        table: page of each logical page, -1 for none.
        free: a stack of the pages that nobody has; the first ``top`` entries count.
        top: free pages.
        missed: tokens that found no page free, and for each of which one was dropped.
    """

    table: Int32[Array, "B H L"]
    free: Int32[Array, " pool"]
    top: Int32[Array, ""]
    missed: Int32[Array, ""]


def empty_pages(spec: "LayerSpec", batch: int) -> Pages:
    """All pages free."""
    assert spec.pages is not None
    assert spec.page_size is not None
    table = jnp.full((batch, spec.kv_heads, spec.slots // spec.page_size), -1, jnp.int32)
    free = jnp.arange(spec.pages, dtype=jnp.int32)
    return Pages(table, free, jnp.asarray(spec.pages, jnp.int32), jnp.zeros((), jnp.int32))


def allocate(pages: Pages, wanted: Bool[Array, "B H L"]) -> Pages:
    """Gives a page to each logical page that is ``wanted`` and has none, as far as they go; rows first."""
    need = (wanted & (pages.table < 0)).reshape(-1)
    rank = jnp.cumsum(need) - 1
    served = need & (rank < pages.top)
    page = pages.free[jnp.clip(pages.top - 1 - rank, 0, pages.free.shape[0] - 1)]
    table = jnp.where(served, page, pages.table.reshape(-1)).reshape(pages.table.shape)
    return pages._replace(table=table, top=pages.top - served.sum(dtype=jnp.int32))


def release(pages: Pages, used: Bool[Array, "B H L"]) -> Pages:
    """Takes back every page that is not ``used``."""
    table = pages.table.reshape(-1)
    gone = (table >= 0) & ~used.reshape(-1)
    place = jnp.where(gone, pages.top + jnp.cumsum(gone) - 1, pages.free.shape[0])
    return pages._replace(
        table=jnp.where(gone, -1, table).reshape(pages.table.shape),
        free=pages.free.at[place].set(table, mode="drop"),
        top=pages.top + gone.sum(dtype=jnp.int32),
    )
