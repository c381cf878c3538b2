"""A product with a matrix of packed codes, each a number of its row's table or of an affine grid."""

from hashml_kernels.lut_matmul.api import lut_matmul as lut_matmul
from hashml_kernels.lut_matmul.layout import layout as layout
from hashml_kernels.lut_matmul.layout import pack_codes as pack_codes
from hashml_kernels.lut_matmul.layout import unpack_codes as unpack_codes
