"""Data sets, one loader a file.

Click logs (``load`` and ``splits`` give a ``ClickLog``):

    criteo          display advertising: a random sample, the head of the log, and the real Kaggle and
                    Terabyte text files in chunks at bounded memory
    avazu           mobile advertising, a sample
    frappe          app use in context, ten fields
    movielens_1m    a million ratings in three levels; also as ratings
    movielens_100k  true stars and times; also as ratings
    planted         Zipf ids and a known teacher; 10**8 rows without holding them

Text:

    stdlib_corpus   the Python standard library's own source, labelled by package
    ngrams          bags of hashed n-grams, from any text
    language        WikiText-2, tiny Shakespeare and the corpus above as bytes, for language models

Models: ``stories``, a real language model of 260 thousand weights.

What they are made of: ``files`` (``$HASHML_DATA``, downloads, checksums), ``clicks`` (``ClickLog``,
batches), ``clicktext`` (chunks of text logs), ``vocabulary`` (raw numbers to rows), ``counter``
(random numbers without a state).
"""

from experiments.data.clicks import ClickLog as ClickLog
from experiments.data.clicks import Splits as Splits
from experiments.data.clicks import batches as batches
from experiments.data.files import ChecksumMismatch as ChecksumMismatch
from experiments.data.files import DataNotFound as DataNotFound
from experiments.data.files import locate as locate
