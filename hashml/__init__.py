"""hashml: a JAX library in which a hash decides where information lives.

`hashml.sharing` (parameters shared by a hash), `hashml.embeddings` (tables and their updates),
`hashml.models` (DLRM), `hashml.hashing` (hash families), `hashml.accounting` (stored bytes),
`hashml.exchange` (safetensors files with the geometry of their maps).
"""

__version__ = "0.1.0"
