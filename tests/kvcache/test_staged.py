"""One policy for the prompt, another from then on: each is the one alone in its own stage."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.kvcache.ada_kv import AdaKV
from hashml.kvcache.attending import attend, observe
from hashml.kvcache.contract import Policy, Queries
from hashml.kvcache.dense import Dense
from hashml.kvcache.eviction import append, evict
from hashml.kvcache.h2o import HeavyHitters
from hashml.kvcache.keyformer import Keyformer
from hashml.kvcache.prefill import prefill_layer
from hashml.kvcache.scissorhands import Scissorhands
from hashml.kvcache.snap_kv import SnapKV
from hashml.kvcache.spec import LayerSpec
from hashml.kvcache.staged import Staged
from hashml.kvcache.state import LayerCache, LayerTables, all_positions
from hashml.kvcache.streaming import Streaming
from hashml.kvcache.tova import TOVA

H, J, D, PROMPT, STEPS = 2, 2, 4, 16, 12
QUICK = {"xla_backend_optimization_level": 0}
KEYS = jax.random.split(jax.random.key(0), 2)
PAIRS: dict[str, tuple[Policy, Policy]] = {
    "snapkv, scissorhands": (SnapKV(queries=3, kernel=3), Scissorhands(queries=5, drop=2)),
    "streaming, tova": (Streaming(), TOVA()),
}
pairs = pytest.mark.parametrize("name", PAIRS)


def layer_spec(policy: Policy, **changes: Any) -> LayerSpec:
    settings: dict[str, Any] = {"kv_heads": H, "query_heads": H * J, "head_dim": D, "slots": 5, "window": 3}
    settings |= {"key_codec": Dense(), "value_codec": Dense(), "rotary": None, "rope": "none"}
    return LayerSpec(policy=policy, **(settings | changes))


def stream() -> list[jax.Array]:
    shapes = ((2, heads, PROMPT + STEPS, D) for heads in (H * J, H, H))
    return [2 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@functools.cache
def begin(policy: Policy) -> LayerCache:
    """After the prompt."""
    pos = jnp.broadcast_to(jnp.arange(PROMPT, dtype=jnp.int32), (2, PROMPT))
    q, k, v = (x[:, :, :PROMPT] for x in stream())
    run = functools.partial(prefill_layer, layer_spec(policy), LayerTables())
    return jax.jit(run, compiler_options=QUICK)(q, k, v, pos, KEYS)


def go_on(policy: Policy, layer: LayerCache) -> tuple[np.ndarray, LayerCache]:
    """Positions of every later step, and the last layer."""
    spec = layer_spec(policy)

    def step(layer: LayerCache, given: Any) -> tuple[LayerCache, jax.Array]:
        (q, k, v), at = given
        now, head, pos = jnp.full(2, at), (at - PROMPT) % spec.window, jnp.full((2, 1), at)
        layer = evict(spec, LayerTables(), layer, head, now, KEYS)
        layer = append(spec, LayerTables(), layer, head, k[:, :, None], v[:, :, None], pos, now, KEYS)
        _, found = attend(spec, LayerTables(), layer, q[:, :, None], pos)
        layer = observe(spec, layer, found, Queries(pos, KEYS, jnp.full(2, PROMPT)))
        return layer, all_positions(spec, layer)

    later = [jnp.moveaxis(x[:, :, PROMPT:], 2, 0) for x in stream()], jnp.arange(PROMPT, PROMPT + STEPS)
    last, pos = jax.jit(lambda layer: jax.lax.scan(step, layer, later), compiler_options=QUICK)(layer)
    return np.asarray(pos), last


@pairs
def test_the_first_chooses_of_the_prompt_and_the_second_goes_on(name):
    """The prompt's tokens are those of the first alone, all later decisions those of the second alone from there."""
    first, second = PAIRS[name]
    found, alone = begin(Staged(first, second)), begin(first)
    np.testing.assert_array_equal(found.pos, jnp.broadcast_to(alone.pos, found.pos.shape))
    pos, _ = go_on(Staged(first, second), found)
    np.testing.assert_array_equal(pos, go_on(second, found)[0])
    own = begin(second)
    if name != "streaming, tova":
        assert (np.asarray(found.pos) != np.asarray(own.pos)).any(), "the case does not occur"
    # The state of a token is what the second would know of it.
    for b, h, slot in np.ndindex(*found.pos.shape):
        at = np.flatnonzero(np.asarray(own.pos[b, h]) == int(found.pos[b, h, slot]))
        for leaf in found.policy:
            if at.size:
                np.testing.assert_array_equal(found.policy[leaf][b, h, slot], own.policy[leaf][b, h, at[0]])


def test_twice_the_same_is_that_policy():
    policy = Keyformer(new_tokens=9)
    (one, last), (other, alone) = (go_on(p, begin(p)) for p in (Staged(policy, policy), policy))
    np.testing.assert_array_equal(one, other)
    jax.tree.map(np.testing.assert_array_equal, last, alone)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (SnapKV(), TOVA(), "which decides for all heads alike; so must prompt"),
        (HeavyHitters(), Keyformer(), "both read the prompt's column sums, each of its own softmax"),
        (AdaKV(base=4), HeavyHitters(), "prompt is AdaKV.* must be a policy of one stage"),
        (SnapKV(), Staged(SnapKV(), HeavyHitters()), "decode is Staged.* must be a policy of one stage"),
    ],
)
def test_stages_that_do_not_go_together(first, second, message):
    with pytest.raises(ValueError, match=message):
        Staged(first, second)


def test_both_are_checked_by_the_layer():
    with pytest.raises(ValueError, match="drop is 9; it must be at most slots, 5"):
        layer_spec(Staged(SnapKV(), Scissorhands(drop=9)))
