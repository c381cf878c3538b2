"""One cache = policy x codec x positions: what is kept, how it is stored, and where rotation happens.

    cache = engine("scissorhands@0.2+int4", model, params, capacity=1024)        by name
    LayerSpec(policy=..., key_codec=..., value_codec=..., rope=..., ...)         or put together
    prefill, decode_step, insert, reset_rows                                     for a server of one's own

`hashml.kvcache.methods` lists the names; `contract` says what a new policy or codec has to be.
"""

from hashml.kvcache.accounting import CacheBytes as CacheBytes
from hashml.kvcache.accounting import CacheCost as CacheCost
from hashml.kvcache.accounting import bytes_per_token as bytes_per_token
from hashml.kvcache.accounting import cache_bytes as cache_bytes
from hashml.kvcache.accounting import cache_cost as cache_cost
from hashml.kvcache.accounting import describe as describe
from hashml.kvcache.ada_kv import AdaKV as AdaKV
from hashml.kvcache.attending import attend as attend
from hashml.kvcache.attending import observe as observe
from hashml.kvcache.batching import check_step as check_step
from hashml.kvcache.batching import insert as insert
from hashml.kvcache.batching import reset_rows as reset_rows
from hashml.kvcache.calibration import calibrate_coupled as calibrate_coupled
from hashml.kvcache.calibration import calibrate_nonuniform as calibrate_nonuniform
from hashml.kvcache.contract import Attention as Attention
from hashml.kvcache.contract import Codec as Codec
from hashml.kvcache.contract import CodecState as CodecState
from hashml.kvcache.contract import Policy as Policy
from hashml.kvcache.contract import PrefillStatistics as PrefillStatistics
from hashml.kvcache.contract import Queries as Queries
from hashml.kvcache.controls import KeyNorm as KeyNorm
from hashml.kvcache.controls import RandomEviction as RandomEviction
from hashml.kvcache.corm import Corm as Corm
from hashml.kvcache.coupled import Coupled as Coupled
from hashml.kvcache.dense import Dense as Dense
from hashml.kvcache.engine import CacheEngine as CacheEngine
from hashml.kvcache.engine import cache_engine as cache_engine
from hashml.kvcache.engine import engine as engine
from hashml.kvcache.eviction import append as append
from hashml.kvcache.eviction import evict as evict
from hashml.kvcache.exact_first import ExactFirst as ExactFirst
from hashml.kvcache.full import KeepAll as KeepAll
from hashml.kvcache.h2o import HeavyHitters as HeavyHitters
from hashml.kvcache.integer import Float8 as Float8
from hashml.kvcache.integer import Int8 as Int8
from hashml.kvcache.integer import IntGroup as IntGroup
from hashml.kvcache.keyformer import Keyformer as Keyformer
from hashml.kvcache.kivi import KiviKeys as KiviKeys
from hashml.kvcache.kivi import kivi as kivi
from hashml.kvcache.kvquant import NonUniformKeys as NonUniformKeys
from hashml.kvcache.kvquant import NonUniformValues as NonUniformValues
from hashml.kvcache.kvquant import kvquant as kvquant
from hashml.kvcache.methods import cache_layers as cache_layers
from hashml.kvcache.persistence import adjacent_cosine as adjacent_cosine
from hashml.kvcache.persistence import persistence_ratio as persistence_ratio
from hashml.kvcache.persistence import top_mass as top_mass
from hashml.kvcache.persistence import vote_overlap as vote_overlap
from hashml.kvcache.prefill import prefill_layer as prefill_layer
from hashml.kvcache.pyramid import pyramid_budgets as pyramid_budgets
from hashml.kvcache.pyramid import pyramid_layers as pyramid_layers
from hashml.kvcache.scissorhands import Scissorhands as Scissorhands
from hashml.kvcache.scissorhands import ScissorhandsRelease as ScissorhandsRelease
from hashml.kvcache.serving import decode_step as decode_step
from hashml.kvcache.serving import no_tables as no_tables
from hashml.kvcache.serving import prefill as prefill
from hashml.kvcache.sharding import cache_shardings as cache_shardings
from hashml.kvcache.snap_kv import SnapKV as SnapKV
from hashml.kvcache.spec import CacheSpec as CacheSpec
from hashml.kvcache.spec import LayerSpec as LayerSpec
from hashml.kvcache.staged import Staged as Staged
from hashml.kvcache.state import Cache as Cache
from hashml.kvcache.state import LayerCache as LayerCache
from hashml.kvcache.state import LayerTables as LayerTables
from hashml.kvcache.state import init as init
from hashml.kvcache.state import init_layer as init_layer
from hashml.kvcache.streaming import Streaming as Streaming
from hashml.kvcache.tables import learn_tables as learn_tables
from hashml.kvcache.tables import load_tables as load_tables
from hashml.kvcache.tables import needs_tables as needs_tables
from hashml.kvcache.tables import save_tables as save_tables
from hashml.kvcache.think import ThinK as ThinK
from hashml.kvcache.tova import TOVA as TOVA
from hashml.kvcache.window_vote import WindowVote as WindowVote
