"""Soft collisions of the codes of all keys with a query, and what a selection of the best then reads."""

from hashml_kernels.soft_collision_score.api import soft_collision_score as soft_collision_score
from hashml_kernels.soft_collision_score.operands import Scores as Scores
