"""Images to classify: Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) and a part of CIFAR-10 (Krizhevsky 2009).

Fashion-MNIST is complete: 60,000 training and 10,000 test images, in an order shuffled once. Of CIFAR-10
there are 600 training and 100 test images a class, decoded from JPEG and so slightly lossy: its numbers
compare methods with each other, not with the published ones. Classes are balanced in every file.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt8

from experiments.data.clicks import Splits
from experiments.data.counter import permutation, stream
from experiments.data.files import Home, locate

Name = Literal["fashion_mnist", "cifar10_subset"]

FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

HOMES = {
    "fashion_mnist": Home(
        "Fashion-MNIST", "https://github.com/zalandoresearch/fashion-mnist", "fashion_mnist/train.npz"
    ),
    "cifar10_subset": Home(
        "CIFAR-10, 700 images a class", "https://www.cs.toronto.edu/~kriz/cifar.html", "cifar10_subset/train.npz"
    ),
}

_SHA256 = {
    ("fashion_mnist", "train"): "8148f4529c3c50df0d8d8accc88ba4974d87dfc41cf172cb295b103441c11532",
    ("fashion_mnist", "test"): "5ca83dbab6a7bb2b7c34dc79fc79c4b49e3a02bb2697dc1ed950c59e293b472a",
    ("cifar10_subset", "train"): "6bcb09da8efcd17343bbc79644ad82795a574387b0d09526edbbbc5643bec24a",
    ("cifar10_subset", "test"): "93010c8e6ac9dd683a4fe33fea05b8985636fc21e54780ebda2ce126c19c7944",
}


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images.

    Attributes:
        images: bytes 0 to 255 as they are in the file, or float32 once `standardised`.
        labels: class of each image, 0 to 9.

    Raises:
        ValueError: lengths disagree.
    """

    images: UInt8[np.ndarray, "N H W C"] | Float32[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images, but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> UInt8[np.ndarray, "N H W C"] | Float32[np.ndarray, "N H W C"]:
        """The images: what a model is called with."""
        return self.images

    def take(self, rows: slice | Int[np.ndarray, " M"]) -> "Images":
        """The named images, in that order (a slice gives views)."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def standardised(self, mean: Float32[np.ndarray, " C"], spread: Float32[np.ndarray, " C"]) -> "Images":
        """Bytes to float32, less ``mean``, over ``spread``, a channel each (of values 0 to 1)."""
        scaled = self.images.astype(np.float32) / np.float32(255)
        return replace(self, images=(scaled - mean) / spread)


def load(name: Name, part: Literal["train", "test"] = "train") -> Images:
    """One of the files, as bytes: ``[60000 or 10000, 28, 28, 1]`` or ``[6000 or 1000, 32, 32, 3]``.

    Raises:
        ValueError: for an unknown name or part.
        DataNotFound: the file is not there.
        ChecksumMismatch: it is another one.
    """
    _check_name(name)
    if (name, part) not in _SHA256:
        raise ValueError(f"part={part!r} must be 'train' or 'test'")
    path = locate(f"{name}/{part}.npz", _SHA256[name, part], HOMES[name])
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int32)
    return Images(images.reshape(*images.shape[:3], -1), labels)


def splits(name: Name, *, train: int, validation: int, test: int | None = None, seed: int = 0) -> Splits[Images]:
    """Standardised images: two disjoint parts of the training file, drawn by ``seed``, and the test file.

    Mean and spread of each channel are those of the training images that were drawn.

    Args:
        name: the data set.
        train, validation: images of either part.
        test: images of the test file, from its start; all by default.
        seed: draws the two parts.

    Raises:
        ValueError: for an unknown name, an empty part, or more images than there are.
    """
    whole, held_out = load(name, "train"), load(name, "test")
    test = len(held_out) if test is None else test
    for what, size in (("train", train), ("validation", validation), ("test", test)):
        if size < 1:
            raise ValueError(f"{what} is {size}; it must be at least 1")
    if train + validation > len(whole):
        raise ValueError(f"train + validation is {train} + {validation}; {name} has {len(whole)} training images")
    if test > len(held_out):
        raise ValueError(f"test is {test}; {name} has {len(held_out)} test images")
    order = permutation(stream(seed, "split"), len(whole))
    chosen, validated = whole.take(order[:train]), whole.take(order[train : train + validation])
    shares = chosen.images.astype(np.float64) / 255
    mean, spread = (moment(axis=(0, 1, 2)).astype(np.float32) for moment in (shares.mean, shares.std))
    parts = (chosen, validated, held_out.take(slice(0, test)))
    return Splits(*(part.standardised(mean, spread) for part in parts))


def _check_name(name: str) -> None:
    if name not in HOMES:
        raise ValueError(f"name={name!r} must be one of {', '.join(map(repr, HOMES))}")
