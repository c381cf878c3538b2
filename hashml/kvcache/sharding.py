"""A cache spread over devices by its heads: each holds the keys and values of its own, and nothing is exchanged but
what a policy that decides for all heads asks for."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hashml.kvcache.state import Cache, LayerCache


def cache_shardings(cache: Cache, mesh: Mesh, axis: str) -> Any:
    """For `jax.device_put` or ``out_shardings``: leaves with a head axis are split over ``axis`` of the mesh.

    Args:
        cache: arrays, or shapes of them.
        mesh: of devices.
        axis: its name; its size divides the key heads.

    Raises:
        ValueError: for a paged cache, whose pool belongs to all heads, or heads that the devices do not divide.
    """
    devices = mesh.shape[axis]
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, axis))

    def of(layer: LayerCache) -> LayerCache:
        if layer.pages is not None:
            raise ValueError("cache is paged; its pool belongs to all heads, and is not split over devices")
        heads = layer.window_keys.shape[1]
        if heads % devices:
            raise ValueError(f"cache has {heads} key heads; the {devices} devices of {axis!r} must divide them")

        def place(leaf: Any) -> NamedSharding:
            return split if leaf.ndim > 1 and leaf.shape[1] == heads else everywhere

        placed = jax.tree.map(place, layer)
        return placed._replace(window_pos=everywhere)

    shardings = jax.tree.map(lambda _: everywhere, cache._replace(layers=()))
    return shardings._replace(layers=tuple(of(layer) for layer in cache.layers))
