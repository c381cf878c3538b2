"""How fast a device can move bytes and multiply, and how long a problem must therefore take."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_KNOWN = {
    "NVIDIA H200": (4.3e12, 7.7e14, "a copy and a bf16 product measured on one"),
    "TPU v5 lite": (819e9, 197e12, "datasheet"),
}
"""Bytes a second, read and written together; operations a second; where the numbers come from."""


class Device(NamedTuple):
    """What the bench runs on; ``flops`` is None where it is not known."""

    platform: str
    kind: str
    bandwidth: float
    flops: float | None
    source: str

    def bound(self, nbytes: int, flops: int) -> float:
        """Seconds that no implementation can go below."""
        arithmetic = 0.0 if self.flops is None else flops / self.flops
        return max(nbytes / self.bandwidth, arithmetic)


def this_device() -> Device:
    """JAX's first device; one that is not in the table has its bandwidth measured."""
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    if device.device_kind in _KNOWN:
        return Device(platform, device.device_kind, *_KNOWN[device.device_kind])
    return Device(platform, device.device_kind, _copy_bandwidth(platform), None, "a copy measured now")


def _copy_bandwidth(platform: str) -> float:
    """Best of twenty passes over an array that no cache holds, in place; bytes read plus bytes written."""
    array = jnp.zeros((2**27 if platform == "cpu" else 2**29) // 4, jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        array = jax.block_until_ready(step(array))
        times.append(time.perf_counter() - start)
    return 2 * array.nbytes / float(np.min(times))
