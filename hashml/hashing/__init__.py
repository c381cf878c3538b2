"""Hash families: a ``seed`` picks a function that gives the same bits in NumPy, in XLA and in a kernel.

Universal families are in `universal`, unbiased reduction to a range among them; `reference64` holds
the int64 layout of the reference implementations, on the host only. The arithmetic itself lives in
`hashml_kernels.bits`, since the same lines run inside the kernels.
"""

from hashml.hashing.minhash import MinHashes as MinHashes
from hashml.hashing.minhash import key_count as key_count
from hashml.hashing.minhash import minhash as minhash
from hashml.hashing.minhash import pack_signatures as pack_signatures
from hashml.hashing.reference64 import REFERENCE_PRIME as REFERENCE_PRIME
from hashml.hashing.reference64 import reference64 as reference64
from hashml.hashing.reference64 import reference64_slots as reference64_slots
from hashml.hashing.simhash import corners as corners
from hashml.hashing.simhash import hard_hash as hard_hash
from hashml.hashing.simhash import project as project
from hashml.hashing.simhash import soft_hash as soft_hash
from hashml.hashing.simhash import srp_planes as srp_planes
from hashml.hashing.universal import hash_signs as hash_signs
from hashml.hashing.universal import hash_slots as hash_slots
from hashml.hashing.universal import lowbias32 as lowbias32
from hashml.hashing.universal import m31 as m31
from hashml.hashing.universal import mix32 as mix32
from hashml.hashing.universal import multiply_shift as multiply_shift
from hashml.hashing.universal import murmur3_32 as murmur3_32
from hashml.hashing.universal import murmur3_32_bytes as murmur3_32_bytes
from hashml.hashing.universal import tabulation as tabulation
from hashml_kernels.bits import Limbs as Limbs
from hashml_kernels.bits import split64 as split64
