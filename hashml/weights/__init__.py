"""Compressed weights: the same bits in fewer bytes.

    small = encode(array, DFLOAT11)          decode(small) has every bit again, inside `jax.jit` or out of it
    pack("model.safetensors", "model.packed", {"bfloat16": DFLOAT11})           python -m hashml.compress does it, too
    compressed_forward(...)                  a decoder whose layers are dense one at a time

and in a few bits, with a loss that calibration keeps small:

    few = quantize_matrix(weights, calibrate(inputs), preset("leanquant", 3))
    matmul(x, few)                           x times what the codes stand for

`lossless` has the interface of the first half, `dfloat11` and `ecf8` what their papers fix of it; `solver`, `grids`
and `calibration` are the second, `quantized` what it stores.
"""

from hashml.weights.calibration import Hessian as Hessian
from hashml.weights.calibration import calibrate as calibrate
from hashml.weights.calibration import proxy_loss as proxy_loss
from hashml.weights.container import file_info as file_info
from hashml.weights.container import load_compressed as load_compressed
from hashml.weights.container import pack as pack
from hashml.weights.container import unpack as unpack
from hashml.weights.dfloat11 import DFLOAT11 as DFLOAT11
from hashml.weights.dfloat11 import from_reference as from_reference
from hashml.weights.dfloat11 import reference_fields as reference_fields
from hashml.weights.ecf8 import ECF8 as ECF8
from hashml.weights.ecf8 import claimed_bounds as claimed_bounds
from hashml.weights.ecf8 import exponent_entropy as exponent_entropy
from hashml.weights.ecf8 import geometric_entropy as geometric_entropy
from hashml.weights.ecf8 import sample_stable as sample_stable
from hashml.weights.forward import compress_decoder as compress_decoder
from hashml.weights.forward import compressed_forward as compressed_forward
from hashml.weights.grids import Grid as Grid
from hashml.weights.grids import GridSpec as GridSpec
from hashml.weights.grids import make_grid as make_grid
from hashml.weights.lossless import Codec as Codec
from hashml.weights.lossless import CompressedArray as CompressedArray
from hashml.weights.lossless import Geometry as Geometry
from hashml.weights.lossless import bits_per_weight as bits_per_weight
from hashml.weights.lossless import decode as decode
from hashml.weights.lossless import decode_host as decode_host
from hashml.weights.lossless import encode as encode
from hashml.weights.lossless import encode_stack as encode_stack
from hashml.weights.lossless import entropy_limit as entropy_limit
from hashml.weights.lossless import stack as stack
from hashml.weights.quantize_model import QuantizedModel as QuantizedModel
from hashml.weights.quantize_model import quantize_decoder as quantize_decoder
from hashml.weights.quantize_model import quantize_encoder as quantize_encoder
from hashml.weights.quantized import QuantizationSpec as QuantizationSpec
from hashml.weights.quantized import QuantizedMatrix as QuantizedMatrix
from hashml.weights.quantized import dequantize as dequantize
from hashml.weights.quantized import matmul as matmul
from hashml.weights.quantized import preset as preset
from hashml.weights.quantized import quantize_matrix as quantize_matrix
from hashml.weights.quantized import stored_bits_per_weight as stored_bits_per_weight
from hashml.weights.quantized_dense import QuantizedDense as QuantizedDense
from hashml.weights.quantized_layers import load_quantized as load_quantized
from hashml.weights.quantized_layers import save_quantized as save_quantized
from hashml.weights.solver import Solution as Solution
from hashml.weights.solver import solve as solve
