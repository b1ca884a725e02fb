"""What predictions are worth, as scikit-learn and scipy define it."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import Int, Real

Predictions = Real[np.ndarray, " n"]


def accuracy(predicted: Predictions, expected: Predictions) -> float:
    """The part that is right.

    >>> accuracy(np.array([0, 1, 1]), np.array([0, 1, 0]))
    0.6666666666666666
    """
    return float(np.mean(predicted == expected))


def matthews_correlation(predicted: Predictions, expected: Predictions) -> float:
    """Matthews's correlation coefficient for any number of classes (Gorodkin 2004); 0 where it is not defined.

    >>> matthews_correlation(np.array([0, 1, 1]), np.array([0, 1, 1]))
    1.0
    """
    table = _confusion(predicted, expected)
    n, told, true = table.sum(), table.sum(0).astype(float), table.sum(1).astype(float)
    spread = (n * n - told @ told) * (n * n - true @ true)
    return float((np.trace(table) * n - told @ true) / np.sqrt(spread)) if spread else 0.0


def f1(predicted: Predictions, expected: Predictions) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where class 1 neither occurs nor is predicted."""
    hits = np.sum((predicted == 1) & (expected == 1))
    mentioned = np.sum(predicted == 1) + np.sum(expected == 1)
    return float(2 * hits / mentioned) if mentioned else 0.0


def pearson(predicted: Predictions, expected: Predictions) -> float:
    """Pearson's correlation; NaN where one side is constant.

    >>> pearson(np.array([1.0, 1.0, 3.0, 3.0]), np.array([2.0, 2.0, 6.0, 6.0]))
    1.0
    """
    if np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return float("nan")
    p, e = (x - x.mean() for x in (predicted.astype(float), expected.astype(float)))
    return float(np.clip((p / np.linalg.norm(p)) @ (e / np.linalg.norm(e)), -1, 1))


def spearmanr(predicted: Predictions, expected: Predictions) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(predicted), _ranks(expected))


METRICS: dict[str, Callable[[Predictions, Predictions], float]] = {
    "accuracy": accuracy,
    "matthews_correlation": matthews_correlation,
    "f1": f1,
    "pearson": pearson,
    "spearmanr": spearmanr,
}
"""Name, as in GLUE -> the function of predictions and labels."""


def headline(records: Iterable[Mapping[str, float]]) -> str:
    """The evaluation's main metric, by which a run is shown: the first one behind the loss.

    >>> headline([{"round": 0, "eval/loss": 1.0}, {"eval/loss": 0.9, "eval/f1": 0.5, "eval/accuracy": 0.6}])
    'eval/f1'
    """
    names = (name for record in records for name in record if name.startswith("eval/"))
    return next((name for name in names if name != "eval/loss"), "eval/loss")


def _confusion(predicted: Predictions, expected: Predictions) -> Int[np.ndarray, "labels labels"]:
    size = 1 + int(max(predicted.max(), expected.max()))
    return np.bincount(expected.astype(int) * size + predicted.astype(int), minlength=size**2).reshape(
        size, -1
    )


def _ranks(values: Predictions) -> Predictions:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
