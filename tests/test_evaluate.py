"""Scores and what is made of them, against torch and scikit-learn; fillers and packing change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, matthews_corrcoef

from fslora_jax.data.batches import FILLER, make_batch, shape_for
from fslora_jax.data.held_out import HeldOut
from fslora_jax.data.tokens import TokenStore
from fslora_jax.evaluate import gather, make_evaluation, measure
from fslora_jax.lora import Target
from fslora_jax.methods import Spec
from fslora_jax.models.scores import of_labels, of_numbers, of_tokens
from fslora_jax.types import Batch, Pair, Score, Trainable

LABELS, VOCAB = 3, 7


def batch_of(labels: np.ndarray, weights: np.ndarray) -> Batch:
    """A batch of which only labels and weights matter here; both are (..., examples)."""
    nothing = jnp.zeros((*labels.shape[:-1], 1, 1), int)
    weights = jnp.asarray(weights, jnp.float32)
    return Batch(nothing, nothing, nothing, nothing, jnp.asarray(labels), weights, nothing[..., :0])


def held(labels: np.ndarray, slots: np.ndarray, batches: Batch) -> HeldOut:
    """Rows of which each is an example."""
    n = len(labels)
    return HeldOut(batches, slots, np.arange(n), np.ones(n, bool), labels, ())


def of_batch(batch: Batch) -> HeldOut:
    """Held-out rows in the order of one batch, fillers left out."""
    real = np.asarray(batch.weights) > 0
    return held(
        np.asarray(batch.labels)[real], np.where(real, real.cumsum().reshape(real.shape) - 1, FILLER), batch
    )


def random_case(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((1, number, LABELS)).astype(np.float32)
    return logits, rng.integers(LABELS, size=(1, number))


def test_measures_are_those_of_scikit_learn():
    logits, labels = random_case(0, 200)
    batch = batch_of(labels, np.ones(labels.shape))
    found = measure(of_labels(logits, batch), of_batch(batch), ["accuracy", "matthews_correlation"])
    probabilities = np.asarray(jax.nn.softmax(logits[0], -1), np.float64)
    probabilities /= probabilities.sum(-1, keepdims=True)
    predicted = probabilities.argmax(-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels[0], predicted))
    assert found["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels[0], predicted))
    assert found["loss"] == pytest.approx(log_loss(labels[0], probabilities, labels=range(LABELS)), rel=1e-5)


@pytest.mark.parametrize("score", [of_labels, lambda logits, batch: of_numbers(logits[..., :1], batch)])
def test_fillers_do_not_count(score):
    logits, labels = random_case(1, 6)
    weights = np.array([[1, 0, 1, 1, 0, 1]])
    real = weights[0] > 0
    padded, whole = batch_of(labels, weights), batch_of(labels[:, real], np.ones((1, 4)))
    with_fillers, alone = score(logits, padded), score(logits[:, real], whole)
    for found, expected in zip(with_fillers, alone, strict=True):
        assert found[:, ~real].tolist() == [[0, 0]]
        np.testing.assert_allclose(found.sum(), expected.sum(), rtol=1e-6)
    found, expected = (
        gather(score, of_batch(b).slots) for score, b in ((with_fillers, padded), (alone, whole))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_answers_come_back_in_the_order_of_the_rows():
    slots = np.array([[3, 0, FILLER], [1, 2, 4]])
    values = jnp.where(slots == FILLER, 0.0, slots)
    assert gather(Score(*[values] * 4), slots).loss.tolist() == [0, 1, 2, 3, 4]


def test_options_and_groups():
    """Two examples of three and two options; a sum favours the short one, a mean the long one."""
    loss, count = np.array([2.0, 3.0, 9.0, 1.0, 0.5]), np.array([1.0, 3.0, 1.0, 1.0, 1.0])
    score = Score(*jnp.array([[loss], [count], [count], [0 * count]]))
    rows = held(np.zeros(5, int), np.arange(5)[None], batch_of(np.zeros((1, 5), int), np.ones((1, 5))))
    rows = rows._replace(
        owner=np.array([0, 0, 0, 1, 1]),
        right=np.array([False, True, False, False, True]),
        groups=("a", "a", "a", "b", "b"),
    )
    found = measure(score, rows, [])
    assert found["loss"] == pytest.approx((3 + 0.5) / (3 + 1))
    assert (found["option_accuracy"], found["option_accuracy_per_token"]) == (0.5, 1.0)
    assert (found["a/option_accuracy"], found["b/option_accuracy"]) == (0.0, 1.0)
    assert found["a/loss"] == 1.0


def test_numbers_are_scored_by_their_squared_error():
    batch = batch_of(np.array([[1.5, -2.0]], np.float32), np.ones((1, 2)))
    found = measure(of_numbers(jnp.array([[[1.0], [1.0]]]), batch), of_batch(batch), ["pearson"])
    assert found == {"loss": pytest.approx((0.25 + 9) / 2)}  # the correlation with a constant is not defined


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.booleans())
def test_next_tokens_are_scored_as_by_torch(seed, pack):
    """Each example alone through torch's cross-entropy over what it shall learn; the batch packs them in any way."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, 4)
    total, offsets = lengths.sum(), np.append(0, np.cumsum(lengths))
    learned = rng.integers(0, 2, total).astype(np.int8)
    learned[offsets[:-1]] = 0
    tokens = rng.integers(0, VOCAB, total).astype(np.int32)
    store = TokenStore(tokens, offsets, np.zeros_like(learned), learned)
    chosen = np.array([2, 0, FILLER, 3, 1])
    batch = make_batch(store, np.zeros(4, int), chosen, shape_for(store, chosen, 6, pack), pack)
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    table = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)  # the next token's logits by the token
    seen = np.take_along_axis(np.asarray(batch.tokens), np.maximum(batch.places, 0), axis=-1)
    found = of_tokens(jnp.asarray(table[seen]), batch)
    for slot, example in enumerate(chosen):
        part = slice(offsets[example], offsets[example + 1]) if example != FILLER else slice(0)
        mine, wanted = torch.tensor(tokens[part]).long(), torch.tensor(learned[part][1:] > 0)
        logits, targets = torch.tensor(table)[mine[:-1]][wanted], mine[1:][wanted]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        assert float(found.loss[0, slot]) == pytest.approx(float(loss), rel=1e-5)
        assert float(found.count[0, slot]) == len(targets)
        assert float(found.correct[0, slot]) == int((logits.argmax(-1) == targets).sum())


def test_an_evaluation_is_one_pass_over_all_batches_with_the_whole_adapter():
    """A model whose logits are its examples' labels times ``scale sum(b a)``: it sees S = I and each batch once."""
    spec = Spec({"m": Target(1, 1, layers=2)}, r=3, scale=0.5)
    pair = Pair(jnp.ones((2, 3, 1)), jnp.arange(6.0).reshape(2, 3, 1))

    def score(base, tiers, batch, keys):
        assert keys is None  # no dropout
        (held,) = tiers
        total = (held.scale["m"] * (held.weights.adapter["m"].a * held.weights.adapter["m"].b)[..., 0]).sum()
        return of_labels(base * total * jax.nn.one_hot(batch.labels, LABELS), batch)

    batches = batch_of(np.array([[0, 1, 2, 0], [2, 1, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]]))
    scores = make_evaluation(score, spec)(jnp.float32(0.1), Trainable({"m": pair}, {}), batches)
    rows = of_batch(batches)
    assert gather(scores, rows.slots).predicted.tolist() == rows.labels.tolist() == [0, 1, 2, 0, 2, 1]
    hot = 0.1 * 0.5 * 15
    assert measure(scores, rows, ["accuracy"]) == {
        "loss": pytest.approx(np.log(np.exp(hot) + 2) - hot, rel=1e-5),
        "accuracy": 1.0,
    }
