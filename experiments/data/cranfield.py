"""Cranfield: abstracts of aerodynamics, questions, and which abstracts answer them (Cleverdon 1967).

1,400 documents, 225 queries and 1,612 judgements that a document is relevant to a query; two documents are empty.
"""

import gzip
import json
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from experiments.data.files import Home, locate

DOCUMENTS, QUERIES, RELEVANT = 1400, 225, 1612

_PAGE = "http://ir.dcs.gla.ac.uk/resources/test_collections/cran/"
_FILES = {
    "corpus.jsonl.gz": "854d954b905efa56261b76f76b3307a2945936d2c4ea5d6e91041ece2f4f2a60",
    "queries.jsonl.gz": "152fda7a1386216807a5083851bdbf9dcb79866b1beae3591d61a06d70c32451",
    "qrels.tsv.gz": "1e410f8747a3d8483b0db4589b850450bf80a3b2da4224d2b5ba23d07e344470",
}


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgements.

    Attributes:
        documents: title and text.
        queries: questions.
        relevant: of a query, the documents judged above 0.
    """

    documents: list[str]
    queries: list[str]
    relevant: Bool[np.ndarray, "Q N"]


def load() -> Collection:
    """The collection, in the order of its files.

    Raises:
        experiments.data.files.DataNotFound: where a file is missing, with what to get and where to put it.
        ValueError: where the files have not the numbers of the collection.
    """
    lines = {name: _lines(name) for name in _FILES}
    documents = [json.loads(line) for line in lines["corpus.jsonl.gz"]]
    queries = [json.loads(line) for line in lines["queries.jsonl.gz"]]
    places = [{entry["_id"]: place for place, entry in enumerate(part)} for part in (queries, documents)]
    relevant = np.zeros((len(queries), len(documents)), bool)
    for line in lines["qrels.tsv.gz"][1:]:
        query, document, score = line.split("\t")
        if int(score) > 0:
            relevant[places[0][query], places[1][document]] = True
    found = (len(documents), len(queries), int(relevant.sum()))
    if found != (DOCUMENTS, QUERIES, RELEVANT):
        raise ValueError(f"cranfield has {found} documents, queries and relevant ones; not those of the collection")
    return Collection(
        [f"{entry['title']} {entry['text']}".strip() for entry in documents],
        [entry["text"] for entry in queries],
        relevant,
    )


def _lines(name: str) -> list[str]:
    file = f"retrieval/cranfield/{name}"
    path = locate(file, _FILES[name], Home("Cranfield", _PAGE, file))
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        return [line.rstrip("\n") for line in lines]
