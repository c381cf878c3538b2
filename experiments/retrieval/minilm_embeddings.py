"""Embeddings of texts by MiniLM, computed once and kept in the user's cache beside the trained models.

A file's name holds a hash of the texts and of the model's file.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from experiments.kvcache.language_models import kept, tell
from experiments.lab import UserError
from hashml.models.encoder_checkpoints import LoadedEncoder, minilm, minilm_folder
from hashml.models.sentence_embeddings import embed_sentences


@functools.cache
def _digest() -> str:
    with (_folder() / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=1)
def _model() -> LoadedEncoder:
    return minilm()


def _folder() -> Path:
    try:
        return minilm_folder()
    except ImportError as error:
        raise UserError(str(error)) from error


def embeddings(name: str, texts: Sequence[str]) -> Float32[np.ndarray, "N d"]:
    """Embeddings of length 1, in the order of the texts.

    Args:
        name: of the texts, for the file.
        texts: sentences or documents.

    Raises:
        UserError: if the package with the model is not installed; it says how to install it.
    """
    said = {"model_sha256": _digest(), "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest()}

    def make() -> dict[str, jnp.ndarray]:
        params, config, tokenizer = _model()
        if tokenizer is None:
            raise UserError(f"{_folder()} has no tokenizer.json; the package is incomplete, install it again")
        found = embed_sentences(params, config, tokenizer, texts, progress=tell(f"MiniLM, {name}"))
        return {"embeddings": jnp.asarray(found)}

    return np.asarray(kept(f"minilm-{name}", said, 0, make)["embeddings"])
