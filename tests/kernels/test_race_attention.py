"""Every backend equals the definition with softmax features in float64, and its autodiff."""

import functools
import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml.hashing.simhash import corners
from hashml_kernels.race_attention import pallas_mosaic_tpu, pallas_triton, race_attention, xla


class Case(NamedTuple):
    causal: bool
    length: int
    keys: int
    width: int
    values: int
    tables: int = 3
    bits: int = 2
    dtype: str = "float32"
    heads: tuple[int, int] = (2, 1)
    masked: bool = True
    beta: float = 1.3


# No length is a multiple of a tile; there is more than one span, and more than one piece of a head.
ANY = {
    "order": Case(True, 45, 45, 24, 40),
    "no_order": Case(False, 37, 50, 20, 18, dtype="bfloat16"),
    "sharp": Case(True, 33, 33, 16, 16, 2, 3, "bfloat16", (2, 2), False, 15.0),
}
TPU = {
    "order": Case(True, 150, 150, 64, 64),
    "no_order": Case(False, 135, 200, 64, 64, dtype="bfloat16"),
    "sharp": Case(True, 128, 128, 64, 64, 2, 3, "bfloat16", (1, 1), False, 15.0),
}
CASES = [(backend, name) for backend in ("xla", "pallas_triton", "pallas_mosaic_tpu") for name in ANY]
CASES = [case for case in CASES if case != ("xla", "sharp")] + [("reference", "order"), ("auto", "sharp")]
TOLERANCE = {"float32": 3e-5, "bfloat16": 4 * 2.0**-8}


def case_of(backend: str, name: str) -> Case:
    return TPU[name] if backend == "pallas_mosaic_tpu" else ANY[name]


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """What the sizes of the tests are cut in."""
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in (
            (pallas_triton, {"_SPAN": 32, "_PIECE": 16, "_CHUNK": 16, "_SMALL_CHUNK": 16}),
            (pallas_triton, {"_SMALL_PIECE": 16, "_MOST_SUMS": 512, "_MOST_CAUSAL_SUMS": 512}),
            (pallas_mosaic_tpu, {"_TILE": 128, "_CAUSAL_TILE": 128}),
            (xla, {"TILE": {False: 16, True: 12}}),
        ):
            for name, size in sizes.items():
                patch.setattr(module, name, size)
        yield


@functools.cache
def draw(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    heads, kv_heads = case.heads
    shapes = {
        "q": (2, heads, case.length, case.width),
        "k": (2, kv_heads, case.keys, case.width),
        "v": (2, kv_heads, case.keys, case.values),
        "g": (2, heads, case.length, case.values),
    }
    arrays = {name: jnp.asarray(rng.standard_normal(shape), case.dtype) for name, shape in shapes.items()}
    mask = rng.random((2, case.keys)) < 0.7
    mask[0, :3] = False  # the first causal queries of a row see nothing
    planes = jnp.asarray(rng.standard_normal((case.tables, case.bits, case.width)), jnp.float32)
    return arrays | {"mask": jnp.asarray(mask) if case.masked else None, "planes": planes}


@functools.cache
def program(case: Case, backend: Any):
    """``f(q, k, v, beta, g) -> (out, dq, dk, dv, dbeta)``, compiled once for all tests of a case."""
    fixed = draw(case)

    def both(q, k, v, beta, g):
        def attend(q, k, v, beta):
            return race_attention(
                q, k, v, fixed["planes"], beta, causal=case.causal, mask=fixed["mask"], implementation=backend
            )

        out, pull = jax.vjp(attend, q, k, v, beta)
        return out, *pull(g)

    options = {"xla_backend_optimization_level": 0} if backend.startswith("pallas") else None
    return jax.jit(both, compiler_options=options)


def run(case: Case, backend: str, beta: float | None = None, **changes: Any) -> list[np.ndarray]:
    arrays = draw(case) | changes
    given = (arrays["q"], arrays["k"], arrays["v"], jnp.float32(case.beta if beta is None else beta), arrays["g"])
    found = program(case, backend)(*given)
    for one, operand in zip(found[1:], given, strict=False):
        assert one.dtype == operand.dtype
    assert found[0].dtype == arrays["v"].dtype
    return [np.asarray(x, np.float64) for x in found]


@functools.cache
def truth(case: Case) -> list[np.ndarray]:
    """The dense form. The temperature's gradient is a sum over tokens; the last entry is the sum of their sizes."""
    arrays = draw(case)
    signs = np.asarray(corners(case.bits), np.float64)
    group = case.heads[0] // case.heads[1]

    with jax.enable_x64(True):

        def wide(name: str) -> Any:
            return jnp.asarray(np.asarray(arrays[name], np.float64))

        planes, keep = wide("planes"), np.ones((2, case.keys)) if arrays["mask"] is None else wide("mask")

        def phi(x, beta):
            u = jnp.tanh(jnp.einsum("bhtd,lpd->bhtlp", x, planes))
            tables = jax.nn.softmax(beta[..., None, None] * (u @ signs.T), axis=-1)
            return tables.reshape(*x.shape[:-1], -1) + 1e-15

        def attend(q, k, v, beta_q, beta_k):
            phi_k = phi(k, beta_k) * keep[:, None, :, None]
            weights = jnp.einsum("bhts,bhns->bhtn", phi(q, beta_q), jnp.repeat(phi_k, group, axis=1))
            weights = jnp.tril(weights) if case.causal else weights
            total = weights.sum(axis=-1, keepdims=True)
            return weights @ jnp.repeat(v, group, axis=1) / jnp.where(total > 0, total, 1)

        q, k, v, g = (wide(name) for name in ("q", "k", "v", "g"))
        betas = (jnp.full(x.shape[:3], case.beta) for x in (q, k))

        def both(g, *primals):
            out, pull = jax.vjp(attend, *primals)
            return out, *pull(g)

        out, d_q, d_k, d_v, *d_beta = jax.jit(both)(g, q, k, v, *betas)
        total = np.concatenate([np.asarray(d).ravel() for d in d_beta])
        return [np.asarray(x) for x in (out, d_q, d_k, d_v)] + [total.sum(), np.abs(total).sum()]


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_backend_equals_the_dense_form_and_its_gradients(backend, name):
    case = case_of(backend, name)
    *expected, d_beta, size = truth(case)
    *found, found_beta = run(case, backend)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE[case.dtype] * np.abs(other).max())
    assert abs(found_beta - d_beta) <= TOLERANCE[case.dtype] * size


KERNELS = [("xla", "order"), ("pallas_triton", "order"), ("pallas_mosaic_tpu", "order")]


@pytest.mark.parametrize(("backend", "name"), KERNELS)
def test_a_query_that_sees_no_key_gets_zeros(backend, name):
    out, d_q, *_ = run(case_of(backend, name), backend)
    for x in (out, d_q):
        np.testing.assert_array_equal(x[0, :, :3], 0)
        assert x[0, :, 20:].any()


@pytest.mark.parametrize(("backend", "name"), [*KERNELS, ("pallas_triton", "sharp"), ("pallas_mosaic_tpu", "sharp")])
def test_constant_values_come_back(backend, name):
    """16-bit kernels round features before they add them up, the same for values and for mass."""
    case = case_of(backend, name)
    mask = np.asarray(draw(case)["mask"]) if case.masked else np.ones((2, case.keys), bool)
    seen = np.maximum.accumulate(mask, axis=1)[:, None, :, None]
    out = run(case, backend, v=jnp.ones_like(draw(case)["v"]))[0]
    expected = np.broadcast_to(seen, out.shape)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 if case.dtype == "float32" else 2.0**-9)


@pytest.mark.parametrize(("backend", "name"), KERNELS)
def test_at_beta_zero_all_keys_count_alike(backend, name):
    """Running means of the values; queries and keys get no gradient at all."""
    case = case_of(backend, name)
    arrays = draw(case)
    out, d_q, d_k, *_ = run(case, backend, beta=0.0)
    keep = np.asarray(arrays["mask"], np.float64)[:, None, :, None]
    v = np.asarray(arrays["v"], np.float64)
    means = np.cumsum(v * keep, axis=2) / np.maximum(np.cumsum(keep, axis=2), 1)
    np.testing.assert_allclose(out, np.broadcast_to(means, out.shape), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(d_q, 0)
    np.testing.assert_array_equal(d_k, 0)


def test_tpu_kernels_under_the_simulator(monkeypatch):
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    simulate = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    for direction in ("forward", "backward"):
        whole = getattr(pallas_mosaic_tpu, direction)
        monkeypatch.setattr(
            pallas_mosaic_tpu,
            direction,
            lambda *args, whole=whole, interpret=None: whole(*args, interpret=simulate if interpret else False),
        )
    case = TPU["order"]._replace(heads=(1, 1))
    *expected, _, _ = truth(case)
    for one, other in zip(run(case, "pallas_mosaic_tpu"), expected, strict=False):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE["float32"] * np.abs(other).max())


# --- checks ---------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": jnp.zeros((2, 2, 45, 24), int)}, TypeError, "q has dtype int"),
    ({"k": jnp.zeros((2, 1, 45, 23))}, ValueError, "k has shape (2, 1, 45, 23) and q"),
    ({"k": jnp.zeros((2, 3, 45, 24)), "v": jnp.zeros((2, 3, 45, 40))}, ValueError, "q has 2 heads and k 3"),
    ({"v": jnp.zeros((2, 1, 44, 40))}, ValueError, "v has shape (2, 1, 44, 40) and k"),
    ({"q": jnp.zeros((2, 2, 44, 24))}, ValueError, "q has 44 tokens and k 45"),
    ({"planes": jnp.zeros((3, 2, 20))}, ValueError, "planes has shape (3, 2, 20) and q"),
    ({"planes": jnp.zeros((3, 17, 24))}, ValueError, "1 to 16 planes"),
    ({"planes": jnp.zeros((0, 2, 24))}, ValueError, "it needs a table"),
    ({"beta": jnp.zeros(2)}, ValueError, "beta has shape (2,)"),
    ({"mask": jnp.ones((2, 44), bool)}, ValueError, "mask is bool[2, 44]"),
    ({"mask": jnp.ones((2, 45), int)}, ValueError, "it must be bool[2, 45]"),
    ({"implementation": "cuda"}, ValueError, "implementation is 'cuda'"),
]


@pytest.mark.parametrize(("changes", "error", "named"), WRONG)
def test_wrong_arguments_are_named(changes, error, named):
    arrays = {name: array for name, array in draw(ANY["order"]).items() if name != "g"} | changes
    with pytest.raises(error, match=re.escape(named)):
        # Annotations are checked too while tests run; these are the messages of a user who does not.
        inspect.unwrap(race_attention)(**arrays, causal=True)
