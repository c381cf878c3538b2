"""Contextual sparsity: of each layer, only the heads and neurons that an input needs are read.

    trace = masked_forward(params, config, tokens)              what a dense model looks like from inside
    found = train_predictors(key, queries, targets, rank=32, top=154)
    weights = sparse_params(params, config, neurons=found.predictor)
    engine = deja_vu_engine(model, uniform_sparsity(config, 0.3, 1.0), capacity)
    generate(model, weights, prompts, 100, cache=engine)

`hashml_kernels.gathered_mlp` is the perceptron of a list of neurons, `weight_reads` counts what a step reads.
"""

from hashml.sparse.chosen_heads import Ring as Ring
from hashml.sparse.deja_vu import DejaVuEngine as DejaVuEngine
from hashml.sparse.deja_vu import Sparsity as Sparsity
from hashml.sparse.deja_vu import deja_vu_engine as deja_vu_engine
from hashml.sparse.deja_vu import sparse_params as sparse_params
from hashml.sparse.deja_vu import sparse_step as sparse_step
from hashml.sparse.deja_vu import uniform_sparsity as uniform_sparsity
from hashml.sparse.lists import top_list as top_list
from hashml.sparse.lists import top_mask as top_mask
from hashml.sparse.lists import union_rows as union_rows
from hashml.sparse.predictors import Predictor as Predictor
from hashml.sparse.predictors import init_predictor as init_predictor
from hashml.sparse.predictors import predict as predict
from hashml.sparse.predictors import recall_at as recall_at
from hashml.sparse.predictors import train_predictors as train_predictors
from hashml.sparse.predictors import weighted_loss as weighted_loss
from hashml.sparse.residuals import Choice as Choice
from hashml.sparse.residuals import Residuals as Residuals
from hashml.sparse.residuals import head_query as head_query
from hashml.sparse.residuals import masked_forward as masked_forward
from hashml.sparse.residuals import neuron_query as neuron_query
from hashml.sparse.weight_reads import Reads as Reads
from hashml.sparse.weight_reads import neurons_for as neurons_for
from hashml.sparse.weight_reads import weight_reads as weight_reads
