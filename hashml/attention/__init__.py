"""Attention by hashing: the cores that its methods share, the methods, and what they are compared with.

    race_attention(q, k, v, planes, beta, causal=True)        linear in the length, in softmax's place
    RaceAttention(num_heads=8)(x)                             a drop-in for flax.linen.MultiHeadDotProductAttention
    HashedAttention(8, elu_attention)(x)                      any function that attends

`linear_core` is what RACE, linear attention and Performer share: tiles, states of a decoder, sequences over devices.
"""

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
from hashml.attention.multi_head import HashedAttention as HashedAttention
from hashml.attention.multi_head import padding_mask as padding_mask
from hashml.attention.performer import PerformerAttention as PerformerAttention
from hashml.attention.performer import orthogonal_directions as orthogonal_directions
from hashml.attention.performer import performer_attention as performer_attention
from hashml.attention.performer import performer_features as performer_features
from hashml.attention.race import RaceAttention as RaceAttention
from hashml.attention.race import angular_attention as angular_attention
from hashml.attention.race import race_attention as race_attention
from hashml.attention.race import race_extend as race_extend
from hashml.attention.race import race_features as race_features
from hashml.attention.race import race_state as race_state
from hashml.attention.reformer import ReformerAttention as ReformerAttention
from hashml.attention.reformer import reformer_attention as reformer_attention
from hashml.attention.reformer import reformer_rotations as reformer_rotations
from hashml.attention.yoso import YosoAttention as YosoAttention
from hashml.attention.yoso import yoso_attention as yoso_attention
from hashml.attention.yoso import yoso_expected as yoso_expected
