"""REFRAG's choice of the chunks to expand, learned from the decoder's own loss (Lin et al. 2025, arXiv 2509.01092).

    s = policy(c)                                                 one logit a chunk, from kept vectors alone
    pi(l[t] = i) = exp(s[i]) / sum of exp(s[j]) over j not in l[:t]             T' draws without replacement
    r = log-probability of the next tokens, chunks l being expanded;    A = (r - mean) / std over G draws

and the policy is trained by PPO's clipped objective on A, GRPO's advantage (Shao et al. 2024). Logits are computed
once, only the mask changes; the draw is one `top_k` of logits with Gumbel noise, which has the same law as drawing
one by one (Yellott 1977). Greedy choice is the T' largest logits. The decoder is not trained here, the reward has no
gradient, and neither policy nor draw sees the tokens that are rewarded.

Departures: the question may be one more vector of the policy's input, which then compares it with every chunk;
without it no policy can know what will be asked. There are no positions: permuted chunks have permuted logits.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from hashml.models.decoder import DecoderConfig, Params
from hashml.models.refrag import forward_embedded, output_log_probs
from hashml.models.text_encoder import EncoderBlock
from hashml.models.training import TrainState

AnyArray = Array | np.ndarray
ABSENT = -1e30
"""The logit of a chunk that cannot be chosen: finite, and probability 0 in float32."""


def _masked(logits: Array, present: Any) -> Array:
    logits = logits.astype(jnp.float32)
    return logits if present is None else jnp.where(present, logits, ABSENT)


def _check(logits: Any, count: int) -> None:
    if not 0 <= count <= logits.shape[-1]:
        raise ValueError(f"count is {count}; it is from 0 to the {logits.shape[-1]} chunks")


def greedy_selection(
    logits: Float[Array, "*B L"], count: int, present: Bool[AnyArray, "*B L"] | None = None
) -> Int[Array, "*B {count}"]:
    """The chunks of the largest logits, the largest first.

    Raises:
        ValueError: for more chunks than there are, or fewer than 0.
    """
    _check(logits, count)
    return jax.lax.top_k(_masked(logits, present), count)[1]


def sampled_selection(
    key: Array, logits: Float[Array, "*B L"], count: int, present: Bool[AnyArray, "*B L"] | None = None
) -> Int[Array, "*B {count}"]:
    """Chunks drawn one after the other without replacement, in the order of the draws; equal logits draw uniformly.

    Where fewer are present than are drawn, absent ones follow the present, and `layout` gives these no position.

    Raises:
        ValueError: for more chunks than there are, or fewer than 0.
    """
    _check(logits, count)
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    return jax.lax.top_k(_masked(logits, present) + noise, count)[1]


def selection_log_prob(
    logits: Float[Array, "*B L"], chosen: Int[AnyArray, "*B t"], present: Bool[AnyArray, "*B L"] | None = None
) -> Float[Array, "*B"]:
    """Log-probability of drawing these chunks in this order."""
    logits = _masked(logits, present)
    drawn = jax.nn.one_hot(chosen, logits.shape[-1])
    gone = jnp.cumsum(drawn, axis=-2) - drawn > 0
    left = jnp.where(gone, ABSENT, logits[..., None, :])
    terms = (drawn * left).sum(axis=-1) - jax.nn.logsumexp(left, axis=-1)
    if present is not None:  # what is drawn beyond the present ones was no choice
        terms = jnp.where((drawn * jnp.asarray(present)[..., None, :]).sum(axis=-1) > 0, terms, 0.0)
    return terms.sum(axis=-1)


def group_advantages(rewards: Float[Array, "G *B"], eps: float = 1e-6) -> Float[Array, "G *B"]:
    """``(r - mean) / (std + eps)`` over the group, the leading axis; exactly 0 where all rewards are equal.

    Raises:
        ValueError: for a group of fewer than 2.
    """
    if rewards.shape[0] < 2:
        raise ValueError(f"rewards has a group of {rewards.shape[0]}; a baseline needs at least 2")
    # A mean of equal numbers may differ from them in the last bit, that of zeros does not.
    shifted = rewards - rewards[:1]
    return (shifted - shifted.mean(axis=0)) / (shifted.std(axis=0) + eps)


def clipped_loss(
    log_prob: Float[Array, "*B"], old_log_prob: Float[Array, "*B"], advantages: Float[Array, "*B"], clip: float = 0.2
) -> Float[Array, ""]:
    """Minus PPO's objective, the mean of ``min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)``.

    Raises:
        ValueError: for a clip outside (0, 1).
    """
    if not 0 < clip < 1:
        raise ValueError(f"clip is {clip}; it is above 0 and below 1")
    ratio = jnp.exp(log_prob - jax.lax.stop_gradient(old_log_prob))
    advantages = jax.lax.stop_gradient(advantages)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages).mean()


def policy_step(
    apply: Callable[..., Float[Array, "B L"]],
    optimizer: optax.GradientTransformation,
    reward: Callable[..., Float[Array, " B"]],
    *,
    count: int,
    group: int = 8,
    clip: float = 0.2,
    epochs: int = 2,
) -> Callable[[TrainState, Array, Any, Any], tuple[TrainState, Float[Array, ""]]]:
    """The jitted ``step(state, key, inputs, arguments) -> (state, mean reward)``.

    Args:
        apply: ``apply(params, *inputs) -> logits``.
        optimizer: of the policy's parameters.
        reward: ``reward(chosen [B, T'], *arguments)``; nothing is differentiated through it.
        count: chunks to expand, T'.
        group: draws for each input, G.
        clip: of the ratio.
        epochs: updates on the same draws; the clip matters from the second on.

    Raises:
        ValueError: for fewer epochs than 1, or a group of fewer than 2.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it is at least 1")
    if group < 2:
        raise ValueError(f"group is {group}; a baseline needs at least 2")

    @jax.jit
    def step(state: TrainState, key: Array, inputs: Any, arguments: Any) -> tuple[TrainState, Array]:
        logits = apply(state.params, *inputs)
        drawn = jax.vmap(lambda k: sampled_selection(k, logits, count))(jax.random.split(key, group))
        old = jax.vmap(lambda chosen: selection_log_prob(logits, chosen))(drawn)
        # One draw of the group after the other: a batch of all would hold G times the activations.
        rewards = jax.lax.stop_gradient(jax.lax.map(lambda chosen: reward(chosen, *arguments), drawn))
        advantages = group_advantages(rewards)

        def loss(params: Any) -> Array:
            logits = apply(params, *inputs)
            now = jax.vmap(lambda chosen: selection_log_prob(logits, chosen))(drawn)
            return clipped_loss(now, old, advantages, clip)

        params, opt_state = state.params, state.opt_state
        for _ in range(epochs):
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return TrainState(params, opt_state, state.step + 1), rewards.mean()

    return step


def chunk_nll(decoder: Params, config: DecoderConfig, chunks: Int[AnyArray, "N k"], first: int) -> Float[Array, " N"]:
    """Nats a token of each chunk on its own behind the token ``first``: the paper's heuristic expands the largest.

    Raises:
        ValueError: for a first token outside the vocabulary.
    """
    if not 0 <= first < config.vocabulary:
        raise ValueError(f"first is {first}; allowed are ids from 0 to {config.vocabulary - 1}")
    tokens = jnp.asarray(chunks)
    fed = jnp.concatenate([jnp.full((tokens.shape[0], 1), first, tokens.dtype), tokens[:, :-1]], axis=1)
    positions = jnp.broadcast_to(jnp.arange(fed.shape[1], dtype=jnp.int32), fed.shape)
    logits = forward_embedded(decoder, config, decoder["embedding"][fed], positions)
    return -output_log_probs(logits, tokens).mean(axis=1)


class ChunkPolicy(nn.Module):
    """Logits of chunks from their vectors: a transformer over the chunks, then ``s[i] = w . h[i]``.

    With a question, a vector of the same kind that goes through the layers beside the chunks,
    ``s[i] = w . h[i] + h[i] . M h[question] / sqrt(width)``. The last maps begin at zero: all chunks alike.

    Attributes:
        features: width.
        layers, heads: of the transformer, whose perceptrons are four times as wide as it is.
    """

    features: int = 128
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(
        self,
        c: Float[Array, "B L w"],
        question: Float[Array, "B w"] | None = None,
        present: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L"]:
        batch, chunks, width = c.shape
        mask = jnp.ones((batch, chunks), bool) if present is None else present
        rows = c
        if question is not None:
            marked = question + self.param("question", nn.initializers.normal(1.0), (width,))
            rows = jnp.concatenate([c, marked[:, None]], axis=1)
            mask = jnp.concatenate([mask, jnp.ones((batch, 1), bool)], axis=1)
        x = nn.Dense(self.features, name="in")(nn.LayerNorm(use_bias=False, name="norm_in")(rows))
        for index in range(self.layers):
            x = EncoderBlock(self.heads, 4 * self.features, name=f"block_{index}")(x, mask)
        x = nn.LayerNorm(use_bias=False, name="norm")(x)
        h = x[:, :chunks]
        logits = nn.Dense(1, kernel_init=nn.initializers.zeros, name="logit")(h)[..., 0]
        if question is not None:
            compared = nn.Dense(self.features, use_bias=False, kernel_init=nn.initializers.zeros, name="compare")
            logits = logits + jnp.einsum("blf,bf->bl", h, compared(x[:, -1])) / self.features**0.5
        return logits
