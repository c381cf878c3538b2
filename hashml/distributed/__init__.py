"""Training over devices that differ: federated averaging in subspaces, and what it is compared with."""

from hashml.distributed.fair import DeviceGroup as DeviceGroup
from hashml.distributed.fair import ServerState as ServerState
from hashml.distributed.fair import TableForm as TableForm
from hashml.distributed.fair import Traffic as Traffic
from hashml.distributed.fair import download as download
from hashml.distributed.fair import federated_round as federated_round
from hashml.distributed.fair import pad_group as pad_group
from hashml.distributed.fair import subspace_table as subspace_table
from hashml.distributed.fair import traffic as traffic
from hashml.distributed.fair import train_locally as train_locally
from hashml.distributed.fair import whole_table as whole_table
from hashml.distributed.federated_baselines import drop_small as drop_small
from hashml.distributed.federated_baselines import low_rank_table as low_rank_table
from hashml.distributed.federated_baselines import low_rank_within as low_rank_within
from hashml.distributed.federated_baselines import own_subspace_table as own_subspace_table
from hashml.distributed.federated_baselines import per_size_round as per_size_round
from hashml.distributed.federated_baselines import sliced_table as sliced_table
from hashml.distributed.federated_baselines import smallest_for_all as smallest_for_all
from hashml.distributed.federated_baselines import width_within as width_within
