"""Deja Vu: a decode step that reads the heads and neurons its input needs (Liu et al., ICML 2023, arXiv 2310.17157).

For one input few heads and neurons of a trained decoder matter. Small predictors, two linear maps each, name them
from a residual stream of an earlier block, so that the answer is there before it is needed:

    heads(l)   = top K_a of predictor(x[l-1])        attention of these; the others contribute 0
    neurons(l) = top K of predictor(x[l])            relu(w_in[neurons] norm(y)) w_out[neurons]

and a step reads ``2 K d`` weights of a perceptron in place of ``2 ff d``, plus ``r (d + ff)`` of its predictor. What
a predictor looks at is a parameter (`hashml.sparse.residuals`), the same in training and here. With look-ahead 1 the
lists of block l wait for nothing of block l-1, and XLA may work on both at once. Prompts are prefilled densely.

The weights lie by neuron and by head (`sparse_params`), so that what a list names is read in whole lines. Rows of a
batch read their own lists, or the union of all lists once (``batch="union"``), in which every row uses all of it.

Departures: the paper's models have LayerNorm with biases, ours RMSNorm; grouped queries share keys, so that a key
head is skipped only where all its query heads are; per-layer budgets are given, not measured.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from hashml.models.decoder import DecoderConfig, DecoderModel, Params, embed, rms_norm, unembed, unstacked
from hashml.models.generation import DenseState, full_engine
from hashml.sparse.chosen_heads import (
    Ring,
    attend_chosen,
    empty_ring,
    key_heads,
    merge_heads,
    project_heads,
    write_all,
    write_chosen,
)
from hashml.sparse.lists import top_list, union_rows
from hashml.sparse.predictors import Predictor, predict
from hashml.sparse.residuals import Residuals, check_lookahead, check_model, head_query, neuron_query
from hashml_kernels.gathered_mlp import gathered_mlp

KvPolicy = Literal["dense_kv", "lazy_kv"]
Batch = Literal["row", "union"]


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """What a decode step reads; hashable, hence static under `jax.jit`.

    Attributes:
        neurons: K of each layer; a layer with all of them needs no predictor.
        heads: K_a of each layer, query heads; likewise.
        neuron_lookahead, head_lookahead: blocks ahead, 0, 0.5 or 1; see `hashml.sparse.residuals`.
        kv_policy: what becomes of keys and values of heads that are skipped.
        ring: tokens whose attention inputs ``lazy_kv`` keeps.
        batch: whether each row reads its own list, or all rows read the union of theirs.

    Raises:
        ValueError: for another word or look-ahead, budgets below 1 or of unequal length, or an empty ring.
    """

    neurons: tuple[int, ...]
    heads: tuple[int, ...]
    neuron_lookahead: float | int = 0.5
    head_lookahead: float | int = 1
    kv_policy: KvPolicy = "dense_kv"
    ring: int = 16
    batch: Batch = "row"

    def __post_init__(self) -> None:
        check_lookahead("neuron_lookahead", self.neuron_lookahead)
        check_lookahead("head_lookahead", self.head_lookahead)
        for name, allowed in (("kv_policy", get_args(KvPolicy)), ("batch", get_args(Batch))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(repr, allowed))}")
        if self.ring < 1:
            raise ValueError(f"ring is {self.ring}; it is at least 1")
        if len(self.neurons) != len(self.heads):
            raise ValueError(f"heads has {len(self.heads)} layers; neurons has {len(self.neurons)}")
        for name in ("neurons", "heads"):
            if any(count < 1 for count in getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; every layer keeps at least 1")


# --- weights by neuron and by head ----------------------------------------------------------------


def sparse_params(
    params: Params,
    config: DecoderConfig,
    neurons: Predictor | None = None,
    heads: Predictor | None = None,
) -> Params:
    """Parameters of a decoder as a sparse step reads them, with the predictors of all layers.

    Args:
        params: as `hashml.models.decoder.init_params` makes them.
        config: of the decoder, with ReLU.
        neurons, heads: of all layers, from `hashml.sparse.predictors.train_predictors`.

    Returns:
        ``"layers"`` as a tuple, in which ``w_in`` (what the activation is of), ``w_gate`` and ``w_out`` are
        ``[ff, d]``, ``query``, ``key`` and ``value`` ``[heads, d, D]``, ``output`` is ``[heads, D, d]``, and
        predictors are ``neurons`` and ``heads``.

    Raises:
        ValueError: for a decoder that cannot be read sparsely.
    """
    check_model(config)
    old, width = params["layers"], config.head_dim
    new = {name: old[name] for name in ("attention_norm", "mlp_norm")}
    for name in ("query", "key", "value"):
        new[name] = old[name].reshape(*old[name].shape[:2], -1, width).swapaxes(1, 2)
        if config.qkv_bias:
            new[f"{name}_bias"] = old[f"{name}_bias"].reshape(config.layers, -1, width)
    new["output"] = old["output"].reshape(config.layers, config.heads, width, config.features)
    new["w_in"], new["w_out"] = old["gate" if config.gated else "up"].swapaxes(1, 2), old["down"]
    if config.gated:
        new["w_gate"] = old["up"].swapaxes(1, 2)
    tree: Params = new | {name: made for name, made in (("neurons", neurons), ("heads", heads)) if made is not None}
    return unstacked(params | {"layers": tree})


def dense_layer(weights: Params) -> Params:
    """One layer of `sparse_params` as `hashml.models.decoder.layer` reads it."""
    dense = {name: weights[name] for name in ("attention_norm", "mlp_norm")}
    for name in ("query", "key", "value"):
        dense[name] = weights[name].swapaxes(0, 1).reshape(weights[name].shape[1], -1)
        if f"{name}_bias" in weights:
            dense[f"{name}_bias"] = weights[f"{name}_bias"].reshape(-1)
    dense["output"] = weights["output"].reshape(-1, weights["output"].shape[-1])
    gated = "w_gate" in weights
    dense["up"], dense["down"] = weights["w_gate" if gated else "w_in"].T, weights["w_out"]
    return dense | ({"gate": weights["w_in"].T} if gated else {})


# --- a step ---------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """A list of heads or neurons: ``[B, K]``, or ``[K]`` for all rows; ``valid`` is ``None`` where all count."""

    idx: Int32[Array, "*B K"]
    valid: Bool[Array, "*B K"] | None


def choose(predictor: Predictor | None, query: Float[Array, "B d"], count: int, total: int, batch: Batch) -> Chosen:
    """What a predictor names for each row, or for the batch; all where all are kept, without asking it.

    Raises:
        ValueError: for no predictor where it is needed, or more than there are.
    """
    if count > total:
        raise ValueError(f"count is {count}; a layer has {total}")
    if count == total:
        return Chosen(jnp.arange(total, dtype=jnp.int32), None)
    if predictor is None:
        raise ValueError(f"predictor is None; {count} of {total} are chosen by one, see sparse_params")
    lists = top_list(predict(predictor, query), count)
    if batch == "row" and len(lists) > 1:
        return Chosen(lists, None)
    # One row is its own union, and its weights are read without copies of a batch.
    return Chosen(lists[0], None) if len(lists) == 1 else Chosen(*union_rows(lists, total))


class State(NamedTuple):
    """Keys and values as the dense engine has them, and of ``lazy_kv`` a ring for each layer."""

    dense: DenseState
    rings: tuple[Ring, ...]


class Lists(NamedTuple):
    """What each layer of a step has read."""

    heads: tuple[Chosen, ...]
    neurons: tuple[Chosen, ...]


def sparse_step(
    config: DecoderConfig, sparsity: Sparsity, params: Params, state: State, token: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], State, Lists]:
    """One token of each row: logits of the next, the state, and what was read.

    Raises:
        ValueError: for budgets of another number of layers, or beyond the model's.
    """
    _check(config, sparsity)
    dense = state.dense
    now, slot = dense.length[:, None], dense.slot
    positions = jax.lax.dynamic_update_slice(dense.positions, now, (0, slot))
    x = embed(params, config, token[:, None])[:, 0]
    residuals = Residuals(x, None, x, x)
    caches, rings, heads, neurons = [], [], [], []
    for index, weights in enumerate(params["layers"]):
        query = head_query(residuals, sparsity.head_lookahead)
        read = choose(weights.get("heads"), query, sparsity.heads[index], config.heads, sparsity.batch)
        u = rms_norm(residuals.x, weights["attention_norm"], config.norm_eps)
        k, v = dense.k[index], dense.v[index]
        if sparsity.kv_policy == "dense_kv":
            k, v = write_all(weights, config, k, v, u, now, slot)
        else:
            named = key_heads(config, read.idx, read.valid, token.shape[0])
            k, v, ring = write_chosen(weights, config, k, v, state.rings[index], u, named, positions, slot)
            rings.append(ring)
        q = project_heads(weights, "query", u[:, None], read.idx)
        q = q if config.rotary is None else config.rotary.rotate(q, now[:, None])
        out = attend_chosen(config, q, k, v, read.idx, now, positions)
        y = residuals.x + merge_heads(weights, out, *read)
        residuals = residuals._replace(y=y)
        query = neuron_query(residuals, sparsity.neuron_lookahead)
        fired = choose(weights.get("neurons"), query, sparsity.neurons[index], config.hidden, sparsity.batch)
        u = rms_norm(y, weights["mlp_norm"], config.norm_eps)
        x = y + gathered_mlp(u, weights["w_in"], weights["w_out"], *fired, w_gate=weights.get("w_gate"))
        residuals = Residuals(x, None, residuals.x, y)
        caches.append((k, v))
        heads.append(read)
        neurons.append(fired)
    k, v = zip(*caches, strict=True)
    dense = DenseState(k, v, dense.previous, positions, dense.length + 1, slot + 1)
    logits = unembed(params, config, residuals.x[:, None])[:, 0]
    return logits, State(dense, tuple(rings)), Lists(tuple(heads), tuple(neurons))


@dataclasses.dataclass(frozen=True)
class DejaVuEngine:
    """What `deja_vu_engine` returns, an engine of `hashml.models.generation` for parameters of `sparse_params`."""

    prefill: Callable[[Params, Array, Array], tuple[Array, State]]
    step: Callable[[Params, State, Array], tuple[Array, State]]
    capacity: int


@functools.lru_cache(maxsize=64)
def deja_vu_engine(model: DecoderModel, sparsity: Sparsity, capacity: int) -> DejaVuEngine:
    """Prompts in full, then sparse steps: ``generate(model, sparse_params(...), ..., cache=deja_vu_engine(...))``.

    Args:
        model: a decoder with ReLU.
        sparsity: what a step reads.
        capacity: tokens a row, the prompt's columns included.

    Raises:
        ValueError: for a decoder that cannot be read sparsely, or budgets that do not fit it.
    """
    config = model.config
    _check(config, sparsity)
    whole = full_engine(model, capacity)

    def prefill(params: Params, tokens: Array, positions: Array) -> tuple[Array, State]:
        dense = params | {"layers": tuple(map(dense_layer, params["layers"]))}
        logits, state = whole.prefill(dense, tokens, positions)
        lazy = config.layers if sparsity.kv_policy == "lazy_kv" else 0
        dtype = params["embedding"].dtype
        return logits, State(state, tuple(empty_ring(len(tokens), config, sparsity.ring, dtype) for _ in range(lazy)))

    def step(params: Params, state: State, token: Array) -> tuple[Array, State]:
        return sparse_step(config, sparsity, params, state, token)[:2]

    return DejaVuEngine(prefill, step, capacity)


def _check(config: DecoderConfig, sparsity: Sparsity) -> None:
    check_model(config)
    for name, kept, total in (("neurons", sparsity.neurons, config.hidden), ("heads", sparsity.heads, config.heads)):
        if len(kept) != config.layers:
            raise ValueError(f"{name} has {len(kept)} layers; the model has {config.layers}")
        if max(kept) > total:
            raise ValueError(f"{name} is {kept}; a layer has {total}")


def uniform_sparsity(config: DecoderConfig, neurons: float | int, heads: float | int, **options: Any) -> Sparsity:
    """The same share of neurons and of query heads in every layer, at least one of each.

    Args:
        config: of the model.
        neurons, heads: shares, above 0 and at most 1.
        options: the other fields of `Sparsity`.

    Raises:
        ValueError: for shares outside of these.
    """
    for name, share in (("neurons", neurons), ("heads", heads)):
        if not 0 < share <= 1:
            raise ValueError(f"{name} is {share}; a share lies above 0 and at most at 1")
    counts = (max(1, round(share * total)) for share, total in ((neurons, config.hidden), (heads, config.heads)))
    kept_neurons, kept_heads = ((count,) * config.layers for count in counts)
    return Sparsity(kept_neurons, kept_heads, **options)
