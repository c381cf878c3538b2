"""Facts of the paraphrase corpus."""

import gzip

import pytest

from experiments.data import files, mrpc

needs_data = pytest.mark.skipif(files.data_folder() is None, reason="HASHML_DATA is not set")


@needs_data
@pytest.mark.parametrize("part", ["train", "test"])
def test_facts(part):
    pairs = mrpc.load(part)
    assert len(pairs.first) == len(pairs.second) == len(pairs.labels) == mrpc.ROWS[part]
    assert pairs.labels.sum() == mrpc.PARAPHRASES[part]
    assert all(pairs.first)
    assert all(pairs.second)
    assert not any("\t" in sentence for sentence in pairs.second)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="part='dev' must be 'train' or 'test'"):
        mrpc.load("dev")
    monkeypatch.setenv("HASHML_DATA", str(tmp_path))
    with pytest.raises(files.DataNotFound, match="MRPC: no file text_classification/mrpc_test.tsv.gz"):
        mrpc.load("test")
    (tmp_path / "text_classification").mkdir()
    (tmp_path / "text_classification/mrpc_test.tsv.gz").write_bytes(gzip.compress(b"1\ta\tb\n"))
    with pytest.raises(files.ChecksumMismatch, match="sha256"):
        mrpc.load("test")
