"""Fashion-MNIST and the part of CIFAR-10: their facts, and the parts that are drawn from them."""

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from experiments.data import images
from experiments.data.files import DataNotFound


@pytest.fixture
def fashion(require_data):
    for part in ("train", "test"):
        require_data(f"fashion_mnist/{part}.npz")


@pytest.fixture
def cifar(require_data):
    for part in ("train", "test"):
        require_data(f"cifar10_subset/{part}.npz")


def test_fashion_mnist(fashion):
    train, test = images.load("fashion_mnist"), images.load("fashion_mnist", "test")
    assert train.images.shape == (60_000, 28, 28, 1)
    assert test.images.shape == (10_000, 28, 28, 1)
    assert train.images.dtype == np.uint8
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    # As published for the training images.
    assert train.images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert train.images.std() / 255 == pytest.approx(0.3530, abs=5e-5)


def test_fashion_mnist_is_shuffled(fashion):
    """No label is more frequent in any tenth of the file than chance allows: 600 +- 23 of 6,000."""
    counts = [np.bincount(tenth, minlength=10) for tenth in np.split(images.load("fashion_mnist").labels, 10)]
    assert np.abs(np.array(counts) - 600).max() < 5 * np.sqrt(600 * 0.9 * 0.9)


def test_fashion_mnist_labels_belong_to_the_images(fashion):
    """The nearest class mean is far above chance, 0.1; shuffled labels would not be."""
    train, test = images.load("fashion_mnist").take(slice(0, 10_000)), images.load("fashion_mnist", "test")
    model = NearestCentroid().fit(train.images.reshape(len(train), -1).astype(float), train.labels)
    assert model.score(test.images.reshape(len(test), -1).astype(float), test.labels) > 0.5
    # Sandals, sneakers and boots have the upper corners empty, pullovers have not.
    names = np.array(images.FASHION_MNIST_CLASSES)
    ink = [train.images[train.labels == label][:, :5].mean() for label in range(10)]
    assert set(names[np.argsort(ink)[:3]]) <= {"sandal", "sneaker", "ankle boot", "bag"}
    assert len(names) == 10


def test_cifar10_subset(cifar):
    train, test = images.load("cifar10_subset"), images.load("cifar10_subset", "test")
    assert train.images.shape == (6000, 32, 32, 3)
    assert test.images.shape == (1000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [600] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    # The published mean of the whole training set; 600 images a class are known to a hundredth.
    np.testing.assert_allclose(train.images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=0.01)
    names = np.array(images.CIFAR10_CLASSES)
    # Where the sky or the sea is: planes and ships are the bluest.
    shares = train.images.mean((1, 2))
    blue = shares[:, 2] - shares[:, 0]
    means = [blue[train.labels == label].mean() for label in range(10)]
    assert set(names[np.argsort(means)[-2:]]) == {"airplane", "ship"}


def test_splits_are_disjoint_standardised_and_the_same_for_a_seed(fashion):
    whole = images.load("fashion_mnist")
    train, validation, test = images.splits("fashion_mnist", train=300, validation=200, test=100, seed=3)
    assert (len(train), len(validation), len(test)) == (300, 200, 100)
    np.testing.assert_allclose(train.images.mean(), 0, atol=1e-4)
    np.testing.assert_allclose(train.images.std(), 1, atol=1e-4)
    assert train.images.dtype == validation.images.dtype == test.images.dtype == np.float32
    # Back to bytes: every image is one of the file's, with its label, and none is in both parts.
    mean, spread = _moments(whole, train)
    known = {image.tobytes(): label for image, label in zip(whole.images, whole.labels, strict=True)}
    seen = []
    for part in (train, validation):
        data = np.rint((part.images * spread + mean) * 255).astype(np.uint8)
        assert all(known[image.tobytes()] == label for image, label in zip(data, part.labels, strict=True))
        seen.append({image.tobytes() for image in data})
    assert not seen[0] & seen[1]
    np.testing.assert_array_equal(test.labels, images.load("fashion_mnist", "test").labels[:100])
    again = images.splits("fashion_mnist", train=300, validation=200, test=100, seed=3)
    np.testing.assert_array_equal(again.train.images, train.images)
    other = images.splits("fashion_mnist", train=300, validation=200, test=100, seed=4)
    assert (other.train.labels != train.labels).any()


def _moments(whole, train):
    """Mean and spread that the part was standardised with, from its smallest and largest value: 0 and 255."""
    low, high = float(train.images.min()), float(train.images.max())
    spread = 1 / (high - low)
    return -low * spread, spread


def test_bad_input(fashion):
    with pytest.raises((ValueError, TypeError), match="name"):
        images.load("mnist")  # pyright: ignore[reportArgumentType] that is the point
    with pytest.raises((ValueError, TypeError), match="part"):
        images.load("fashion_mnist", "validation")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="validation is 0; it must be at least 1"):
        images.splits("fashion_mnist", train=10, validation=0)
    with pytest.raises(
        ValueError, match=r"train \+ validation is 59999 \+ 2; fashion_mnist has 60000 training images"
    ):
        images.splits("fashion_mnist", train=59_999, validation=2)
    with pytest.raises(ValueError, match="test is 10001; fashion_mnist has 10000 test images"):
        images.splits("fashion_mnist", train=1, validation=1, test=10_001)


def test_lengths_must_agree():
    # The shape check of the tests may speak first.
    with pytest.raises((ValueError, TypeError), match="labels"):
        images.Images(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(3, np.int32))


def test_without_data_the_error_says_what_to_get(no_data):
    with pytest.raises(DataNotFound, match="zalandoresearch/fashion-mnist"):
        images.load("fashion_mnist")
