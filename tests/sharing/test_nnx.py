"""The modules carry over to flax.nnx by its bridge: the same rows, and gradients that flow."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hashml.sharing import RobeEmbed


def test_the_bridge_keeps_outputs_and_gradients():
    module, ids = (
        RobeEmbed(10, 6, budget=24, block_size=4, sign="element"),
        np.array([[0, 9, 3], [3, 1, 0]], np.int32),
    )
    bridged: Any = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(ids)
    query = np.ones((2, 6), np.float32)

    @nnx.jit
    def through_the_bridge(bridged):
        gradient = nnx.grad(lambda bridged: (bridged(ids) ** 2).sum())(bridged)
        return bridged(ids), bridged(query, method="attend"), gradient

    @jax.jit
    def straight(memory):
        def apply(memory, inputs, **how) -> Any:
            return module.apply({"params": {"memory": memory}}, inputs, **how)

        gradient = jax.grad(lambda memory: (apply(memory, ids) ** 2).sum())(memory)
        return apply(memory, ids), apply(memory, query, method="attend"), gradient

    rows, logits, gradient = through_the_bridge(bridged)
    expected = straight(bridged.memory[...])
    assert jnp.abs(expected[2]).max() > 0
    for found, one in zip((rows, logits, gradient["memory"][...]), expected, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-6)
