"""Randomized parameter sharing: few stored weights, expanded by a hash into many virtual ones.

One operator pair (`expand`, `pull`) and its maps; the systems built on it, and what they are compared
with at equal stored bytes.
"""

from hashml.sharing.baselines import HashingTrickTables as HashingTrickTables
from hashml.sharing.baselines import NarrowTables as NarrowTables
from hashml.sharing.baselines import QuotientRemainderTables as QuotientRemainderTables
from hashml.sharing.hashed_net import HashedDense as HashedDense
from hashml.sharing.lma import LmaEmbed as LmaEmbed
from hashml.sharing.lma import LmaGeometry as LmaGeometry
from hashml.sharing.lma import lma_lookup as lma_lookup
from hashml.sharing.lma import lma_map as lma_map
from hashml.sharing.lma import lma_slots as lma_slots
from hashml.sharing.lma_signatures import Signatures as Signatures
from hashml.sharing.lma_signatures import sample_signatures as sample_signatures
from hashml.sharing.lma_tables import LmaTables as LmaTables
from hashml.sharing.lottery_ticket import LotteryTicket as LotteryTicket
from hashml.sharing.lottery_ticket import lottery_ticket as lottery_ticket
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
from hashml.sharing.pruning import apply_mask as apply_mask
from hashml.sharing.pruning import count_kept as count_kept
from hashml.sharing.pruning import grasp_scores as grasp_scores
from hashml.sharing.pruning import magnitude_scores as magnitude_scores
from hashml.sharing.pruning import mask_from_scores as mask_from_scores
from hashml.sharing.pruning import masked as masked
from hashml.sharing.pruning import prune as prune
from hashml.sharing.pruning import pruned_bytes as pruned_bytes
from hashml.sharing.pruning import random_scores as random_scores
from hashml.sharing.pruning import snip_scores as snip_scores
from hashml.sharing.pruning import synflow_scores as synflow_scores
from hashml.sharing.roast import RoastConv as RoastConv
from hashml.sharing.roast import RoastDense as RoastDense
from hashml.sharing.roast import RoastEmbed as RoastEmbed
from hashml.sharing.roast import SharedMemory as SharedMemory
from hashml.sharing.robe import RobeEmbed as RobeEmbed
from hashml.sharing.robe import robe_bag as robe_bag
from hashml.sharing.robe import robe_lookup as robe_lookup
from hashml.sharing.robe_tables import RobeTables as RobeTables
