"""Evaluation of the global adapter: what it says to every held-out example, in one dispatch, and what that is worth."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree, Real

from fslora_jax.backend import compiler_options
from fslora_jax.federation.local import ScoreFn
from fslora_jax.methods import Spec, whole
from fslora_jax.metrics import METRICS
from fslora_jax.types import Batch, Score, Trainable


class Evaluated(NamedTuple):
    """Scores and labels of all examples, without fillers."""

    score: Score
    labels: Real[np.ndarray, " n"]


def make_evaluation(score: ScoreFn, spec: Spec) -> Callable[[PyTree, Trainable, Batch], Score]:
    """``(base, weights, batches) -> Score`` of the global adapter with ``S = I``; leaves are ``(batches, ...)``.

    The whole held-out set is one dispatch: a scan over its batches.
    """

    def evaluation(base: PyTree, weights: Trainable, batches: Batch) -> Score:
        held = jax.tree.map(lambda x: x[None], whole(spec, weights))

        def one(batch: Batch) -> Score:
            found = score(base, [held], jax.tree.map(lambda x: x[None], batch), None)
            return jax.tree.map(lambda x: x[0], found)

        return jax.lax.map(one, batches)

    return jax.jit(evaluation, compiler_options=compiler_options())


def gather(score: Score, batches: Batch) -> Evaluated:
    """All examples in one row, fillers left out."""
    score, labels, weights = jax.device_get((score, batches.labels, batches.weights))
    real = weights > 0
    return Evaluated(jax.tree.map(lambda x: x[real], score), labels[real])


def measure(found: Evaluated, metrics: Sequence[str]) -> dict[str, float]:
    """The loss per label or token, for language models the part of tokens that is right, and ``metrics``."""
    score: Any = found.score
    values = {"loss": mean(score.loss, score.count)}
    if not metrics:
        values["token_accuracy"] = mean(score.correct, score.count)
    return values | {name: METRICS[name](score.predicted, found.labels) for name in metrics}


def mean(sums: Any, counts: Any) -> float:
    """The mean over all that was asked.

    >>> mean(np.array([3.0, 0.0]), np.array([1.0, 1.0]))
    1.5
    """
    return float(sums.sum(dtype=float) / counts.sum(dtype=float))
