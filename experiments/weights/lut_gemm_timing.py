"""What `experiments.weights.lut_gemm` times: products of codes by look-ups, and dense ones in float32 and int8.

A process of its own has as many cores as it is told, before XLA and PyTorch make their threads:

    python -m experiments.weights.lut_gemm_timing '{"cores": 1, "shapes": [[1, 1024, 1024]], "repetitions": 6}'
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import interleave
from experiments.lab.environment import ROOT
from hashml.coding import pack
from hashml.weights import lut_gemm_native
from hashml.weights.lut_gemm import Implementation, lsq_codes, lsq_levels, lut_dense, pack_weights, packed_product

BITS = 2
INPUTS = ("codes", "floats")
"""What a product is given: activations as its codes, or as floats, of which making codes is then a part."""
SLOW = 2**25
"""Products of the largest shape at which forms are timed that take longest."""
ENGINES = ("qnnpack", "fbgemm", "onednn")
"""PyTorch's int8 products; the first is the paper's."""
STEP = 0.4
Methods = dict[str, Callable[[], Any]]


def torch_is_here() -> bool:
    """Whether the peer is installed (`make peers`)."""
    return importlib.util.find_spec("torch") is not None


def cores_here() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings() -> dict[str, int]:
    """Numbers of cores by name; one core only where a process can be held to it."""
    one = {"one": 1} if hasattr(os, "sched_setaffinity") and cores_here() > 1 else {}
    return one | {"all": cores_here()}


def method_names(given: str, shape: tuple[int, int, int]) -> list[str]:
    """What is timed here at this shape: ``dense`` has weights of 4 bytes or one, as flax keeps kernels, ``xla``
    packed ones by its own products, ``tables`` this project's native kernel, ``paper`` the paper's."""
    small, native = int(np.prod(shape)) <= SLOW, lut_gemm_native.available()
    names = ["dense_float32", *(["dense_int8"] if small else [])]
    names += ["tables", "paper"] if native else []
    names += ["tables_avx2", "paper_avx2"] if native and given == "codes" else []
    names += ["xla_float32"]
    names += ["xla_int8", "xla_byte_tables", "xla_bit_planes"] if small and given == "codes" else []
    return names + (["torch_float32", *(f"torch_{engine}" for engine in engines())] if torch_is_here() else [])


def engines() -> list[str]:
    """Those that this build of PyTorch has."""
    return [name for name in ENGINES if name in importlib.import_module("torch").backends.quantized.supported_engines]


def times(cores: int, shapes: tuple[tuple[int, int, int], ...], repetitions: int) -> dict[str, list[float]]:
    """Seconds by ``given|M|N|K|method``, from a process that is held to so many cores.

    Raises:
        RuntimeError: if it fails.
    """
    told = json.dumps({"cores": cores, "shapes": shapes, "repetitions": repetitions})
    command = [sys.executable, "-m", "experiments.weights.lut_gemm_timing", told]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def key(given: str, shape: tuple[int, int, int], method: str) -> str:
    """Of a method in `times`."""
    return "|".join((given, *map(str, shape), method))


# --- in the process -------------------------------------------------------------------------------------


def main(told: dict[str, Any]) -> dict[str, list[float]]:
    """All shapes; threads of PyTorch spin for a while, hence the calls ahead."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: told["cores"]])
    if torch_is_here():
        importlib.import_module("torch").set_num_threads(told["cores"])
    found = {}
    for shape in map(tuple, told["shapes"]):
        for given in INPUTS:
            functions = methods(given, shape)
            seconds = interleave(functions, repetitions=told["repetitions"], warmup=1, lead=1)
            found |= {key(given, shape, name): values.tolist() for name, values in seconds.items()}
    return found


def methods(given: str, shape: tuple[int, int, int]) -> Methods:
    """Functions of no argument that yield the same product, of int32 or floats; of floats with their steps."""
    count, rows, columns = shape
    rng = np.random.default_rng(columns)
    x = np.abs(rng.standard_normal((count, columns), dtype=np.float32))
    w = rng.integers(0, 2**BITS, (rows, columns)).astype(np.uint8)
    a_levels, w_levels = (lsq_levels(BITS, signed=signed).astype(np.int32) for signed in (False, True))
    a = np.asarray(lsq_codes(x, STEP, BITS, signed=False))
    functions = (_codes if given == "codes" else _floats)(x, a, w, a_levels, w_levels)
    if torch_is_here():
        functions |= _torch(given, x, a, w_levels[w])
    return {name: functions[name] for name in method_names(given, shape)}


def _codes(x: np.ndarray, a: np.ndarray, w: np.ndarray, a_levels: np.ndarray, w_levels: np.ndarray) -> Methods:
    del x
    packed, codes, columns = pack_weights(w, w_levels), jnp.asarray(a), w.shape[1]

    def form(name: Implementation) -> Callable[[], Any]:
        # Levels are known to the program, packed weights are its argument.
        made = jax.jit(lambda codes, weights: packed_product(codes, weights, a_levels, implementation=name))
        if name != "float32":
            return lambda: made(codes, packed)
        known = jax.jit(lambda codes, w: _float_of_codes(codes, w, a_levels, packed))
        return lambda: known(codes, packed.blocks)

    found = {f"xla_{name}": form(name) for name in ("int8", "float32", "byte_tables", "bit_planes")}
    dense = jax.jit(_dense)
    floats = [jnp.asarray(x, jnp.float32) for x in (a_levels[a], w_levels[w.T])]
    bytes_ = [jnp.asarray(x, jnp.int8) for x in (a_levels[a], w_levels[w.T])]
    found["dense_float32"] = lambda: dense(*floats)
    found["dense_int8"] = lambda: dense(*bytes_)
    if lut_gemm_native.available():
        by_rows, packed_codes = lut_gemm_native.pack_rows(w), pack(codes, BITS)
        for suffix, level in (("", "auto"), ("_avx2", "avx2")):
            own: dict[str, Any] = {"level": level}
            tables = jax.jit(
                lambda codes, blocks, own=own: lut_gemm_native.block_product(
                    codes, blocks, a_levels, w_levels, rows=len(w), **own
                )
            )
            paper = jax.jit(
                lambda codes, rows, own=own: lut_gemm_native.row_product(
                    codes, rows, a_levels, w_levels, columns=columns, **own
                )
            )
            found[f"tables{suffix}"] = lambda f=tables: f(codes, packed.blocks)
            found[f"paper{suffix}"] = lambda f=paper: f(packed_codes, by_rows)
    return found


def _float_of_codes(codes: Any, blocks: Any, a_levels: np.ndarray, packed: Any) -> Any:
    """The form whose exactness must be known: levels are constants."""
    weights = type(packed)(blocks, packed.levels, packed.rows, packed.columns)
    return packed_product(codes, weights, a_levels, implementation="float32")


def _floats(x: np.ndarray, a: np.ndarray, w: np.ndarray, a_levels: np.ndarray, w_levels: np.ndarray) -> Methods:
    del a
    packed, inputs, columns, step = pack_weights(w, w_levels), jnp.asarray(x), w.shape[1], jnp.float32(STEP)
    bias, steps = jnp.zeros(len(w)), jnp.full(len(w), 0.1, jnp.float32)

    def layer(implementation: Implementation) -> Callable[[], Any]:
        def by(x: Any, blocks: Any) -> Any:
            weights = type(packed)(blocks, packed.levels, packed.rows, packed.columns)
            return lut_dense(x, weights, bias, steps, step, bits=BITS, implementation=implementation)

        made = jax.jit(by)
        return lambda: made(inputs, packed.blocks)

    def paper(x: Any, rows: Any) -> Any:
        codes = pack(lsq_codes(x, step, BITS, signed=False), BITS)
        sums = lut_gemm_native.row_product(codes, rows, a_levels, w_levels, columns=columns)
        return sums * (step * steps) + bias

    def int8(x: Any, w: Any) -> Any:
        codes = jnp.round(jnp.clip(x / step, -128, 127)).astype(jnp.int8)
        return _dense(codes, w) * (step * steps) + bias

    dense, dense_int8, by_rows = jax.jit(lambda x, w: _dense(x, w) + bias), jax.jit(int8), jax.jit(paper)
    floats, bytes_ = jnp.asarray(w_levels[w.T], jnp.float32), jnp.asarray(w_levels[w.T], jnp.int8)
    found = {
        "dense_float32": lambda: dense(inputs, floats),
        "dense_int8": lambda: dense_int8(inputs, bytes_),
        "xla_float32": layer("float32"),
    }
    if lut_gemm_native.available():
        swapped = lut_gemm_native.pack_rows(w)
        found |= {"tables": layer("native"), "paper": lambda: by_rows(inputs, swapped)}
    return found


def _dense(a: Any, w: Any) -> Any:
    wide = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jnp.dot(a, w, preferred_element_type=wide)


def _torch(given: str, x: np.ndarray, a: np.ndarray, w: np.ndarray) -> Methods:
    """Of codes with bytes in and bytes out, of floats with a range of them found in each call."""
    torch = importlib.import_module("torch")
    inputs = torch.from_numpy(a.astype(np.float32) if given == "codes" else x)
    weights = torch.from_numpy(w.astype(np.float32))

    def without_gradients(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function(*arguments)

        return call

    found = {"torch_float32": without_gradients(torch.nn.functional.linear, inputs, weights)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its tensors of bytes are on their way out
        before = torch.backends.quantized.engine
        for engine in engines():
            torch.backends.quantized.engine = engine
            quantized = torch.quantize_per_tensor(weights, 0.1, 0, torch.qint8)
            prepacked = torch.ops.quantized.linear_prepack(quantized, None)
            if given == "codes":
                bytes_ = torch.quantize_per_tensor(inputs, 1.0, 0, torch.quint8)
                call = without_gradients(torch.ops.quantized.linear, bytes_, prepacked, 1.0, 0)
            else:
                call = without_gradients(torch.ops.quantized.linear_dynamic, inputs, prepacked)
            found[f"torch_{engine}"] = call
        torch.backends.quantized.engine = before
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
