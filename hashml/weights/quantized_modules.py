"""Quantised models as Flax modules: float arrays in ``params``, codes and zeros in ``codes``.

    model = quantize_decoder(params, config, tokens, spec)
    QuantizedDecoder(config, spec.grid).apply(module_variables(model.params), tokens)

Every product with a kernel of a layer reads codes (`hashml.weights.quantized_dense`). Gradients by ``params`` reach
tables and scales, embedding, norms and biases; codes and zeros are integers, for which JAX has none.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from hashml.models import decoder, encoder
from hashml.models.decoder import DecoderConfig
from hashml.models.encoder import EncoderConfig
from hashml.weights.grids import GridSpec
from hashml.weights.quantize_model import Config, Params, kernel_groups
from hashml.weights.quantized import QuantizedMatrix, matmul
from hashml.weights.quantized_dense import draw_matrix
from hashml.weights.quantized_layers import arrays_of, kernel_of

_INTEGERS = ("codes", "zeros")


def module_variables(params: Params) -> dict[str, Any]:
    """Variables of a `QuantizedDecoder` or `QuantizedEncoder` from the tree that `quantize_decoder` or
    `quantize_encoder` makes."""
    kernels = {name: arrays_of(leaf) for name, leaf in params["layers"].items() if isinstance(leaf, QuantizedMatrix)}
    floats = {
        name: {kind: array for kind, array in own.items() if kind not in _INTEGERS} for name, own in kernels.items()
    }
    codes = {name: {kind: array for kind, array in own.items() if kind in _INTEGERS} for name, own in kernels.items()}
    variables = {"params": params | {"layers": params["layers"] | floats}, "codes": {"layers": codes}}
    return jax.tree.map(jnp.asarray, variables)


class QuantizedDecoder(nn.Module):
    """`hashml.models.decoder.Decoder` with kernels of codes.

    Attributes:
        config: of the model.
        grid: bits, groups and type of the kernels, and whether they have tables or scales.
    """

    config: DecoderConfig
    grid: GridSpec

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T {self.config.vocabulary}"]:
        return decoder.forward(_params(self, self.config, self.grid), self.config, tokens, positions)


class QuantizedEncoder(nn.Module):
    """`hashml.models.encoder.Encoder` with kernels of codes; attributes as of `QuantizedDecoder`."""

    config: EncoderConfig
    grid: GridSpec

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T {self.config.features}"]:
        params = _params(self, self.config, self.grid)
        return encoder.forward(params, self.config, tokens, mask, token_types, dense=matmul)


def _params(module: nn.Module, config: Config, grid: GridSpec) -> Params:
    """The tree that the model takes, of the module's variables."""

    def fresh(key: PRNGKeyArray) -> dict[str, Any]:
        family = encoder if isinstance(config, EncoderConfig) else decoder
        params = family.init_params(key, config)  # type: ignore[arg-type]  # the family's own
        kernels = {}
        for place, (name, (inputs, outputs)) in enumerate(sizes.items()):
            key_of = jax.random.fold_in(key, 1000 + place)
            kernels[name] = draw_matrix(key_of, (config.layers, outputs, inputs), grid)
        return module_variables(params | {"layers": params["layers"] | kernels})

    shapes = (encoder if isinstance(config, EncoderConfig) else decoder).param_shapes(config)  # type: ignore[arg-type]
    sizes = {name: shapes["layers"][name][1:] for group in kernel_groups(config) for name in group}
    params = {name: module.param(name, lambda key, name=name: fresh(key)["params"][name]) for name in shapes}
    codes: Any = module.variable("codes", "layers", lambda: fresh(module.make_rng("params"))["codes"]["layers"]).value
    kernels = {
        name: kernel_of({**params["layers"][name], **codes[name]}, grid.bits, inputs)
        for name, (inputs, _) in sizes.items()
    }
    return params | {"layers": params["layers"] | kernels}
