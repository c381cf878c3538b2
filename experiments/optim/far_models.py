"""A text encoder whose perceptrons may be whole, split or adapted, and what each way of fine-tuning trains of it.

    full, scratch   all of it                   scratch begins with random weights
    far             all but the frozen units
    freeze          all but the perceptrons
    bitfit          biases, those of the norms included (Zaken et al. 2022)
    lora            products ``A B`` of a small rank beside all six kernels (Hu et al. 2022)

is what each trains of a block. The head is trained by all, and so is the embedding, or by none (`Recipe.embedding`).
The block is that of `hashml.models.encoder`, and so is the order of what it adds up. The embedding (tables and norm)
is trained by no other. All parts but the perceptron keep for the backward pass what products give and compute the
elementwise rest again, for every method alike: by plain differentiation a norm or a softmax leaves several arrays
where one is enough, and no share of learners could be seen in the sum.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from hashml.models.encoder import EncoderConfig, embed, init_params, layer_norm
from hashml.models.exact_attention import masked_attention
from hashml.optim.far import (
    FeedForward,
    Kept,
    SplitFeedForward,
    feed_forward,
    gelu,
    learner_count,
    split_feed_forward,
    trained_part,
)

Params = dict[str, Any]
"""``{"embedding", "layers": {attention's kernels, norms, "ffn": FeedForward}, "head"}``, layers stacked."""
METHODS = ("full", "far", "freeze", "bitfit", "lora", "scratch")
ADAPTED = ("query", "key", "value", "output", "up", "down")
_TABLES = ("embedding", "positions", "token_types", "embedding_norm", "embedding_norm_bias")
_PERCEPTRON = ("up", "down", "up_bias", "down_bias")


class Recipe(NamedTuple):
    """A way of fine-tuning.

    Attributes:
        method: one of `METHODS`.
        share: learners, of the units of a layer; for ``lora``, the share whose trained parameters it equals.
        kept: by a whole perceptron for the backward pass.
        recompute: whether frozen units are computed again.
        attention: whether attention and the norms are trained.
        embedding: whether the tables and their norm are.
    """

    method: str
    share: float | None = None
    kept: Kept = "hidden"
    recompute: bool = False
    attention: bool = True
    embedding: bool = True


def encoder_config(vocabulary: int, features: int, layers: int, length: int) -> EncoderConfig:
    """Heads of 32 channels, perceptrons four times as wide."""
    return EncoderConfig(
        vocabulary=vocabulary,
        features=features,
        layers=layers,
        heads=max(1, features // 32),
        hidden=4 * features,
        context=length,
        token_types=1,
        pooler=False,
    )


def initial(key: Array, config: EncoderConfig) -> Params:
    """Random weights, without a head."""
    params = init_params(key, config)
    layers = params["layers"]
    layers["ffn"] = FeedForward(**{name: layers.pop(name) for name in _PERCEPTRON})
    return {"embedding": {name: params[name] for name in _TABLES}, "layers": layers}


def with_head(params: Params, key: Array, classes: int) -> Params:
    """The parameters with a classifier drawn anew."""
    features = params["embedding"]["embedding"].shape[1]
    head = {"kernel": 0.02 * jax.random.normal(key, (features, classes)), "bias": jnp.zeros(classes)}
    return params | {"head": head}


def with_adapters(params: Params, key: Array, rank: int) -> Params:
    """The parameters with ``A B = 0`` beside every kernel of a block, A drawn."""
    layers = params["layers"]
    adapters = {}
    for at, name in enumerate(ADAPTED):
        count, inputs, outputs = _kernel(layers, name).shape
        a = jax.random.normal(jax.random.fold_in(key, at), (count, inputs, rank)) / math.sqrt(inputs)
        adapters[name] = (a, jnp.zeros((count, rank, outputs)))
    return params | {"layers": layers | {"adapters": adapters}}


def _kernel(layers: Params, name: str) -> Any:
    return getattr(layers["ffn"], name) if name in ("up", "down") else layers[name]


def equal_rank(config: EncoderConfig, share: float) -> int:
    """Rank of adapters with as many trained parameters as FAR has in a block, to the nearest."""
    d, h = config.features, config.hidden
    units = learner_count(h, share)
    # Kernels and biases of attention, two norms; a column, a row and a bias for each learner, and b2.
    far = 4 * (d * d + d) + 4 * d + units * (2 * d + 1) + (d if units else 0)
    return max(1, round(far / (4 * 2 * d + 2 * (d + h))))


# --- computing --------------------------------------------------------------------------------------


def encode(params: Params, config: EncoderConfig, tokens: Int[Array, "B T"], recipe: Recipe) -> Float[Array, "B T d"]:
    """The last layer's x; token 0 is padding."""
    mask = tokens != 0

    def body(x: Array, layer: Params) -> tuple[Array, None]:
        return block(layer, config, x, mask, recipe), None

    x = embed(params["embedding"], config, tokens)
    return jax.lax.scan(body, x, params["layers"])[0]


def pooled(params: Params, config: EncoderConfig, tokens: Int[Array, "B T"], recipe: Recipe) -> Float[Array, "B d"]:
    """The mean of x over the tokens that are no padding."""
    x = encode(params, config, tokens, recipe)
    weight = (tokens != 0)[..., None].astype(x.dtype)
    return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


def classify(params: Params, config: EncoderConfig, tokens: Int[Array, "B T"], recipe: Recipe) -> Float[Array, "B C"]:
    """Logits from `pooled`."""
    return pooled(params, config, tokens, recipe) @ params["head"]["kernel"] + params["head"]["bias"]


def block(layer: Params, config: EncoderConfig, x: Array, mask: Array, recipe: Recipe) -> Array:
    """Attention and the perceptron, each followed by its norm."""
    x = _attention(layer, config, x, mask)
    return _norm(layer, config, x + perceptron(layer, x, recipe), "mlp_norm")


def _attention(layer: Params, config: EncoderConfig, x: Array, mask: Array) -> Array:
    adapters = layer.get("adapters", {})

    def affine(x: Array, name: str) -> Array:
        return _dense(x, layer[name], adapters.get(name)) + layer[f"{name}_bias"]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def attend(x: Array) -> Array:
        batch, length, _ = x.shape
        q, k, v = (
            affine(x, name).reshape(batch, length, config.heads, -1).transpose(0, 2, 1, 3)
            for name in ("query", "key", "value")
        )
        places = jnp.where(mask, 0, -1)
        mixed = masked_attention(q, k, v, jnp.zeros_like(places), places)
        return affine(mixed.transpose(0, 2, 1, 3).reshape(x.shape), "output")

    return _norm(layer, config, x + attend(x), "attention_norm")


def _norm(layer: Params, config: EncoderConfig, x: Array, name: str) -> Array:
    norm = functools.partial(layer_norm, eps=config.norm_eps)
    return jax.checkpoint(norm)(x, layer[name], layer[f"{name}_bias"])


def perceptron(layer: Params, x: Array, recipe: Recipe) -> Array:
    """Whole, split or adapted, as the layer has it."""
    ffn = layer["ffn"]
    if isinstance(ffn, SplitFeedForward):
        return split_feed_forward(ffn, x, recompute=recipe.recompute)
    if "adapters" in layer:
        return _adapted(ffn, layer["adapters"], x)
    return feed_forward(ffn, x, kept=recipe.kept)


@functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("adapted"))
def _adapted(ffn: FeedForward, adapters: Params, x: Array) -> Array:
    def affine(x: Array, name: str) -> Array:
        return _dense(x, getattr(ffn, name), adapters[name]) + getattr(ffn, f"{name}_bias")

    z = checkpoint_name(affine(x, "up"), "adapted")
    return affine(checkpoint_name(gelu(z), "adapted"), "down")


def _dense(x: Array, kernel: Any, adapter: tuple[Array, Array] | None) -> Array:
    return x @ kernel if adapter is None else x @ kernel + (x @ adapter[0]) @ adapter[1]


# --- what is trained --------------------------------------------------------------------------------


def _trains(recipe: Recipe) -> Callable[[str], bool]:
    """Whether a parameter is trained, by its path."""

    def answer(path: str) -> bool:
        if not path.startswith("['layers']"):
            return recipe.embedding or path.startswith("['head']")
        match recipe.method:
            case "bitfit":
                return "bias" in path
            case "lora":
                return "['adapters']" in path
        if "['ffn']" in path:
            return recipe.method != "freeze" and ".frozen" not in path
        return recipe.attention

    return answer


def divide(params: Params, recipe: Recipe) -> tuple[Params, Params]:
    """What is trained and what is not, each with None in the other's places."""
    trains = _trains(recipe)

    def part(wanted: bool) -> Params:
        def keep(path: Any, leaf: Any) -> Any:
            return leaf if trains(jax.tree_util.keystr(path)) is wanted else None

        return jax.tree_util.tree_map_with_path(keep, params)

    trained, fixed = part(True), part(False)
    if isinstance(params["layers"]["ffn"], SplitFeedForward):
        trained = trained_part(trained)  # as the optimizer's moments, once they are cut
    return trained, fixed


def unite(trained: Params, fixed: Params) -> Params:
    """The inverse of `divide`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, fixed, is_leaf=lambda leaf: leaf is None)


def trained_count(trained: Params) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trained))
