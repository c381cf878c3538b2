"""A decode step of Llama-7B over a one-bit cache, compiled here for chips that are not here.

    python -m experiments.kvcache.serving_pod        # in the environment of `make aot`, which compiles 2 layers

CQ-8c8b stores 32 KiB a token where bfloat16 takes 512 KiB. So 32 rows of 32,768 tokens fit on four TPU v5e chips of
16 GB, and 64 on one H200, weights, codebooks and the exact window included; the dense cache alone would be 16 times
as much. The compiler says what the step needs, a chip. With fewer than 32 layers, half as many are compiled too, and
what a layer adds is added for each that is missing: from two layers that is within 2% of what 32 need.

A step that decoded the cache before it reads it would compile as well. So the program must hold one kernel of
`cache_decode` a layer, and temporaries of at most `MOST_TEMPORARY` of the model's cache: one layer decoded to
bfloat16 would be half of it.
"""

import argparse
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.pods import chip_bytes, chips, fits, used_bytes
from hashml.accounting import stored_bytes
from hashml.kvcache import CacheSpec, LayerSpec, LayerTables, cache_shardings, decode_step, init
from hashml.kvcache.coupled import Coupled
from hashml.kvcache.full import KeepAll
from hashml.models.decoder import DecoderConfig, decoder_model, init_params, unstacked

LLAMA_7B = DecoderConfig(vocabulary=32_000, features=4096, layers=32, heads=32, kv_heads=32, head_dim=128,
                         hidden=11_008, tied=False, context=32_768)  # fmt: skip
TOKENS, WINDOW = 32_768, 32
TARGETS = {"v5e:2x2": 32, "h200": 64}
"""Rows."""
MOST_TEMPORARY = 1 / 16
"""Of the bytes of the whole cache, what a step may need besides."""
_KERNEL = re.compile(
    r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|tpu_custom_call)".*?op_name="[^"]*/cache_decode/', re.ASCII
)
_EACH_LAYER = ("kernels", "weight_bytes", "cache_bytes", "codebook_bytes", "temporary_bytes", "bytes_a_chip",
               "dense_cache_bytes", "aliased_bytes")  # fmt: skip
"""What grows with the layers."""
_COLUMNS = ("query", "key", "value", "gate", "up")
_ROWS = ("output", "down")


def compile_step(target: str, layers: int = LLAMA_7B.layers) -> dict[str, Any]:
    """Compile a step of that many layers for a target; what all layers of the model need, a chip.

    Raises:
        RuntimeError: where a layer is read without its kernel, the cache is not updated in place or decoded beside
            it, the model does not fit, or its dense cache would.
    """
    if layers >= LLAMA_7B.layers:
        return judged(_compiled(target, layers))
    if layers < 2:
        raise ValueError(f"layers is {layers}; two are needed, since half as many show what a layer adds")
    return judged(_compiled(target, layers), _compiled(target, layers // 2))


def judged(found: dict[str, Any], fewer: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a program of all layers needs, a chip, from what one of some of them does, and one of ``fewer``.

    Raises:
        RuntimeError: see `compile_step`.
    """
    for one in (found, fewer or found):
        if one["kernels"] != one["layers"]:
            raise RuntimeError(f"{one['kernels']} kernels read the caches of {one['layers']} layers: {one}")
        if one["aliased_bytes"] < 0.98 * one["cache_bytes"]:
            raise RuntimeError(f"{one['aliased_bytes']} bytes are updated in place, not all of the cache: {one}")
    whole = dict(found)
    if fewer is not None:
        missing, between = LLAMA_7B.layers - found["layers"], found["layers"] - fewer["layers"]
        for name in _EACH_LAYER:
            whole[name] += missing * (found[name] - fewer[name]) // between
        whole["layers"], whole["compiled_layers"] = LLAMA_7B.layers, found["layers"]
    most = MOST_TEMPORARY * whole["cache_bytes"]
    if max(whole["temporary_bytes"], found["temporary_bytes"]) > most:
        raise RuntimeError(f"{whole['temporary_bytes']} bytes of temporaries are more than {most:.0f}: {whole}")
    fits(whole["bytes_a_chip"], whole["target"], whole)
    if whole["dense_cache_bytes"] < chip_bytes(whole["target"]):
        raise RuntimeError(f"the dense cache would fit as well: {whole}")
    return whole


def kernel_calls(text: str) -> int:
    """Calls of `cache_decode`'s kernels in a compiled program."""
    return sum(_KERNEL.search(line) is not None for line in text.splitlines())


def _compiled(target: str, layers: int) -> dict[str, Any]:
    rows = TARGETS[target]
    config = DecoderConfig(**{**LLAMA_7B.__dict__, "layers": layers})
    mesh = Mesh(np.array(chips(target)), ("heads",))
    codec = Coupled(8, 8)
    layer = LayerSpec(kv_heads=config.kv_heads, query_heads=config.heads, head_dim=config.head_dim, slots=TOKENS,
                      window=WINDOW, key_codec=codec, value_codec=codec, policy=KeepAll(), rotary=config.rotary,
                      rope="read", dtype="bfloat16", heads_axis="heads" if mesh.size > 1 else None)  # fmt: skip
    spec = CacheSpec((layer,) * layers, rows)
    cache = jax.eval_shape(lambda: init(spec, jax.random.key(0)))
    params = jax.eval_shape(lambda: unstacked(init_params(jax.random.key(0), config, jnp.bfloat16)))
    book = jax.ShapeDtypeStruct((config.kv_heads, config.head_dim // 8, 256, 8), jnp.float16)
    tables = (LayerTables({"codebook": book}, {"codebook": book}),) * layers

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
        )

    def weight(path: Any, _: Any) -> NamedSharding:
        name = path[-1].key
        return NamedSharding(mesh, P(None, "heads") if name in _COLUMNS else P("heads") if name in _ROWS else P())

    held = cache_shardings(cache, mesh, "heads")
    everywhere, by_head = NamedSharding(mesh, P()), NamedSharding(mesh, P("heads"))
    step = jax.jit(
        functools.partial(_step, decoder_model(config), spec), donate_argnums=2, out_shardings=(everywhere, held)
    )
    arguments = (
        placed(params, jax.tree_util.tree_map_with_path(weight, params)),
        placed(tables, jax.tree.map(lambda _: by_head, tables)),
        placed(cache, held),
        jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=everywhere),
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = step.lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    dense = 2 * 2 * layers * config.kv_heads * config.head_dim * TOKENS * rows // mesh.size
    return {
        "target": target,
        "layers": layers,
        "kernels": kernel_calls(str(compiled.as_text())),
        "chips": mesh.size,
        "rows": rows,
        "tokens": TOKENS,
        "weight_bytes": sum(
            stored_bytes(leaf) // (mesh.size if leaf.sharding.spec else 1) for leaf in jax.tree.leaves(arguments[0])
        ),
        "cache_bytes": stored_bytes(cache.layers) // mesh.size,
        "codebook_bytes": stored_bytes(tables) // mesh.size,
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "bytes_a_chip": used_bytes(compiled),
        "dense_cache_bytes": dense,
        "aliased_bytes": int(memory.alias_size_in_bytes),
    }


def _step(model: Any, spec: CacheSpec, params: Any, tables: Any, cache: Any, token: Any) -> Any:
    return decode_step(model, spec, tables, params, cache, token)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=tuple(TARGETS), action="append", help="what to compile for; default: all")
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a line of JSON each")
    options = parser.parse_args()
    for target in options.target or TARGETS:
        found = compile_step(target, options.layers)
        print(json.dumps(found) if options.json else "\n".join(f"{n:18} {v}" for n, v in found.items()), flush=True)


if __name__ == "__main__":
    main()
