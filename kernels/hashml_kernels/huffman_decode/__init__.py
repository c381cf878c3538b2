"""Huffman codes in chunks of equally many symbols: all chunks at once, and floats joined of what was coded."""

from hashml_kernels.huffman_decode.api import huffman_decode as huffman_decode
from hashml_kernels.huffman_decode.operands import FloatParts as FloatParts
