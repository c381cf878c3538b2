"""The experiment runs at its smallest scale, its plans are what they say, and its measure is scikit-learn's."""

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import ndcg_score

from experiments import cli
from experiments.data.files import DataNotFound
from experiments.distributed import fair
from experiments.distributed.federated_ncf import clients, ndcg
from experiments.lab import experiment, figures, records
from experiments.lab.claims import judge

ITEMS = 3706


@pytest.fixture(scope="module")
def data():
    try:
        return clients(12, 0, 20, 40)
    except DataNotFound as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("cutoff", [1, 5, 20])
def test_ndcg_is_that_of_scikit_learn(cutoff):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((6, 40)).astype(np.float32)
    relevant = rng.random((6, 40)) < 0.3
    found = ndcg(jnp.asarray(scores), jnp.asarray(relevant), cutoff)
    expected = [ndcg_score(r[None], s[None], k=cutoff) for r, s in zip(relevant.astype(int), scores, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isnan(ndcg(jnp.asarray(scores[:1]), jnp.zeros((1, 40), bool), cutoff)).all()


def test_parts_of_a_client_are_disjoint_and_its_own(data):
    for train, validation, test in zip(*data[:3], strict=True):
        parts = [part[part < data.items] for part in (train, validation, test)]
        sizes = [len(part) for part in parts]
        assert len(np.unique(np.concatenate(parts))) == sum(sizes)
        assert 20 <= sum(sizes) <= 40
        assert sizes[2] == sum(sizes) // 5
        assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("histogram", list(fair.HISTOGRAMS))
def test_plans_sample_as_many_devices_within_their_bytes(histogram):
    config = fair.Config()
    whole = 4 * 2 * ITEMS * config.features
    towers = fair._bytes(config, fair.plan(config, histogram, "full", ITEMS)[0][0].parts[0], ITEMS) - whole
    halvings, sampled = fair.HISTOGRAMS[histogram], set()
    for method in fair.CONTENDERS[histogram]:
        if method == "popularity":
            continue
        servers, aggregation = fair.plan(config, histogram, method, ITEMS)
        assert (aggregation == "delta") == (method == "fair_delta")
        parts = [part for server in servers for part in server.parts]
        sampled.add(sum(part.devices for part in parts))
        assert sorted(client for server in servers for client in server.audience) == list(range(config.users))
        members = [client for part in parts for client in part.members]
        assert len(members) == len(set(members))
        if method == "full":
            continue
        for part in parts:  # nobody holds more than its class allows
            kind = part.members[-1] * len(halvings) // config.users
            allowed = whole / 2 ** halvings[kind] if method != "smallest" else whole / 2 ** halvings[-1]
            assert fair._bytes(config, part, ITEMS) - towers <= allowed
    assert len(sampled) == 1


def test_who_is_left_out():
    config = fair.Config()
    for method, classes in [("fair", 3), ("drop_small", 1), ("heterofl", 2), ("fedhm", 2), ("inconsistent", 3)]:
        (server,), _ = fair.plan(config, "thirds", method, ITEMS)
        assert sum(len(part.members) for part in server.parts) == classes * config.users // 3
    servers, _ = fair.plan(config, "thirds", "per_size", ITEMS)
    assert [server.audience for server in servers] == [server.parts[0].members for server in servers]


def test_runs_draws_and_tells_its_claims(data, tmp_path):
    name = "distributed.fair"
    assert cli.main(["run", name, "--scale", "tiny", "--out", str(tmp_path)]) == 0
    record = records.read_record(tmp_path / name / "tiny")
    assert record is not None
    rows, found = record.rows, experiment.load(name)
    assert found.count is not None
    assert found.table is not None
    assert len(rows) == found.count(found.scales["tiny"])
    assert isinstance(found.table(rows), pl.DataFrame)
    assert figures.describe(figures.draw(found.figure, rows))
    assert ((rows["ndcg"] >= 0) & (rows["ndcg"] <= 1)).all()
    for claim in found.claims:
        judgement = judge(claim, rows, scale="tiny", complete=True)
        assert judgement.verdict == "not judged"
        assert judgement.measured is not None or judgement.note
