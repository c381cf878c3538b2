"""Products with a virtual matrix whose tiles lie at hashed places of a shared memory (ROAST, RANDOMFOLD)."""

from hashml_kernels.hashed_matmul.api import expand as expand
from hashml_kernels.hashed_matmul.api import hashed_lookup as hashed_lookup
from hashml_kernels.hashed_matmul.api import hashed_matmul as hashed_matmul
from hashml_kernels.hashed_matmul.api import pull as pull
from hashml_kernels.hashed_matmul.geometry import TileGeometry as TileGeometry
