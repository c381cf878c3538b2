"""Embedding tables of recommenders: the full tables that every compressed one is compared with."""

from hashml.embeddings.row_updates import PADDING as PADDING
from hashml.embeddings.row_updates import adagrad_rows as adagrad_rows
from hashml.embeddings.row_updates import coalesce as coalesce
from hashml.embeddings.row_updates import rowwise_adagrad_rows as rowwise_adagrad_rows
from hashml.embeddings.row_updates import sgd_rows as sgd_rows
from hashml.embeddings.tables import EmbeddingTables as EmbeddingTables
from hashml.embeddings.tables import concatenated_ids as concatenated_ids
from hashml.embeddings.tables import take_rows as take_rows
