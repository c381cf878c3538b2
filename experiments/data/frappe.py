"""Frappe: which app a user starts, in which context (Baltrunas et al., arXiv 1505.03014).

Ten categorical fields, no dense ones. A third of the rows are real uses; the others were drawn
uniformly over items, so popular items are mostly positive: methods that favour hot rows are
distorted here.

The rows are the published validation part (57,722, here the training rows, since the published
training part is not at hand) and the published test part (28,860).
"""

from typing import Literal

import numpy as np

from experiments.data.clicks import ClickLog, Splits
from experiments.data.files import Home, locate

FIELDS = (
    "user",
    "item",
    "daytime",
    "weekday",
    "isweekend",
    "homework",
    "cost",
    "weather",
    "country",
    "city",
)
TABLE_SIZES = (957, 4082, 7, 7, 2, 3, 2, 9, 80, 233)

HOME = Home(
    "Frappe",
    "https://github.com/hexiangnan/attentional_factorization_machine (data/frappe; arXiv 1505.03014)",
    "frappe/train.npz",
)

_SHA256 = {
    "train": "86c5955182812bedcf41b65f12a62102a1b6478dd69ac6edf5ee39ba2137c180",
    "test": "8573e9ad5bd54e3b8e87ccbd82deaf04194983abb4b26aee212ad59308f9effc",
}


def load(part: Literal["train", "test"] = "train") -> ClickLog:
    """One of the two parts: 57,722 or 28,860 rows."""
    if part not in _SHA256:
        raise ValueError(f"part={part!r} must be 'train' or 'test'")
    with np.load(locate(f"frappe/{part}.npz", _SHA256[part], HOME), allow_pickle=False) as file:
        ids, labels = file["x"].astype(np.int32), file["y"]
    offsets = np.cumsum([0, *TABLE_SIZES[:-1]]).astype(np.int32)
    dense = np.zeros((len(ids), 0), dtype=np.float32)
    return ClickLog(ids - offsets, dense, labels, FIELDS, TABLE_SIZES)


def splits(seed: int = 0, validation: float = 0.1) -> Splits[ClickLog]:
    """Training rows, of which ``seed`` picks a part ``validation``, and the published test rows."""
    train, held_out = load("train").split((1 - validation, validation), seed=seed)
    return Splits(train, held_out, load("test"))
