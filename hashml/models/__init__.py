"""Models that take their embedding as an argument, and the steps that train them."""

from hashml.models.dlrm import DLRM as DLRM
from hashml.models.dlrm import KAGGLE as KAGGLE
from hashml.models.dlrm import MLP as MLP
from hashml.models.dlrm import MLPERF as MLPERF
from hashml.models.dlrm import TERABYTE as TERABYTE
from hashml.models.dlrm import DLRMSizes as DLRMSizes
from hashml.models.dlrm import binary_cross_entropy as binary_cross_entropy
from hashml.models.dlrm import cat_interaction as cat_interaction
from hashml.models.dlrm import dot_interaction as dot_interaction
from hashml.models.dlrm import sum_bags as sum_bags
from hashml.models.training import TrainState as TrainState
from hashml.models.training import data_parallel_step as data_parallel_step
from hashml.models.training import data_parallel_value_and_grad as data_parallel_value_and_grad
from hashml.models.training import init_state as init_state
from hashml.models.training import sharded_step as sharded_step
from hashml.models.training import sharded_value_and_grad as sharded_value_and_grad
from hashml.models.training import train_step as train_step
