"""Every backend equals a loop over rows and entries in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.gathered_mlp import pallas_mosaic_tpu, pallas_triton, shapes, xla
from hashml_kernels.gathered_mlp.lists import Activation, Operands, activate

EPS = float(np.finfo(np.float32).eps)
Case = shapes.Case

# No number of neurons, entries or channels is a multiple of a tile, unless blocks ask for it.
SHARED = Case("shared", 3, 40, 57, 21, dtype="float32", biased=True)
OWN = Case("own", 2, 70, 41, 13, own=True, activation="gelu", gated=True, biased=True)
ODD_BLOCKS = Case("odd_blocks", 2, 24, 50, 5, 7, dtype="float16", activation="silu", gated=True)
BLOCKS = Case("blocks", 3, 256, 64, 6, 8, dtype="float32", biased=True)
OWN_BLOCKS = Case("own_blocks", 2, 256, 96, 4, 16, own=True, activation="silu", gated=True, biased=True)
CASES = [("reference", OWN), ("reference", ODD_BLOCKS), ("xla", SHARED), ("xla", ODD_BLOCKS), ("auto", OWN_BLOCKS)]
CASES += [("pallas_triton", case) for case in (SHARED, OWN, ODD_BLOCKS)]
CASES += [("pallas_mosaic_tpu", case) for case in (BLOCKS, OWN_BLOCKS)]


@functools.cache
def draw(case: Case) -> tuple[np.ndarray, ...]:
    """Lists in which some entries do not count, at the start among others; one neuron stands twice.

    What belongs to neurons that no list names is NaN, but for the reference, which multiplies by all.
    """
    x, w_in, w_out, idx, valid, *others = (a.copy() for a in shapes.draw(case, np.random.default_rng(0)))
    own_idx, own_valid = np.atleast_2d(idx), np.atleast_2d(valid)
    own_idx[0, :2] = -1, 2**31 - 1 if case.block > 1 else case.neurons
    own_valid[0] = True
    own_idx[0, -1] = own_idx[0, 2]
    if case.own:
        own_valid[1] = False
    return x, w_in, w_out, own_idx.reshape(idx.shape), own_valid.reshape(idx.shape), *others


def spoilt(case: Case) -> tuple[np.ndarray, ...]:
    """The same with NaN where nothing is to be read."""
    x, *arrays = (a.copy() for a in draw(case))
    named = {i for b in range(case.batch) for i in entries(case, b)}
    others = [i for i in range(case.neurons) if i not in named]
    assert others
    assert named
    for array in (*arrays[:2], *arrays[4:]):
        array[others] = np.nan
    return x, *arrays


def entries(case: Case, b: int) -> list[int]:
    """Neurons that row ``b`` meets, one by one."""
    idx, valid = (np.atleast_2d(a)[b if case.own else 0] for a in draw(case)[3:5])
    found = [int(i) * case.block + n for i, ok in zip(idx, valid, strict=True) if ok for n in range(case.block)]
    return [i for i in found if 0 <= i < case.neurons]


ACTIVATIONS: dict[Activation, Any] = {
    "relu": lambda s: max(s, 0.0),
    "silu": lambda s: s / (1 + math.exp(-s)),
    "gelu": lambda s: s / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3))),
}


@functools.cache
def loop(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The result, and a bound for the error that float32 makes of it."""
    x, w_in, w_out, _, _, *others = (a.astype(np.float64) for a in draw(case))
    gate, bias = (others[0] if case.gated else None), (others[-1] if case.biased else np.zeros(case.neurons))
    out, bound = np.zeros(x.shape), np.zeros(x.shape)
    for b in range(case.batch):
        for i in entries(case, b):
            hidden = ACTIVATIONS[case.activation](x[b] @ w_in[i] + bias[i])
            size = np.abs(x[b]) @ np.abs(w_in[i]) + abs(bias[i])
            if gate is not None:
                size = size * (np.abs(x[b]) @ np.abs(gate[i]))
                hidden *= x[b] @ gate[i]
            out[b] += hidden * w_out[i]
            # Sums of n terms are off by n EPS / 2; slopes of the activations are below 1.2; a gate has its own sum.
            bound[b] += EPS * (1.2 * case.width + len(entries(case, b)) + 16) * size * np.abs(w_out[i])
    rounding = float(jnp.finfo(case.dtype).eps) if case.dtype != "float32" else 0.0
    return out, bound + rounding * np.abs(out)


@functools.cache
def program(case: Case, implementation: Any):
    options = {"xla_backend_optimization_level": 0} if implementation.startswith("pallas") else None
    return jax.jit(functools.partial(shapes.call, case, implementation), compiler_options=options)


def assert_equals_the_loop(case: Case, implementation: str) -> None:
    out, bound = loop(case)
    got = program(case, implementation)(*(draw if implementation == "reference" else spoilt)(case))
    assert got.dtype == case.dtype
    assert np.all(np.abs(np.asarray(got, np.float64) - out) <= bound)
    assert np.abs(out[0]).max() > 0.3
    assert bound.max() < 5e-2  # while results are of size one


@pytest.mark.parametrize(("implementation", "case"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_backend_equals_the_loop(implementation, case):
    assert_equals_the_loop(case, implementation)


@pytest.fixture
def _compiled_anew():
    """For tests that change a module's numbers."""
    program.cache_clear()
    yield
    program.cache_clear()


@pytest.mark.usefixtures("_compiled_anew")
def test_blocks_of_xla_may_have_any_size(monkeypatch):
    monkeypatch.setattr(xla, "LEAST_NEURONS", 5)
    monkeypatch.setattr(xla, "BLOCK_FLOATS", 1)
    assert xla.block_neurons(SHARED.operands()) == 5
    assert_equals_the_loop(SHARED, "xla")


@pytest.mark.usefixtures("_compiled_anew")
def test_triton_programs_share_inputs_channels_and_neurons(monkeypatch):
    monkeypatch.setattr(pallas_triton, "_ROWS", 2)
    monkeypatch.setattr(pallas_triton, "_SUMS", 1)
    monkeypatch.setattr(pallas_triton, "_ASKED", 1)
    monkeypatch.setattr(pallas_triton, "_PROGRAMS", 8)
    plan = pallas_triton._Plan.of(SHARED.operands(), 1)
    assert (plan.rows, plan.shares, plan.parts, plan.steps) == (2, 2, 2, 1)
    assert plan.into.channels == plan.out.channels == 32 < SHARED.width
    assert_equals_the_loop(SHARED, "pallas_triton")


def test_tpu_kernel_under_the_simulator():
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    case = BLOCKS
    x, w_in, w_out, idx, valid, bias = map(jnp.asarray, spoilt(case))
    operands = Operands(x[None], w_in, bias, None, w_out, idx[None], valid[None])
    simulate = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    found = jax.jit(lambda o: pallas_mosaic_tpu.apply(o, activation="relu", block=case.block, interpret=simulate))
    out, bound = loop(case)
    assert np.all(np.abs(np.asarray(found(operands)[0], np.float64) - out) <= bound)


def test_activations_of_large_numbers_are_finite():
    x = np.array([-1e4, -100.0, 0.0, 100.0, 1e4], np.float32)
    for name in ACTIVATIONS:
        np.testing.assert_allclose(activate(name)(x), np.maximum(x, 0), atol=1e-30)


def test_a_batch_of_calls_and_derivatives_through_a_kernel():
    """The kernel's batching makes more lists of more calls, where they share weights; its derivatives are XLA's."""
    case = Case("", 2, 8, 17, 9, dtype="float32", activation="silu", gated=True)
    draws = (shapes.draw(case, np.random.default_rng(n)) for n in (1, 2))
    axes = (0, None, None, 0, 0, None)
    drawn = [a[0] if axis is None else np.stack(a) for axis, *a in zip(axes, *draws, strict=True)]

    def total(implementation, *arrays):
        out = jax.vmap(functools.partial(shapes.call, case, implementation), axes)(*arrays)
        return jnp.sum(out**2), out

    kernel, plain = (
        jax.jit(
            jax.value_and_grad(functools.partial(total, name), argnums=(0, 1, 2, 5), has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )(*drawn)
        for name in ("pallas_triton", "xla")
    )
    for got, expected in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert np.abs(np.asarray(expected)).max() > 1e-2


def test_permuted_neurons_permute_indices_alone():
    x, w_in, w_out, idx, valid, bias = draw(SHARED)
    order = np.random.default_rng(1).permutation(SHARED.neurons)
    inside = (idx >= 0) & (idx < SHARED.neurons)
    renamed = np.where(inside, np.argsort(order)[np.clip(idx, 0, SHARED.neurons - 1)], -1).astype(np.int32)
    found = program(SHARED, "xla")(x, w_in[order], w_out[order], renamed, valid, bias[order])
    np.testing.assert_array_equal(found, program(SHARED, "xla")(x, w_in, w_out, idx, valid, bias))


def test_all_positive_neurons_give_the_dense_layer():
    """The identity that contextual sparsity rests on: a neuron whose activation is 0 adds nothing."""
    x, w_in, w_out, _, _, bias = draw(SHARED)
    hidden = x[:1].astype(np.float64) @ w_in.T + bias
    active = np.flatnonzero(hidden[0] > 0)
    assert 0 < len(active) < SHARED.neurons
    idx = np.pad(active, (0, SHARED.neurons - len(active))).astype(np.int32)
    valid = np.arange(SHARED.neurons) < len(active)
    found = jax.jit(functools.partial(shapes.call, SHARED, "auto"))(x[:1], w_in, w_out, idx, valid, bias)
    np.testing.assert_allclose(found, np.maximum(hidden, 0) @ w_out, rtol=1e-4, atol=1e-5)
