"""Facts of the collection."""

import pytest

from experiments.data import cranfield, files

needs_data = pytest.mark.skipif(files.data_folder() is None, reason="HASHML_DATA is not set")


@needs_data
def test_facts():
    found = cranfield.load()
    assert found.relevant.shape == (len(found.queries), len(found.documents)) == (225, 1400)
    assert found.relevant.sum() == 1612
    assert found.documents[0].startswith("experimental investigation of the aerodynamics of a wing in a slipstream")
    assert sum(not document for document in found.documents) <= 2
    assert all(found.queries)
    # The first judgement of the file: document 184 answers query 1.
    assert found.relevant[0, 183]


def test_without_the_files_the_message_says_what_to_get(tmp_path, monkeypatch):
    monkeypatch.setenv("HASHML_DATA", str(tmp_path))
    with pytest.raises(files.DataNotFound, match="Cranfield: no file retrieval/cranfield/corpus.jsonl.gz"):
        cranfield.load()
