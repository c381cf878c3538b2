"""A run that is saved, killed and restored goes on as if nothing had happened, bit for bit."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from hashml.embeddings import EmbeddingTables
from hashml.exchange import load_module, save_module
from hashml.models import (
    DLRM,
    TrainState,
    binary_cross_entropy,
    data_parallel_step,
    init_state,
    sharded_step,
    train_step,
)

SIZES = (9, 30, 4)
EXAMPLES, BATCH = 80, 16
MODEL = DLRM(EmbeddingTables(SIZES, 4), bottom=(8, 4), top=(8, 1))
OPTIMIZER = optax.adam(optax.exponential_decay(0.05, 2, 0.7))  # moments and a count to forget

draw = np.random.default_rng(0)
LOG = {
    "dense": draw.normal(size=(EXAMPLES, 3)).astype(np.float32),
    "ids": np.stack([draw.integers(0, n, EXAMPLES) for n in SIZES], axis=1).astype(np.int32),
    "labels": draw.integers(0, 2, EXAMPLES).astype(np.float32),
}


def loss_fn(variables, batch) -> Any:
    logits = MODEL.apply(variables, batch["dense"], batch["ids"])
    return binary_cross_entropy(jnp.asarray(logits), batch["labels"])


def fresh_state(seed=0) -> TrainState:
    """Parameters from NumPy's generator, which needs no compilation."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), LOG["dense"], LOG["ids"])
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)
    return init_state(params, OPTIMIZER)


def train(step, state, position, count):
    """``count`` steps from ``position`` in the log, which is read round and round; also the losses."""
    losses = []
    for _ in range(count):
        take = np.arange(position, position + BATCH) % EXAMPLES
        state, loss = step(state, {name: column[take] for name, column in LOG.items()})
        position = (position + BATCH) % EXAMPLES
        losses.append(float(loss))
    return state, position, losses


def save(folder, state, position):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"position": position})
            ),
        )
        manager.wait_until_finished()


def restore(folder, like, step=None):
    with ocp.CheckpointManager(folder) as manager:
        saved = manager.restore(
            manager.latest_step() if step is None else step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()),
        )
    return saved.state, saved.data["position"]


@cache
def make_step(kind):
    if kind == "one device":
        return train_step(loss_fn, OPTIMIZER)
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
    return {"shard_map": data_parallel_step, "jit": sharded_step}[kind](loss_fn, OPTIMIZER, mesh)


@pytest.mark.parametrize("kind", ["one device", "shard_map", "jit"])
def test_six_steps_are_three_and_three(tmp_path, kind):
    step = make_step(kind)
    whole, end, losses = train(step, fresh_state(), 0, 6)

    state, position, first = train(step, fresh_state(), 0, 3)
    save(tmp_path / "run", state, position)
    del state

    restored, position = restore(tmp_path / "run", fresh_state(seed=1))
    assert restored.step == 3
    again, found_end, second = train(make_step(kind), restored, position, 3)

    assert first + second == losses
    assert (found_end, int(again.step)) == (end, 6) == (16, 6)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_every_part_of_the_state_matters():
    """The test above would notice a lost position, a lost step count or lost moments."""
    step = make_step("one device")
    state, position, _ = train(step, fresh_state(), 0, 3)
    _, _, expected = train(step, state, position, 3)
    for lossy in [(state, 0), (state._replace(opt_state=fresh_state().opt_state), position)]:
        assert train(step, *lossy, 3)[2] != expected


def test_the_latest_of_several_checkpoints(tmp_path):
    step = make_step("one device")
    state, position = fresh_state(), 0
    for _ in range(3):
        state, position, _ = train(step, state, position, 1)
        save(tmp_path / "run", state, position)
    restored, found = restore(tmp_path / "run", fresh_state(seed=1))
    assert (int(restored.step), found) == (3, position)
    assert restore(tmp_path / "run", fresh_state(seed=1), step=2)[0].step == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    state = fresh_state()
    save(tmp_path / "run", state, 0)
    wider = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, 2), leaf.dtype), state)
    with pytest.raises(ValueError, match="shape"):
        restore(tmp_path / "run", wider)
    other = state._replace(params={"params": {"memory": jnp.ones(3)}})
    with pytest.raises(ValueError, match="do not match"):
        restore(tmp_path / "run", other)


def test_a_missing_checkpoint_is_named(tmp_path):
    save(tmp_path / "run", fresh_state(), 0)
    with pytest.raises(FileNotFoundError, match="7"):
        restore(tmp_path / "run", fresh_state(), step=7)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    state = fresh_state()
    save(tmp_path / "run", state, 0)
    parts = [p for p in (tmp_path / "run" / "0" / "state").rglob("d/*") if p.stat().st_size > 200]
    assert parts
    for part in parts:
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    with pytest.raises(ValueError, match=r"CRC|corrupt|checksum|mismatch"):
        restore(tmp_path / "run", state)


def test_a_trained_model_leaves_as_safetensors_and_comes_back(tmp_path):
    """Exchange, in contrast to resuming: parameters alone, with what they were built for."""
    state, _, _ = train(make_step("one device"), fresh_state(), 0, 3)
    geometry = {"sizes": SIZES, "features": 4, "bottom": (8, 4), "top": (8, 1), "interaction": "dot"}
    save_module(tmp_path / "dlrm.safetensors", state.params["params"], geometry=geometry)
    params, found = load_module(tmp_path / "dlrm.safetensors", geometry=geometry)
    model = DLRM(EmbeddingTables(tuple(found["sizes"]), found["features"]), tuple(found["bottom"]), (8, 1))
    inputs = LOG["dense"][:5], LOG["ids"][:5]
    logits, expected = (
        jax.jit(m.apply)({"params": p}, *inputs) for m, p in [(model, params), (MODEL, state.params["params"])]
    )
    np.testing.assert_array_equal(logits, expected)
