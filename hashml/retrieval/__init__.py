"""Retrieval: what finds near neighbours, and codes that make the search small.

codes = hashed_projection(embeddings, 256, seed=0)                      32 bytes a vector
nearest_by_hamming(hashed_projection(queries, 256, seed=0), codes, 10)
"""

from hashml.retrieval.hashed_projection import GENERATOR as GENERATOR
from hashml.retrieval.hashed_projection import Neighbors as Neighbors
from hashml.retrieval.hashed_projection import angle as angle
from hashml.retrieval.hashed_projection import cosine as cosine
from hashml.retrieval.hashed_projection import hadamard_project as hadamard_project
from hashml.retrieval.hashed_projection import hadamard_projection as hadamard_projection
from hashml.retrieval.hashed_projection import hamming as hamming
from hashml.retrieval.hashed_projection import hashed_projection as hashed_projection
from hashml.retrieval.hashed_projection import hyperplanes as hyperplanes
from hashml.retrieval.hashed_projection import nearest_by_hamming as nearest_by_hamming
from hashml.retrieval.hashed_projection import pack_bits as pack_bits
from hashml.retrieval.hashed_projection import plane_codes as plane_codes
from hashml.retrieval.hashed_projection import sign_projection as sign_projection
from hashml.retrieval.hashed_projection import unpack_bits as unpack_bits
from hashml.retrieval.hashed_projection import walsh_hadamard as walsh_hadamard
from hashml.retrieval.hashed_projection import words_of as words_of
