"""Codes and codebooks: what replaces a vector by few bits, whichever family stores them.

Weighted k-means in `kmeans`, codebooks of groups of coordinates in `product_codebooks`, and codes of any number of
bits in bytes in `bit_packing`.
"""

from hashml.coding.bit_packing import code_dtype as code_dtype
from hashml.coding.bit_packing import pack as pack
from hashml.coding.bit_packing import packed_size as packed_size
from hashml.coding.bit_packing import unpack as unpack
from hashml.coding.kmeans import KMeans as KMeans
from hashml.coding.kmeans import kmeans as kmeans
from hashml.coding.kmeans import nearest as nearest
from hashml.coding.kmeans import seed_centroids as seed_centroids
from hashml.coding.product_codebooks import product_decode as product_decode
from hashml.coding.product_codebooks import product_encode as product_encode
from hashml.coding.product_codebooks import product_of as product_of
