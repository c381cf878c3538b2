"""Randomized parameter sharing: few stored weights, expanded by a hash into many virtual ones.

One operator pair (`expand`, `pull`) and its maps; the systems built on it, and what they are compared
with at equal stored bytes.
"""

from hashml.sharing.baselines import HashingTrickTables as HashingTrickTables
from hashml.sharing.baselines import NarrowTables as NarrowTables
from hashml.sharing.baselines import QuotientRemainderTables as QuotientRemainderTables
from hashml.sharing.hashed_net import HashedDense as HashedDense
from hashml.sharing.maps import SharingMap as SharingMap
from hashml.sharing.maps import block_map as block_map
from hashml.sharing.maps import collapse as collapse
from hashml.sharing.maps import element_map as element_map
from hashml.sharing.maps import expand as expand
from hashml.sharing.maps import fold_map as fold_map
from hashml.sharing.maps import load as load
from hashml.sharing.maps import map_from_slots as map_from_slots
from hashml.sharing.maps import pull as pull
from hashml.sharing.maps import tile_map as tile_map
from hashml.sharing.maps import virtual_matmul as virtual_matmul
from hashml.sharing.robe import RobeEmbed as RobeEmbed
from hashml.sharing.robe import robe_bag as robe_bag
from hashml.sharing.robe import robe_lookup as robe_lookup
from hashml.sharing.robe_tables import RobeTables as RobeTables
