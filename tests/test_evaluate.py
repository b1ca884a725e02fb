"""Metrics against scikit-learn, and as sums that merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from fslora_jax.evaluate import make_evaluation, means
from fslora_jax.lora import Target
from fslora_jax.methods import Spec
from fslora_jax.models.scores import count
from fslora_jax.types import Batch, Pair, Trainable

LABELS = 3


def batch_of(labels: np.ndarray, weights: np.ndarray) -> Batch:
    """A batch of which only labels and weights matter here; both are (..., examples)."""
    nothing = jnp.zeros((*labels.shape[:-1], 1, 1), int)
    weights = jnp.asarray(weights, jnp.float32)
    return Batch(nothing, nothing, nothing, nothing, jnp.asarray(labels), weights, nothing[..., :0])


def random_case(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((1, number, LABELS)).astype(np.float32), rng.integers(
        LABELS, size=(1, number)
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(2, 9), st.integers(1, 8))
def test_merged_parts_are_the_whole(seed, number, cut):
    cut = min(cut, number - 1)
    logits, labels = random_case(seed, number)
    ones = np.ones(labels.shape)
    whole = count(logits, labels, ones)
    parts = [
        count(logits[:, part], labels[:, part], ones[:, part]) for part in (slice(cut), slice(cut, None))
    ]
    np.testing.assert_allclose(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5)
    assert float(whole.count[0]) == number


def test_means_are_those_of_scikit_learn():
    logits, labels = random_case(0, 200)
    found = means(jax.tree.map(jnp.sum, count(logits, labels, np.ones(labels.shape))))
    probabilities = np.asarray(jax.nn.softmax(logits[0], -1), np.float64)
    probabilities /= probabilities.sum(-1, keepdims=True)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels[0], probabilities.argmax(-1)))
    assert found["loss"] == pytest.approx(log_loss(labels[0], probabilities, labels=range(LABELS)), rel=1e-5)


def test_fillers_do_not_count():
    logits, labels = random_case(1, 6)
    weights = np.array([[1, 0, 1, 1, 0, 1]])
    real = weights[0] > 0
    with_fillers = count(logits, labels, weights)
    alone = count(logits[:, real], labels[:, real], np.ones((1, 4)))
    np.testing.assert_allclose(with_fillers, alone, rtol=1e-6)


def test_an_evaluation_is_one_pass_over_all_batches_with_the_whole_adapter():
    """A model whose logits are its examples' labels times ``scale sum(b a)``: it sees S = I and each batch once."""
    spec = Spec({"m": Target(1, 1, layers=2)}, r=3, scale=0.5)
    pair = Pair(jnp.ones((2, 3, 1)), jnp.arange(6.0).reshape(2, 3, 1))

    def score(base, tiers, batch, keys):
        assert keys is None  # no dropout
        (held,) = tiers
        total = (held.scale["m"] * (held.weights.adapter["m"].a * held.weights.adapter["m"].b)[..., 0]).sum()
        return count(base * total * jax.nn.one_hot(batch.labels, LABELS), batch.labels, batch.weights)

    labels = np.array([[0, 1, 2, 0], [2, 1, 0, 0]])
    weights = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    sums = make_evaluation(score, spec)(
        jnp.float32(0.1), Trainable({"m": pair}, {}), batch_of(labels, weights)
    )
    assert float(sums.count) == 6
    assert float(sums.correct) == 6
    hot = 0.1 * 0.5 * 15
    assert means(sums)["loss"] == pytest.approx(np.log(np.exp(hot) + 2) - hot, rel=1e-5)
