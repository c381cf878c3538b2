"""The encoder of the experiment is the one that ROAST's modules make, and baselines hold no more bytes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from experiments.data import files
from experiments.sharing import roast
from hashml.accounting import stored_bytes
from hashml.models.text_encoder import TextEncoder
from hashml.sharing.roast import RoastDense, RoastEmbed, SharedMemory

CONFIG = roast.SCALES["tiny"]
needs_data = pytest.mark.skipif(files.data_folder() is None, reason="HASHML_DATA is not set")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_function_is_that_of_the_modules(seed):
    contender = roast.shared(CONFIG, "sst2", "global", 10)
    params, constants = jax.tree.map(lambda leaf: leaf[seed], (contender.params, contender.constants))
    tokens = jax.random.randint(jax.random.key(1), (3, CONFIG.length), 0, CONFIG.vocabulary)
    memory = params["memory"]["memory"]
    model = TextEncoder(
        CONFIG.vocabulary,
        2,
        features=CONFIG.features,
        layers=CONFIG.layers,
        heads=CONFIG.heads,
        length=CONFIG.length,
        dense=functools.partial(RoastDense, tile=roast.TILE[10]),
        embed=functools.partial(RoastEmbed, tile=(1, roast.BLOCK)),
        memory=SharedMemory(memory.size, seed=seed, std=CONFIG.features**-0.5),
    )
    initial: Any = model.init(jax.random.key(0), tokens)["params"]
    assert initial["memory"]["memory"].shape == memory.shape
    rest = unflatten_dict(params["dense"])
    found = model.apply({"params": {**rest, "memory": {"memory": memory}}}, tokens)
    np.testing.assert_allclose(contender.apply(params, constants, tokens), jnp.asarray(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["global", "local", "elements"])
def test_weights_start_at_flax_s_scale(method):
    """Within 4 standard errors of as many numbers as the memory holds."""
    contender = roast.shared(CONFIG, "sst2", method, 10)
    for name, memory in contender.params["memory"].items():
        std = CONFIG.features**-0.5 if method != "local" else (64 if name.endswith("down/kernel") else 16) ** -0.5
        assert abs(float(jnp.std(memory)) / std - 1) < 4 / np.sqrt(2 * memory.size), name


def test_small_encoders_fit_the_bytes_and_fill_them():
    floats = 3000
    for model in roast.small_encoders(CONFIG, "sst2", floats):
        tokens = jnp.zeros((1, CONFIG.length), jnp.int32)
        used = stored_bytes(jax.eval_shape(model.init, jax.random.key(0), tokens)) // 4
        assert used <= floats
        assert used > floats - model.features or model.vocabulary == CONFIG.vocabulary


@needs_data
def test_contenders_hold_equal_bytes():
    rows = {method: roast.outcomes(CONFIG, "sst2", method, 10) for method in ("global", "small")}
    assert rows["small"][0]["bytes"] <= rows["global"][0]["bytes"]
