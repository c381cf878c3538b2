"""One problem, every implementation: equal first, then timed by turns."""

import datetime
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.roofline import Device
from hashml_kernels.problem import Problem

Row = dict[str, Any]

_CALLS = 16
"""Calls in one program, so that starting it does not count; they differ in their ids."""
_BYTES = 2**31  # of what those calls return together
_REFERENCE_BYTES = 2**28
_WARM_UP = 3


def measure(problem: Problem, device: Device, *, samples: int, seed: int) -> Iterator[Row]:
    """A row for each implementation that serves the problem."""
    names = _implementations(problem, device)
    rng = np.random.default_rng(seed)
    size = sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(jax.eval_shape(_function(problem, "xla"), *problem.arguments))
    )
    calls = 1 if device.platform == "cpu" else max(1, min(_CALLS, _BYTES // size))
    batches = _draw(problem, rng, calls)
    programs = {name: jax.jit(_repeated(_function(problem, name))) for name in names}

    truth = "reference" if "reference" in names else "xla"
    expected = [np.asarray(x, np.float32) for x in jax.tree.leaves(programs[truth](batches[:1]))]
    rows = {name: _row(problem, device, name, calls) for name in names}
    for name in names:
        rows[name]["truth"] = truth
        try:
            got = [np.asarray(x, np.float32) for x in jax.tree.leaves(programs[name](batches[:1]))]
        except Exception as error:  # a compiler's refusal is a result; the other implementations are wanted too
            rows[name]["failure"] = f"{type(error).__name__}: {error}"[:500]
            continue
        rows[name]["max_error"] = max(
            float(np.max(np.abs(g - e), initial=0.0)) for g, e in zip(got, expected, strict=True)
        )
        if any(not _close(g, e, problem) for g, e in zip(got, expected, strict=True)):
            rows[name]["failure"] = f"differs from {truth}"

    times = _alternate({name: programs[name] for name in names if not rows[name]["failure"]}, batches, samples)
    xla = np.median(times["xla"]) if "xla" in times else None
    for name in names:
        if name in times:
            q1, median, q3 = np.percentile(np.asarray(times[name]) / calls, (25, 50, 75))
            rows[name] |= {
                "seconds": float(median),
                "seconds_q1": float(q1),
                "seconds_q3": float(q3),
                "samples": samples,
                "of_bound": rows[name]["bound_seconds"] / float(median),
                "over_xla": None if xla is None else float(median) * calls / float(xla),
            }
        yield rows[name]


def _implementations(problem: Problem, device: Device) -> list[str]:
    """The platform's kernel if it serves; on a CPU what ``"auto"`` does: native code, or XLA by another route."""
    names = ["auto"] if device.platform == "cpu" else []
    kernel = problem.kernels.get(device.platform)
    if kernel and problem.refusal(kernel) is None:
        names.append(kernel)
    names.append("xla")
    if problem.bytes < _REFERENCE_BYTES:
        names.append("reference")
    return names


def _function(problem: Problem, implementation: str) -> Callable[..., Any]:
    return lambda *arrays: problem.call(implementation, *arrays)


def _repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda batches: [function(*arrays) for arrays in batches]


def _draw(problem: Problem, rng: np.random.Generator, calls: int) -> list[tuple[jax.Array, ...]]:
    """Arguments of each call on the device; integers are drawn anew, floats are shared."""
    first = jax.device_put(problem.draw(rng))
    batches = [first]
    for _ in range(calls - 1):
        drawn = problem.draw(rng)
        batches.append(
            tuple(
                jax.device_put(new) if np.issubdtype(new.dtype, np.integer) else old
                for new, old in zip(drawn, first, strict=True)
            )
        )
    return batches


def _close(got: np.ndarray, expected: np.ndarray, problem: Problem) -> bool:
    """Equal for copies; for sums of ``terms`` standard normal numbers, up to the order of additions."""
    if problem.terms == 1:
        return bool(np.array_equal(got, expected))
    floats = [a.dtype for a in problem.arguments if jnp.issubdtype(a.dtype, np.floating)]
    rounding = max((float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0)
    eps = float(np.finfo(np.float32).eps)
    return bool(np.allclose(got, expected, rtol=max(rounding, 8 * eps), atol=16 * eps * problem.terms))


def _alternate(programs: dict[str, Callable[..., Any]], batches: Any, samples: int) -> dict[str, list[float]]:
    """Seconds of each sample of each program, one sample each by turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(_WARM_UP + samples):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(batches))
            if turn >= _WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def _row(problem: Problem, device: Device, name: str, calls: int) -> Row:
    return {
        "op": problem.op,
        "case": problem.case,
        "direction": problem.direction,
        "implementation": name,
        "platform": device.platform,
        "device": device.kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "bytes": problem.bytes,
        "flops": problem.flops,
        "bandwidth": device.bandwidth,
        "bandwidth_source": device.source,
        "bound_seconds": device.bound(problem.bytes, problem.flops),
        "calls": calls,
        "truth": None,
        "max_error": None,
        "failure": None,
        "seconds": None,
        "seconds_q1": None,
        "seconds_q3": None,
        "samples": 0,
        "of_bound": None,
        "over_xla": None,
    }
