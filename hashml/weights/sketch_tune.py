"""SketchTune: a model in few bits is tuned by its tables alone (SpaLLM, arXiv 2410.06364: Zhang, Su, Desai, Wu, Xu,
Shrivastava, "Sketch to Adapt", ICML 2025).

    W[r, j] = tables[r, j // (in / G), codes[r, j]]          codes stay; G 2^bits floats a row are trained
    dT[r, g, c] = sum of dW[r, j] over the columns j of group g with code c,        dW = dy^T x

There is no second tower of adapters and no low rank: each layer stays one product with one matrix, and a table moves
all weights of its code together. `sketch_spec` says how a matrix is sketched: by weighted k-means of each row and
group, and error feedback from column to column, as the authors' LeanQuant does it.

    model = quantize_decoder(params, config, tokens, sketch_spec(bits=4, groups=4))
    tables = tables_of(model.params)                                                    # float32, all that is trained
    jax.grad(lambda tables: loss(with_tables(model.params, tables)))(tables)

Kernels of `hashml.weights.quantized_dense` keep x, codes and tables for the backward pass and make a few rows of W
and of dW at a time, so that neither is ever there for a whole model. Users of one model share its codes and bring
tables of their own; a `hashml.weights.quantized_dense.QuantizedDense` over ``kmeans`` is one such layer.

Departures: 3-bit codes take 3 bits and 2-bit codes 2, where the reference stores either in a nibble; how groups meet
the error feedback is not published, and a group's table is here the k-means of its own columns before any feedback.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from hashml.weights.calibration import AnyArray
from hashml.weights.grids import Grid, GridSpec
from hashml.weights.quantized import QuantizationSpec, QuantizedMatrix

Params = Any
"""Pytree with a `QuantizedMatrix` in the place of some kernels."""
Tables = dict[str, Float[Array, "*layers out groups levels"]]
"""By the path of their kernel, such as ``layers/query``."""


def sketch_spec(
    bits: int = 4, groups: int = 1, *, exponent: float | int = 3, dtype: str = "float16"
) -> QuantizationSpec:
    """How a matrix is sketched.

    Args:
        bits: of a code: 2, 3 or 4 in the paper.
        groups: G tables a row, which the paper calls GPR: 1, 2, 4 or 8.
        exponent: of the importance of columns in k-means; the reference takes 3 or 4.
        dtype: of tables as they are stored.

    Raises:
        ValueError: as `GridSpec` does.
    """
    return QuantizationSpec(GridSpec(bits, "kmeans", groups, exponent, dtype), "gptq")


def tables_of(params: Params) -> dict[str, Float32[Array, "*layers out groups levels"]]:
    """The master copy of all tables: what is trained, and what a user owns.

    An affine grid is written out as a table, ``scale (code - zero)``, so that it can be tuned, too.

    Raises:
        ValueError: if nothing of ``params`` is quantised.
    """
    found = {
        _name(path): _table(leaf.grid)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_quantized)
        if _quantized(leaf)
    }
    if not found:
        raise ValueError("params have no quantised kernel; quantize_decoder makes some, by sketch_spec")
    return found


def with_tables(
    params: Params, tables: Mapping[str, Float[AnyArray, "*layers out groups levels"]], dtype: DTypeLike | None = None
) -> Params:
    """The same codes under other tables; nothing else changes, and no code is copied.

    Args:
        params: a sketched model.
        tables: of a user, for every quantised kernel.
        dtype: that products and storage see them in; ``None``: as they are.

    Raises:
        ValueError: for tables that are missing, of no kernel, or of another shape than their codes ask for.
    """
    used = set()

    def replace(path: Any, leaf: Any) -> Any:
        if not _quantized(leaf):
            return leaf
        name = _name(path)
        if name not in tables:
            raise ValueError(f"tables has none for {name!r}; it has {', '.join(sorted(tables)) or 'none at all'}")
        used.add(name)
        table, rows, levels = jnp.asarray(tables[name], dtype), leaf.shape[:-1], 2**leaf.bits
        groups = table.shape[-2] if table.ndim == len(rows) + 2 else 0
        if not groups or table.shape != (*rows, groups, levels) or leaf.columns % groups:
            raise ValueError(
                f"tables of {name!r} have the shape {table.shape}; allowed is {(*rows, 'groups', levels)}, "
                f"with groups that divide the {leaf.columns} columns"
            )
        return dataclasses.replace(leaf, grid=Grid(table, None, None, leaf.bits))

    replaced = jax.tree_util.tree_map_with_path(replace, params, is_leaf=_quantized)
    if left := set(tables) - used:
        raise ValueError(f"tables has {', '.join(sorted(left))}; params have no quantised kernel of that name")
    return replaced


def _quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedMatrix)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path)


def _table(grid: Grid) -> Array:
    if grid.tables is not None:
        return jnp.asarray(grid.tables, jnp.float32)
    assert grid.scales is not None
    assert grid.zeros is not None
    scales, zeros = (jnp.asarray(part, jnp.float32)[..., None] for part in (grid.scales, grid.zeros))
    return scales * (jnp.arange(2**grid.bits, dtype=jnp.float32) - zeros)
