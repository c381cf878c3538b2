"""HashedNets (Chen, Wilson, Tyree, Weinberger, Chen, ICML 2015, arXiv 1504.04788).

A dense layer of ``features x inputs`` weights stores ``budget`` of them. Each entry of the virtual
matrix V is one stored weight times a hashed sign:

    V[i, j] = sign(i, j) * memory[h(i, j)];    y = x V^T + b
    dmemory[k] = sum over h(i, j) = k of  sign(i, j) * dy[i] * x[j]

V is never stored: a block of its rows is expanded, used and dropped, forward and backward. One hash
and one 4-byte random read a multiply-add make this the slow baseline of the family; `hashml.sharing`
reads whole blocks for speed. The bias is not hashed (the paper's port hashes it by option).
"""

import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from hashml.sharing.budgets import check_positive, resolve_budget
from hashml.sharing.maps import AnyArray, SharingMap, element_map, virtual_matmul
from hashml_kernels.hash_gather.geometry import Sign


class HashedDense(nn.Module):
    """`flax.linen.Dense` that stores ``budget`` weights and a bias.

    Attributes:
        features: outputs.
        budget: weights stored, or
        compression: ``features * inputs`` over weights stored, at least 1.
        seed: picks the hash functions; by default a fixed hash of the module's path, so that layers of
            one model do not share a map.
        sign: ``"element"`` (the paper) or ``"none"``.
        use_bias: adds a stored bias.
        row_block: rows of the virtual matrix that exist at a time.
        dtype, param_dtype, bias_init: as in `flax.linen.Dense`.
        memory_init: by default uniform with the standard deviation that `flax.linen.Dense` gives its
            kernel, ``1 / sqrt(inputs)``; sharing inside one layer needs no rescaling.

    Raises:
        TypeError: where a size is no int.
        ValueError: where not exactly one of budget and compression is given, or one is out of range.
    """

    features: int
    budget: int | None = None
    compression: float | int | None = None
    seed: int | None = None
    sign: Sign = "element"
    use_bias: bool = True
    row_block: int = 256
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    memory_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()

    def sharing_map(self, inputs: int) -> SharingMap:
        """The map of a layer with ``inputs`` inputs, `geometry` included."""
        check_positive(features=self.features, inputs=inputs)
        budget = resolve_budget(self.features * inputs, budget=self.budget, compression=self.compression)
        seed = zlib.crc32("/".join(self.path).encode()) if self.seed is None else self.seed
        return element_map(self.features, inputs, budget, seed=seed, sign=self.sign)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch inputs"]) -> Float[Array, "*batch {self.features}"]:
        inputs = x.shape[-1]
        sharing = self.sharing_map(inputs)
        init = self.memory_init or uniform_init(inputs**-0.5)
        memory = self.param("memory", init, (sharing.budget,), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, memory, bias = promote_dtype(x, memory, bias, dtype=self.dtype)
        y = virtual_matmul(x, memory, sharing, row_block=self.row_block)
        return y if bias is None else y + bias


def uniform_init(standard_deviation: float) -> Initializer:
    """Uniform weights of mean 0 and the given standard deviation (a uniform on +-a has a / sqrt(3))."""

    def init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        limit = standard_deviation * 3**0.5
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init
