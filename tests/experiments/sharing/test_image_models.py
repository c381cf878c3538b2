"""The trainer of image classifiers: each run is the plain loop, and choices use the validation part alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data.images import Images
from experiments.sharing.image_models import (
    Outcome,
    Trained,
    accuracies,
    batch_order,
    momentum,
    train,
    train_and_score,
)

RATES = (0.05, 0.5)


def planted(rows, seed):
    """Two by two pixels; the class is the brightest of the first three, where it is clear."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    pixels = rng.standard_normal((rows, 4)) * 0.3
    pixels[np.arange(rows), labels] += 1
    return Images(pixels.reshape(rows, 2, 2, 1).astype(np.float32), labels.astype(np.int32))


def apply(params, constants, x):
    weights = params["w"] if constants is None else params["w"] * constants
    return x.reshape(len(x), -1) @ weights + params["b"]


def start(seeds):
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((seeds, 4, 3)).astype(np.float32) / 10,
        "b": np.zeros((seeds, 3), np.float32),
    }


def masks(seeds):
    return np.random.default_rng(1).integers(0, 2, (seeds, 4, 3)).astype(np.float32)


def plain_loop(params, mask, rate, part, seed, steps, stop):
    schedule = optax.cosine_decay_schedule(rate, steps)
    velocity = jax.tree.map(jnp.zeros_like, params)
    losses = []
    for step, rows in enumerate(batch_order(len(part), steps, 16, seed)[:stop]):

        def loss(params, rows=rows):
            logits = apply(params, mask, jnp.asarray(part.images[rows]))
            return -jax.nn.log_softmax(logits)[jnp.arange(16), part.labels[rows]].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        losses.append(value)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
        size = schedule(step)
        params = jax.tree.map(lambda p, v, size=size: p - size * v, params, velocity)
    return params, losses


@pytest.mark.parametrize(("constants", "runs", "stop"), [(None, 1, None), (masks(2), 1, 5), (masks(2), 3, None)])
def test_every_run_is_the_plain_loop(constants, runs, stop):
    """Any seed at any rate, with a mask of its own, one after the other or together, whole or cut short."""
    part, params = planted(50, 0), start(2)
    found = train(
        apply,
        params,
        part,
        learning_rates=RATES,
        steps=7,
        batch_size=16,
        seeds=(4, 5),
        constants=constants,
        runs_at_a_time=runs,
        stop=stop,
    )
    assert found.losses.shape == (2, 2, stop or 7)
    for i, seed in enumerate((4, 5)):
        for j, rate in enumerate(RATES):
            one = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), params)
            mask = None if constants is None else constants[i]
            expected, losses = plain_loop(one, mask, rate, part, seed, 7, stop)
            np.testing.assert_allclose(found.losses[i, j], losses, rtol=1e-4, atol=1e-5)
            jax.tree.map(
                lambda a, b, i=i, j=j: np.testing.assert_allclose(a[i, j], b, rtol=1e-4, atol=1e-5),
                found.params,
                expected,
            )


def test_the_optimiser_may_use_the_constants_of_its_run():
    """A transformation that passes only what the mask keeps leaves all else where it was."""

    def frozen(schedule, mask):
        inner = momentum(schedule)

        def update(updates, state, params=None):
            updates, state = inner.update(updates, state, params)
            return jax.tree.map(lambda leaf: leaf * mask if leaf.ndim == 2 else leaf, updates), state

        return optax.GradientTransformation(inner.init, update)

    params, kept = start(2), masks(2)

    def whole(params, mask, x):
        return apply(params, None, x)

    trained = train(
        whole,
        params,
        planted(50, 0),
        learning_rates=RATES,
        steps=3,
        batch_size=16,
        seeds=(0, 1),
        constants=kept,
        optimizer=frozen,
    )
    for rate in range(2):
        np.testing.assert_array_equal(np.asarray(trained.params["w"][:, rate]) != params["w"], kept == 1)


def test_training_learns_and_scores():
    parts = (planted(600, 0), planted(200, 1), planted(1100, 2))
    outcome = train_and_score(
        apply, start(2), parts, learning_rates=(1e-6, 0.3), steps=60, batch_size=32, seeds=range(2)
    )
    assert outcome.chosen() == 1
    assert outcome.test.shape == outcome.validation.shape == (2, 2)
    params = outcome.chosen_params()
    for seed in range(2):
        logits = parts[2].images.reshape(1100, 4) @ params["w"][seed] + params["b"][seed]
        assert outcome.test[seed, 1] == pytest.approx((np.argmax(logits, axis=1) == parts[2].labels).mean())
        # The best rule errs where a noise of 0.3 * sqrt(2) exceeds the gap of one, for either other class.
        assert outcome.test[seed, 1] > 0.95


def test_the_rate_is_chosen_on_validation_over_the_seeds_and_ties_take_the_smaller():
    none = Trained({"w": np.arange(6.0).reshape(2, 3)}, np.zeros((2, 3, 1)))
    test = np.array([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1]])
    outcome = Outcome((0.3, 0.1, 0.2), np.array([[0.9, 0.5, 0.6], [0.1, 0.7, 0.6]]), test, none)
    assert outcome.chosen() == 1
    assert outcome.chosen_params()["w"].tolist() == [1, 4]
    diverged = outcome._replace(validation=np.array([[0.0, 0.5, 0.8], [0.0, 0.7, 0.8]]))
    assert diverged.chosen() == 2


def test_logits_that_are_not_finite_are_misses():
    part = planted(30, 0)
    params = {"w": jnp.zeros((1, 2, 4, 3)), "b": jnp.array([[[9.0, 0, 0], [jnp.nan, 0, 0]]])}
    found = accuracies(apply, params, part, chunk=7)
    np.testing.assert_allclose(found, [[(part.labels == 0).mean(), 0]])


def test_every_epoch_has_every_image_once_in_another_order():
    order = batch_order(50, 7, 16, seed=3)
    assert order.shape == (7, 16)
    epochs = [order[:3].ravel(), order[3:6].ravel()]
    assert all(np.unique(epoch).size == 48 for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    # Fewer steps are the first steps; another seed is another order.
    np.testing.assert_array_equal(batch_order(50, 4, 16, seed=3), order[:4])
    assert (batch_order(50, 7, 16, seed=4) != order).any()
    assert batch_order(50, 0, 16, seed=3).shape == (0, 16)


def test_bad_input():
    part, params = planted(50, 0), start(2)

    def call(params=params, **how):
        options = {"learning_rates": RATES, "steps": 3, "batch_size": 16, "seeds": (0, 1), **how}
        return train(apply, params, part, **options)

    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(2, 3\); its first axis must be 3, the seeds"):
        call(seeds=(0, 1, 2))
    with pytest.raises(ValueError, match=r"constants has shape \(4, 3\); its first axis must be 2, the seeds"):
        call(constants=np.ones((4, 3)))
    with pytest.raises(ValueError, match="batch_size is 51; it must be between 1 and 50, the rows"):
        call(batch_size=51)
    with pytest.raises(ValueError, match="stop is 4; it must be between 0 and steps = 3"):
        call(stop=4)
