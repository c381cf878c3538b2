"""Avazu click-through rate prediction (Kaggle 2014): 21 categorical fields.

The sample holds rows of one hour, so ``hour`` says nothing and is not read; nor is the row's ``id``.
``FORMAT`` also reads the challenge's own ``train.csv`` (see ``clicktext.ClickText``).
"""

from experiments.data.clicks import ClickLog, Splits
from experiments.data.clicktext import ClickText, TextFormat, text_splits
from experiments.data.files import Home, locate

FORMAT = TextFormat(
    name="Avazu",
    separator=",",
    columns=(
        ("id", "skip"),
        ("click", "label"),
        ("hour", "skip"),
        ("C1", "decimal"),
        ("banner_pos", "decimal"),
        ("site_id", "hex"),
        ("site_domain", "hex"),
        ("site_category", "hex"),
        ("app_id", "hex"),
        ("app_domain", "hex"),
        ("app_category", "hex"),
        ("device_id", "hex"),
        ("device_ip", "hex"),
        ("device_model", "hex"),
        ("device_type", "decimal"),
        ("device_conn_type", "decimal"),
        *((f"C{i}", "decimal") for i in range(14, 22)),
    ),
    header=True,
)

HOME = Home("Avazu", "https://www.kaggle.com/c/avazu-ctr-prediction", "avazu_sample/train.csv.gz")

_SHA256 = {
    "avazu_sample/train.csv.gz": "08dc765e89f615bd07a280c3f0d58178850c018cc43a34382d4e550e1960f6cb",
    "avazu_sample/test.csv.gz": "2003efec5e6ec2fe730ef49a7647d81a3d205e7f5c238dab0c16ef74d5e53ba0",
}


def splits(seed: int = 0, validation: float = 0.1) -> Splits[ClickLog]:
    """The sample: 8,087 rows, of which a part validates, and 912 that test; no dense features.

    Args:
        seed: picks the validation rows.
        validation: their part of the 8,087; ids that the other ones lack are 0.
    """
    train, test = (ClickText((locate(name, sha, HOME),), FORMAT) for name, sha in _SHA256.items())
    return text_splits(train, test, validation=validation, seed=seed)
