"""What `experiments.attention.nomad` times: one query a head over all keys, by look-ups and by products."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.lab import interleave
from hashml.attention import nomad_native
from hashml.attention.nomad import BLOCK, nomad_attention, nomad_scores


@runtime_checkable
class Step(Protocol):
    """The sizes of a decode step, fields of the experiment's configuration."""

    @property
    def channels(self) -> tuple[int, ...]: ...
    @property
    def longest_xla(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def repetitions(self) -> int: ...


def torch_is_here() -> bool:
    """Whether the peer is installed (`make peers`)."""
    return importlib.util.find_spec("torch") is not None


def timed_methods(config: Step, context: int) -> list[tuple[str, int | None]]:
    """``(method, channels)`` of what can be timed here, PyTorch last."""
    found: list[tuple[str, int | None]] = [("dense", None)]
    if nomad_native.available():
        found += [("native", channels) for channels in config.channels]
    if context <= config.longest_xla:
        found.append(("xla", 1))
    return [*found, *([("torch", None)] if torch_is_here() else [])]


def name_of(method: str, channels: int | None) -> str:
    return method if channels is None else f"{method}:{channels}"


def times(config: Step, part: str, context: int) -> dict[str, np.ndarray]:
    """Seconds of every method; threads of PyTorch spin for a while, hence the calls ahead."""
    rng = np.random.default_rng(context)
    shape = (1, config.heads, context, config.width)
    q, k, v = (rng.standard_normal(s, dtype=np.float32) for s in (shape[:2] + shape[3:], shape, shape))
    functions = {name_of(*x): timed(config, part, *x, q, k, v) for x in timed_methods(config, context)}
    return interleave(functions, repetitions=config.repetitions, warmup=1, lead=1)


def timed(
    config: Step, part: str, method: str, channels: int | None, q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> Callable[[], Any]:
    """A function of no argument: logits of all keys, or what the queries read."""
    if method == "torch":
        return _torch(part, q, k, v)
    if method == "dense":
        dense = jax.jit(dense_scores if part == "scores" else dense_attention)
        return functools.partial(dense, *map(jnp.asarray, (q, k) if part == "scores" else (q, k, v)))
    rng = np.random.default_rng(0)
    quantisers, context = config.width // (channels or 1), k.shape[2]
    book = jnp.asarray(rng.standard_normal((config.heads, quantisers, 16, channels or 1)), jnp.float32)
    codes = rng.integers(0, 256, (1, config.heads, -(-context // BLOCK), quantisers, 16)).astype(np.uint8)
    implementation = "native" if method == "native" else "xla"
    if part == "scores":
        score = jax.jit(functools.partial(nomad_scores, implementation=implementation))
        return functools.partial(score, jnp.asarray(q), jnp.asarray(codes), book)
    read = jax.jit(functools.partial(nomad_attention, implementation=implementation))
    length = jnp.asarray([context], jnp.int32)
    return functools.partial(read, jnp.asarray(q), jnp.asarray(codes), jnp.asarray(v), book, length)


def dense_scores(q: Float[Array, "B H D"], k: Float[Array, "B H N D"]) -> Float[Array, "B H N"]:
    """The products that look-ups replace."""
    return jnp.einsum("bhd,bhnd->bhn", q, k)


def dense_attention(
    q: Float[Array, "B H D"], k: Float[Array, "B H N D"], v: Float[Array, "B H N V"]
) -> Float[Array, "B H V"]:
    """Softmax attention as XLA has it."""
    return jnp.einsum("bhn,bhnv->bhv", jax.nn.softmax(dense_scores(q, k) * q.shape[-1] ** -0.5, axis=-1), v)


def _torch(part: str, *arrays: np.ndarray) -> Callable[[], Any]:
    torch = importlib.import_module("torch")
    q, k, v = (torch.from_numpy(x) for x in arrays)

    def read() -> Any:
        with torch.no_grad():
            if part == "scores":
                # The faster of the ways to write it, with q as a row.
                return torch.matmul(q[:, :, None], k.transpose(2, 3))
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v)

    return read
