"""Training with less memory: what need not be stored, and a meter for what is."""

from hashml.optim.far import FeedForward as FeedForward
from hashml.optim.far import SplitFeedForward as SplitFeedForward
from hashml.optim.far import choose_learners as choose_learners
from hashml.optim.far import feed_forward as feed_forward
from hashml.optim.far import frozen_part as frozen_part
from hashml.optim.far import learner_optimizer as learner_optimizer
from hashml.optim.far import magnitude_scores as magnitude_scores
from hashml.optim.far import merge as merge
from hashml.optim.far import node_scores as node_scores
from hashml.optim.far import random_scores as random_scores
from hashml.optim.far import reconfigure as reconfigure
from hashml.optim.far import split_feed_forward as split_feed_forward
from hashml.optim.far import trained_part as trained_part
from hashml.optim.far import with_frozen as with_frozen
from hashml.optim.residuals import residual_bytes as residual_bytes
from hashml.optim.residuals import residuals as residuals
