"""Attention by hashing: the cores that its methods share, the methods, and what they are compared with.

    race_attention(q, k, v, planes, beta, causal=True)        linear in the length, in softmax's place
    RaceAttention(num_heads=8)(x)                             a drop-in for flax.linen.MultiHeadDotProductAttention
    HashedAttention(8, elu_attention)(x)                      any function that attends

    Socket(...).select(index, q, ...)                         which tokens of a cache to read; `sparse_decode` does
    sparse_engine(...)                                        a decoder that does so, over exact or compressed caches

`linear_core` is what RACE, linear attention and Performer share: tiles, states of a decoder, sequences over devices.
"""

from hashml.attention.cached import SparseCache as SparseCache
from hashml.attention.cached import SparseReads as SparseReads
from hashml.attention.cached import sparse_decode_step as sparse_decode_step
from hashml.attention.cached import sparse_engine as sparse_engine
from hashml.attention.cached import sparse_prefill as sparse_prefill
from hashml.attention.double_sparsity import DoubleSparsity as DoubleSparsity
from hashml.attention.double_sparsity import heavy_channels as heavy_channels
from hashml.attention.hash_attention import HashAttention as HashAttention
from hashml.attention.hash_attention import train_hash_attention as train_hash_attention
from hashml.attention.linear import elu_attention as elu_attention
from hashml.attention.linear import elu_extend as elu_extend
from hashml.attention.linear import elu_features as elu_features
from hashml.attention.linear_core import feature_attention as feature_attention
from hashml.attention.linear_core import linear_attention as linear_attention
from hashml.attention.linear_state import LinearState as LinearState
from hashml.attention.linear_state import init_state as init_state
from hashml.attention.linear_state import merge_states as merge_states
from hashml.attention.linear_state import query_state as query_state
from hashml.attention.linear_state import update_state as update_state
from hashml.attention.linformer import LinformerAttention as LinformerAttention
from hashml.attention.linformer import linformer_attention as linformer_attention
from hashml.attention.magic_pig import MagicPig as MagicPig
from hashml.attention.multi_head import HashedAttention as HashedAttention
from hashml.attention.multi_head import padding_mask as padding_mask
from hashml.attention.nomad import Nomad as Nomad
from hashml.attention.nomad import encode_keys as encode_keys
from hashml.attention.nomad import nomad_attention as nomad_attention
from hashml.attention.nomad import nomad_codebooks as nomad_codebooks
from hashml.attention.nomad import nomad_scores as nomad_scores
from hashml.attention.nomad import pack_blocks as pack_blocks
from hashml.attention.nomad import query_tables as query_tables
from hashml.attention.nomad import unpack_blocks as unpack_blocks
from hashml.attention.nomad import write_codes as write_codes
from hashml.attention.nomad_keys import NomadKeys as NomadKeys
from hashml.attention.oracle import OracleTopK as OracleTopK
from hashml.attention.oracle import OracleTopP as OracleTopP
from hashml.attention.pair_connect import PairConnect as PairConnect
from hashml.attention.pair_connect import attention_pair_table as attention_pair_table
from hashml.attention.pair_connect import distance_bucket as distance_bucket
from hashml.attention.pair_connect import hashed_pair_connect as hashed_pair_connect
from hashml.attention.pair_connect import pair_attention as pair_attention
from hashml.attention.pair_connect import pair_connect as pair_connect
from hashml.attention.pair_connect import pair_rows as pair_rows
from hashml.attention.pair_connect import pair_table_rows as pair_table_rows
from hashml.attention.pair_connect_model import PairConnectLM as PairConnectLM
from hashml.attention.pair_connect_model import ResidualMLP as ResidualMLP
from hashml.attention.performer import PerformerAttention as PerformerAttention
from hashml.attention.performer import orthogonal_directions as orthogonal_directions
from hashml.attention.performer import performer_attention as performer_attention
from hashml.attention.performer import performer_features as performer_features
from hashml.attention.pq_cache import PQCache as PQCache
from hashml.attention.quest import Quest as Quest
from hashml.attention.race import RaceAttention as RaceAttention
from hashml.attention.race import angular_attention as angular_attention
from hashml.attention.race import race_attention as race_attention
from hashml.attention.race import race_extend as race_extend
from hashml.attention.race import race_features as race_features
from hashml.attention.race import race_state as race_state
from hashml.attention.race_streamed import KeyGradients as KeyGradients
from hashml.attention.race_streamed import QueryGradients as QueryGradients
from hashml.attention.race_streamed import collect_keys as collect_keys
from hashml.attention.race_streamed import pull_keys as pull_keys
from hashml.attention.race_streamed import pull_queries as pull_queries
from hashml.attention.race_streamed import read_queries as read_queries
from hashml.attention.reformer import ReformerAttention as ReformerAttention
from hashml.attention.reformer import reformer_attention as reformer_attention
from hashml.attention.reformer import reformer_rotations as reformer_rotations
from hashml.attention.selection_controls import StreamingMask as StreamingMask
from hashml.attention.selection_controls import UniformRandom as UniformRandom
from hashml.attention.selector_contract import Index as Index
from hashml.attention.selector_contract import Selector as Selector
from hashml.attention.selector_contract import combine as combine
from hashml.attention.selector_contract import disjoint as disjoint
from hashml.attention.selector_contract import index_bits as index_bits
from hashml.attention.selector_contract import slot_positions as slot_positions
from hashml.attention.selector_contract import union_size as union_size
from hashml.attention.socket import AsymmetricSRP as AsymmetricSRP
from hashml.attention.socket import HammingLSH as HammingLSH
from hashml.attention.socket import HardLSH as HardLSH
from hashml.attention.socket import Socket as Socket
from hashml.attention.sparse_decode import Selection as Selection
from hashml.attention.sparse_decode import merge_partials as merge_partials
from hashml.attention.sparse_decode import sparse_decode as sparse_decode
from hashml.attention.v_attention import VAttention as VAttention
from hashml.attention.yoso import YosoAttention as YosoAttention
from hashml.attention.yoso import yoso_attention as yoso_attention
from hashml.attention.yoso import yoso_expected as yoso_expected
