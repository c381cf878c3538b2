"""Codes and codebooks: what replaces a vector by few bits, whichever family stores them.

Weighted k-means in `kmeans`, codebooks of groups of coordinates in `product_codebooks`, codes of any number of bits
in bytes in `bit_packing`; without loss, canonical Huffman codes in `huffman` and `huffman_chunks`, and codes of a
fixed rate with escapes in `fixed_rate`.
"""

from hashml.coding.bit_packing import code_dtype as code_dtype
from hashml.coding.bit_packing import pack as pack
from hashml.coding.bit_packing import packed_size as packed_size
from hashml.coding.bit_packing import unpack as unpack
from hashml.coding.fixed_rate import FixedRate as FixedRate
from hashml.coding.fixed_rate import decode_fixed_rate as decode_fixed_rate
from hashml.coding.fixed_rate import decode_fixed_rate_host as decode_fixed_rate_host
from hashml.coding.fixed_rate import encode_fixed_rate as encode_fixed_rate
from hashml.coding.huffman import canonical_codes as canonical_codes
from hashml.coding.huffman import code_lengths as code_lengths
from hashml.coding.huffman import decode_table as decode_table
from hashml.coding.huffman import entropy as entropy
from hashml.coding.huffman_chunks import Chunks as Chunks
from hashml.coding.huffman_chunks import decode_chunks as decode_chunks
from hashml.coding.huffman_chunks import decode_chunks_host as decode_chunks_host
from hashml.coding.huffman_chunks import decode_joined as decode_joined
from hashml.coding.huffman_chunks import decode_joined_host as decode_joined_host
from hashml.coding.huffman_chunks import encode_chunks as encode_chunks
from hashml.coding.kmeans import KMeans as KMeans
from hashml.coding.kmeans import kmeans as kmeans
from hashml.coding.kmeans import nearest as nearest
from hashml.coding.kmeans import seed_centroids as seed_centroids
from hashml.coding.product_codebooks import product_decode as product_decode
from hashml.coding.product_codebooks import product_encode as product_encode
from hashml.coding.product_codebooks import product_of as product_of
