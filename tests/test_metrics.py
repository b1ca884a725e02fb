"""Every metric against scikit-learn and scipy, on random and on degenerate predictions."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from fslora_jax.metrics import METRICS

CLASSES = {
    "accuracy": sk.accuracy_score,
    "matthews_correlation": sk.matthews_corrcoef,
    "f1": lambda labels, predicted: sk.f1_score(labels, predicted, average=None, labels=[1])[0],
}
NUMBERS = {
    "pearson": lambda labels, predicted: stats.pearsonr(predicted, labels).statistic,
    "spearmanr": lambda labels, predicted: stats.spearmanr(predicted, labels).statistic,
}


def expected(oracle, labels, predicted) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracles warn where they are not defined
        return float(oracle(labels, predicted))


def test_every_metric_has_an_oracle():
    assert METRICS.keys() == CLASSES.keys() | NUMBERS.keys()


@pytest.mark.parametrize("name", CLASSES)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 4))
def test_metrics_of_classes(name, pairs, classes):
    predicted, labels = np.array(pairs).T % classes  # one class: all labels and predictions equal
    found = METRICS[name](predicted, labels)
    assert found == pytest.approx(expected(CLASSES[name], labels, predicted), abs=1e-12)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("predicted", [0, 1])
@pytest.mark.parametrize("label", [0, 1, None])
def test_constant_predictions(name, predicted, label):
    predicted = np.full(8, predicted)
    labels = np.arange(8) % 2 if label is None else np.full(8, label)
    found = METRICS[name](predicted, labels)
    assert found == pytest.approx(expected(CLASSES[name], labels, predicted), abs=1e-12)


@pytest.mark.parametrize("name", NUMBERS)
@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=30), st.integers(1, 10)
)
def test_metrics_of_numbers(name, pairs, coarseness):
    predicted, labels = (np.array(pairs, np.float32).T // coarseness) / 3  # coarse numbers have ties
    found = METRICS[name](predicted, labels)
    wanted = expected(NUMBERS[name], labels.astype(float), predicted.astype(float))
    assert found == pytest.approx(wanted, abs=1e-6, nan_ok=True)
