"""Frappe: its facts."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from experiments.data import frappe


@pytest.fixture(autouse=True)
def _files(require_data):
    require_data(frappe.HOME.name)


def test_facts():
    train, test = frappe.load("train"), frappe.load("test")
    assert (len(train), len(test)) == (57_722, 28_860)
    assert sum(frappe.TABLE_SIZES) == 5382
    assert train.field_names[:2] == ("user", "item")
    assert train.table_sizes[:2] == (957, 4082)
    assert train.labels.mean() == pytest.approx(1 / 3, abs=0.005)
    assert test.labels.mean() == pytest.approx(1 / 3, abs=0.005)
    assert train.dense.shape == (57_722, 0)


def test_each_column_has_its_own_contiguous_range_of_published_ids():
    ids = frappe.load("train").stacked_ids()
    assert np.unique(ids).size == 5292
    assert ids.max() == 5381
    # Each range begins with an id that occurs, right after the one before has ended.
    starts = ids.min(axis=0)
    assert starts.tolist() == np.cumsum([0, *frappe.TABLE_SIZES[:-1]]).tolist()
    assert (ids.max(axis=0)[:-1] < starts[1:]).all()


def test_popular_rows_are_mostly_clicks():
    """The negatives were drawn uniformly over items: 0.68 where all ids are in the top quarter, else 0.10."""
    train = frappe.load("train")
    ids = train.stacked_ids()
    counts = np.bincount(ids.ravel(), minlength=5382)
    present = np.flatnonzero(counts)
    top = present[np.argsort(-counts[present], kind="stable")][: present.size // 4]
    hot = np.isin(ids, top).all(axis=1)
    assert train.labels[hot].mean() == pytest.approx(0.68, abs=0.01)
    assert train.labels[~hot].mean() == pytest.approx(0.10, abs=0.01)


def test_logistic_regression_scores_as_published():
    """One-hot logistic regression reaches an AUC of 0.928 on the test rows."""
    train, test = frappe.load("train"), frappe.load("test")
    encoder = OneHotEncoder(handle_unknown="ignore").fit(train.ids)
    model = LogisticRegression(max_iter=300, tol=1e-3).fit(encoder.transform(train.ids), train.labels)
    scores = model.decision_function(encoder.transform(test.ids))
    assert roc_auc_score(test.labels, scores) == pytest.approx(0.928, abs=0.002)


def test_splits_cut_validation_from_train():
    train, validation, test = frappe.splits(seed=1, validation=0.2)
    assert (len(train), len(validation), len(test)) == (46_178, 11_544, 28_860)
    joined = np.concatenate([train.ids, validation.ids])
    whole = frappe.load("train").ids
    np.testing.assert_array_equal(joined[np.lexsort(joined.T)], whole[np.lexsort(whole.T)])
    np.testing.assert_array_equal(frappe.splits(seed=1, validation=0.2).validation.ids, validation.ids)


def test_a_part_that_is_not_there():
    with pytest.raises((ValueError, TypeError), match="part"):
        frappe.load("validation")  # pyright: ignore[reportArgumentType] that is the point
