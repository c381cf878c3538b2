"""A module with one memory: outputs, gradients, bytes, and what goes through untouched."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from hashml.accounting import stored_bytes
from hashml.exchange import ExchangeError, load_module, save_module
from hashml.models.training import data_parallel_value_and_grad, init_state, train_step
from hashml.sharing.share import from_geometry, share

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
MAPS: list[dict[str, Any]] = [dict(map="fold"), dict(map="element"), dict(map="block", block_size=8)]
MAPS += [dict(map="tile", tile=(4, 8)), dict(map="fold", sign="none")]


class MLP(nn.Module):
    widths: tuple[int, ...] = (32, 32, 4)

    @nn.compact
    def __call__(self, x, train: bool = False):
        for width in self.widths[:-1]:
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(self.widths[-1])(x)

    def encode(self, x):
        return self(x) * 2


class Encoder(nn.Module):
    """One layer as in BERT; the output reads the embedding again."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 16)
        x = embed(ids) + self.param("positions", nn.initializers.normal(0.02), (ids.shape[1], 16))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(num_heads=2)(x))
        x = nn.LayerNorm()(x + nn.Dense(16)(nn.gelu(nn.Dense(32)(x))))
        return embed.attend(x)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), use_bias=False)(nn.relu(x)))
        return nn.Dense(4)((x + y).mean((1, 2)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(12)(x)), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(MLP, static_argnums=(2,))()(x, False)


MODELS: dict[str, tuple[nn.Module, Any]] = {
    "mlp": (MLP(), X),
    "encoder": (Encoder(), np.arange(16).reshape(2, 8) * 3),
    "resnet": (ResNet(), np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype(np.float32)),
    "scan": (Scanned(), X),
    "scan of remat": (Scanned(remat=True), X),
    "remat": (Remat(), X),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    module, x = MODELS[request.param]
    return module, x, module.init(KEY, x)


def mutable(variables) -> Any:
    return [name for name in variables if name != "params"]


def loss(module, variables, x) -> Any:
    return lambda params: (module.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0] ** 2).mean()


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_compression_one_is_the_dense_model_bit_for_bit(model):
    module, x, dense = model
    shared = share(module, dense, compression=1, min_size=64)
    variables = shared.init(KEY, x)
    assert shared.one_to_one
    assert shared.compression == 1
    assert_trees_equal(shared.to_dense(variables), dense)
    output, state = shared.apply(variables, x, mutable=mutable(dense))
    expected, expected_state = module.apply(dense, x, mutable=mutable(dense))
    np.testing.assert_array_equal(output, expected)
    assert_trees_equal(state, expected_state)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_expanded_model(model, recompute):
    """With the chain rule written out: the memory's is the transpose applied to the dense gradient."""
    module, x, dense = model
    shared = share(module, dense, budget=101, min_size=64, recompute=recompute)
    variables = shared.init(KEY, x)
    full = shared.to_dense(variables)
    value, gradient = jax.jit(jax.value_and_grad(loss(shared, variables, x)))(variables["params"])
    expected, dense_gradient = jax.jit(jax.value_and_grad(loss(module, full, x)))(full["params"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    _, pull = jax.vjp(lambda params: shared.to_dense({"params": params})["params"], variables["params"])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(pull(dense_gradient)[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + np.abs(b).max()))


@pytest.mark.parametrize("options", MAPS, ids=str)
def test_each_map_reads_what_it_says(options):
    """Expanding the memory's own indices gives slots, whose numbers are the load."""
    module, dense = MLP(), MLP().init(KEY, X)
    shared = share(module, dense, budget=64, init_std=0.5, **options)
    index = jnp.arange(1, 65, dtype=jnp.float32)
    variables = shared.init(KEY, X)
    for leaf, array in zip(shared.leaves, shared.expand(index), strict=True):
        slots = np.rint(np.abs(np.asarray(array)) / leaf.scale).astype(int) - 1
        load = np.bincount(slots.reshape(-1), minlength=64)
        np.testing.assert_array_equal(load, shared.placement.load(leaf.shape, leaf.offset))
        signs = np.sign(array)
        assert (signs == 1).all() if options.get("sign") == "none" else abs(signs.mean()) < 4 * signs.size**-0.5
    # Least squares: expanding and collapsing again changes nothing, and is exact where all slots are read.
    again = shared.from_dense(shared.to_dense(variables))
    used = sum(shared.placement.load(leaf.shape, leaf.offset) for leaf in shared.leaves) > 0
    np.testing.assert_allclose(
        again["params"]["memory"][used], variables["params"]["memory"][used], rtol=1e-4, atol=1e-6
    )
    assert (np.asarray(again["params"]["memory"])[~used] == 0).all()


@pytest.mark.parametrize("map", ["fold", "element"])
def test_arrays_have_the_spread_of_their_initial_weights(map):
    """Within four standard errors of a normal's, ``1 / sqrt(2 budget)``, at any spread of the memory."""
    dense = MLP().init(KEY, X)
    for init_std in (1e-3, 1.0, 7.0):
        shared = share(MLP(), dense, budget=800, map=map, init_std=init_std)
        params = shared.init(KEY, X)["params"]
        assert abs(np.std(params["memory"]) / init_std - 1) < 4 / np.sqrt(2 * 800)
        for leaf, array in zip(shared.leaves, shared.expand(params["memory"]), strict=True):
            own = np.asarray(dense["params"][leaf.path[0]][leaf.path[1]])
            assert leaf.scale == pytest.approx(own.std() / init_std, rel=1e-5)
            assert abs(np.std(array) / own.std() - 1) < 4 / np.sqrt(2 * min(800, own.size))


@pytest.mark.parametrize("compression", [1, 2.5, 4])
def test_compression_is_of_bytes_and_counts_what_stays_dense(model, compression):
    module, x, dense = model
    shared = share(module, dense, compression=compression, min_size=64)
    params = shared.init(KEY, x)["params"]
    stored = stored_bytes(params)
    assert stored == shared.stored_bytes
    assert stored_bytes(dense["params"]) == shared.dense_bytes == sum(row.dense_bytes for row in shared.report())
    # The greatest memory that compresses as much: four bytes more would be too many.
    assert stored <= shared.dense_bytes / compression < stored + 4
    for row in shared.report():
        assert (row.stored == "shared") == (row.scale is not None)


def test_what_stays_dense():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.param("table", lambda key: jnp.arange(400).reshape(20, 20))
            gates = self.param("gates", nn.initializers.ones, (20, 20))
            small = self.param("small", nn.initializers.normal(), (3, 3))
            half = self.param("half", nn.initializers.normal(), (20, 20), jnp.bfloat16)
            return x * (table.sum() + gates.sum() + small.sum() + half.sum() + nn.Dense(40)(x).sum())

    dense = Mixed().init(KEY, X)
    shared = share(Mixed(), dense, budget=50)
    assert {row.name for row in shared.report() if row.stored == "shared"} == {"half", "Dense_0/kernel"}
    variables = shared.init(KEY, X)
    assert variables["params"]["dense"]["table"].dtype == jnp.int32
    full = shared.to_dense(variables)["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), full) == jax.tree.map(
        lambda a: (a.shape, a.dtype), dense["params"]
    )
    chosen = share(Mixed(), dense, budget=50, choose=lambda path, leaf: path == ("half",))
    assert [leaf.path for leaf in chosen.leaves] == [("half",)]
    assert chosen.dtype == "bfloat16"


def test_names_are_put_in_their_natural_order():
    """So that a geometry does not depend on how a mapping happens to be sorted."""
    dense: Any = MLP((16,) * 12).init(KEY, np.ones((1, 16), np.float32))
    names = [leaf.path[0] for leaf in share(MLP((16,) * 12), dense, budget=50).leaves]
    assert names == [f"Dense_{i}" for i in range(12)]
    backwards = {"params": dict(reversed(dense["params"].items()))}
    assert share(MLP((16,) * 12), backwards, budget=50) == share(MLP((16,) * 12), dense, budget=50)


@pytest.mark.parametrize("recompute", [False, True])
def test_keys_and_methods_pass_through(recompute):
    dense = MLP().init(KEY, X)
    shared = dataclasses.replace(share(MLP(), dense, compression=1), recompute=recompute)
    variables = shared.init(KEY, X)
    rngs = {"dropout": jax.random.key(7)}
    found = shared.apply(variables, X, train=True, rngs=rngs)
    np.testing.assert_array_equal(found, MLP().apply(dense, X, train=True, rngs=rngs))
    np.testing.assert_array_equal(shared.apply(variables, X, method="encode"), MLP().apply(dense, X, method="encode"))
    output, state = shared.apply(variables, X, capture_intermediates=True, mutable=True)
    np.testing.assert_array_equal(output, state["intermediates"]["__call__"][0])
    assert "params" not in state
    np.testing.assert_array_equal(shared.init_with_output({"params": KEY}, X)[0], MLP().apply(dense, X))


def test_many_keys_in_one_program():
    shared = share(MLP(), MLP().init(KEY, X), budget=50)
    keys = jax.random.split(KEY, 3)
    stacked = jax.jit(jax.vmap(shared.init, (0, None)))(keys, X)
    outputs = jax.vmap(shared.apply, (0, None))(stacked, X)
    for key, output in zip(keys, outputs, strict=True):
        np.testing.assert_allclose(output, shared.apply(shared.init(key, X), X), rtol=1e-4, atol=1e-6)


def test_geometry_goes_with_the_file(tmp_path):
    dense = MLP().init(KEY, X)
    shared = share(MLP(), dense, compression=4, seed=3)
    variables = shared.init(KEY, X)
    save_module(tmp_path / "mlp.safetensors", variables["params"], geometry=shared.geometry)
    params, geometry = load_module(tmp_path / "mlp.safetensors", geometry=shared.geometry)
    again = from_geometry(MLP(), geometry)
    assert again == shared
    np.testing.assert_array_equal(again.apply({"params": params}, X), shared.apply(variables, X))
    for other in (
        share(MLP(), dense, compression=4, seed=4),
        share(MLP(), dense, budget=shared.budget, map="element"),
    ):
        with pytest.raises(ExchangeError, match="geometry disagrees"):
            load_module(tmp_path / "mlp.safetensors", geometry=other.geometry)


def test_a_saved_run_goes_on_bit_for_bit(tmp_path):
    """Four steps are two, a checkpoint, and two; memory and momentum are plain leaves of the state."""
    shared = share(MLP(), MLP().init(KEY, X), budget=60)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss_fn(params, x) -> Any:
        return (shared.apply({"params": params}, x) ** 2).mean()

    step = train_step(loss_fn, optimizer)
    state = expected = init_state(shared.init(KEY, X)["params"], optimizer)
    for _ in range(4):
        expected, _ = step(expected, X)
    for _ in range(2):
        state, _ = step(state, X)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(int(state.step), args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        fresh = init_state(shared.init(jax.random.key(1), X)["params"], optimizer)
        state = manager.restore(2, args=ocp.args.StandardRestore(fresh))
    for _ in range(2):
        state, _ = step(state, X)
    assert_trees_equal(state, expected)


def test_only_the_memory_and_the_rest_travel():
    """Over eight devices: the gradient of one, and an all-reduce of as many numbers as are stored."""
    shared = share(MLP(), MLP().init(KEY, X), budget=60)
    params = shared.init(KEY, X)["params"]
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])

    def loss_fn(params, x) -> Any:
        return (shared.apply({"params": params}, x) ** 2).mean()

    transform = data_parallel_value_and_grad(loss_fn, mesh)
    found, expected = transform(params, X), jax.value_and_grad(loss_fn)(params, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    compiled = jax.jit(transform).lower(params, X).compile()
    assert reduced_floats(compiled.as_text() or "") == 1 + stored_bytes(params) // 4  # 1: the loss


def reduced_floats(text: str) -> int:
    """Numbers that all-reduces of a compiled program add up."""
    total = 0
    for line in text.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) all-reduce(?:-start)?\(", line)
        for shape in re.findall(r"f32\[([\d,]*)\]", found[1]) if found else []:
            total += int(np.prod([int(n) for n in shape.split(",") if n]))
    return total


def test_residuals_hold_no_expanded_array():
    """Of 12 layers of 256 floats each, a gradient keeps the memory and activations; without, all layers."""
    module, x = MLP((16,) * 13), np.ones((1, 16), np.float32)
    shared = share(module, module.init(KEY, x), budget=100, min_size=256)
    params = shared.init(KEY, x)["params"]

    def kept(shared) -> int:
        _, pull = jax.vjp(lambda params: shared.apply({"params": params}, x), params)
        return sum(leaf.size == 256 for leaf in jax.tree.leaves(pull))

    assert kept(shared) >= 12
    assert kept(dataclasses.replace(shared, recompute=True)) == 0


def test_layers_exist_one_after_another():
    """Where the compiler orders for memory; the one for CPUs does so on request."""
    module, x = MLP((256,) * 12), np.ones((8, 256), np.float32)
    shared = share(module, module.init(KEY, x), budget=8000, recompute=True)
    params = shared.init(KEY, x)["params"]

    def loss(params, x) -> Any:
        return (shared.apply({"params": params}, x) ** 2).sum()

    options: Any = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile(compiler_options=options)
    analysis: Any = compiled.memory_analysis()
    assert shared.dense_bytes > 3_000_000
    assert analysis.temp_size_in_bytes < 0.6 * shared.dense_bytes


def test_an_adam_step_moves_the_memory():
    shared = share(MLP(), MLP().init(KEY, X), budget=60)
    params, optimizer = shared.init(KEY, X)["params"], optax.adam(0.1)
    gradient = jax.grad(loss(shared, {}, X))(params)
    updates: Any = optimizer.update(gradient, optimizer.init(params), params)[0]
    assert float(jnp.abs(updates["memory"]).min()) > 0.05  # every slot is read


class Empty(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


REFUSED = [
    (dict(compression=0.5), ValueError, "compression is 0.5; it must be finite, and at least 1"),
    (dict(budget=0), ValueError, "budget is 0; it must be at least 1"),
    (dict(budget=5, compression=2), ValueError, "give exactly one of budget (got 5) and compression (got 2)"),
    (dict(), ValueError, "give exactly one of budget (got None) and compression (got None)"),
    (dict(compression=100), ValueError, "784 stay dense, so that it must be at most"),
    (dict(budget=9, map="rope"), ValueError, "map is 'rope'; it must be 'fold', 'element', 'block' or 'tile'"),
    (dict(budget=9, sign="both"), ValueError, "sign is 'both'; it must be 'element' or 'none'"),
    (dict(budget=9, map="block", block_size=10), ValueError, "budget is 9; with map 'block' it must hold 10"),
    (dict(budget=9, map="tile"), ValueError, "budget is 9; with map 'tile' it must hold 1024"),
    (dict(budget=9, init_std=0.0), ValueError, "init_std is 0.0; it must be positive and finite"),
    (dict(budget=9, min_size=10**6), ValueError, "none of the module's 6 arrays is shared"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_is_refused_by_name(options, error, message):
    function = getattr(share, "__wrapped__", share)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - its type and text follow
        function(MLP(), MLP().init(KEY, X), **options)
    kind = type(raised.value).__name__
    if kind != "TypeCheckError":  # the annotations' own check, on in tests, comes first
        assert (type(raised.value), message in str(raised.value)) == (error, True), raised.value


def test_other_modules_and_variables_are_refused():
    with pytest.raises(ValueError, match="variables has no 'params'"):
        share(Empty(), Empty().init(KEY, X), budget=9)
    dense = MLP().init(KEY, X)
    shared = share(MLP(), dense, budget=60)
    variables = shared.init(KEY, X)
    with pytest.raises(ValueError, match=r"params\['memory'\] is missing"):
        shared.apply(dense, X)
    with pytest.raises(ValueError, match=r"of shape \(60,\); this geometry has a memory of shape \(61,\)"):
        share(MLP(), dense, budget=61).apply(variables, X)
    with pytest.raises(ValueError, match="this geometry has"):
        shared.apply({"params": {"memory": variables["params"]["memory"]}}, X)
    with pytest.raises(ValueError, match=r"params\['Dense_0/kernel'\] is of shape \(7, 32\)"):
        shared.from_dense(MLP().init(KEY, X[:, :7]))
    with pytest.raises(ValueError, match="mutable is 'params'"):
        shared.apply(variables, X, mutable="params")
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda dense: share(MLP(), dense, budget=60).init(KEY, X))(dense)
