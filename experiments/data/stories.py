"""stories260K: a real language model of 260 thousand weights (Karpathy, TinyStories), small enough for any machine.

    params, config, tokenizer = load()

Llama's layout: 5 layers of width 64, 8 query and 4 key heads, 512 tokens, context 512.
"""

from experiments.data.files import Home, locate
from hashml.models.decoder_checkpoints import LoadedDecoder, load_decoder

BOS = 1
"""The token that every story begins with."""

_PAGE = "https://huggingface.co/karpathy/tinyllamas"
_FILES = {
    "stories260K/stories260K.bin": "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    "stories260K/tok512.bin": "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
}


def load() -> LoadedDecoder:
    """Parameters, configuration and tokenizer.

    Raises:
        experiments.data.files.DataNotFound: where a file is missing, with what to get and where to put it.
        experiments.data.files.ChecksumMismatch: where a file is another one.
    """
    model, tokens = (locate(name, sha, Home("stories260K", _PAGE, name)) for name, sha in _FILES.items())
    return load_decoder(model, tokenizer=tokens)
