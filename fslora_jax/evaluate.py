"""Evaluation of the global adapter: what it says to every held-out example, in one dispatch, and what that is worth."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree, Real

from fslora_jax.backend import compiler_options
from fslora_jax.federation.local import ScoreFn
from fslora_jax.methods import Spec, whole
from fslora_jax.metrics import METRICS
from fslora_jax.sharding import replicated
from fslora_jax.types import Batch, Score, Trainable


class Evaluated(NamedTuple):
    """The score of each example, as in ``types.Score``, and its label; without fillers."""

    loss: Float[np.ndarray, " n"]
    correct: Float[np.ndarray, " n"]
    count: Float[np.ndarray, " n"]
    predicted: Float[np.ndarray, " n"]
    labels: Real[np.ndarray, " n"]


def make_evaluation(
    score: ScoreFn, spec: Spec, mesh: Mesh | None = None
) -> Callable[[PyTree, Trainable, Batch], Score]:
    """``(base, weights, batches) -> Score`` of the global adapter with ``S = I``; leaves are ``(batches, ...)``.

    The whole held-out set is one dispatch: a scan over its batches. On a mesh, all devices have all scores.
    """

    def evaluation(base: PyTree, weights: Trainable, batches: Batch) -> Score:
        held = jax.tree.map(lambda x: x[None], whole(spec, weights))

        def one(batch: Batch) -> Score:
            found = score(base, [held], jax.tree.map(lambda x: x[None], batch), None)
            return jax.tree.map(lambda x: x[0], found)

        return jax.lax.map(one, batches)

    return jax.jit(evaluation, out_shardings=replicated(mesh), compiler_options=compiler_options())


def gather(score: Score, batches: Batch) -> Evaluated:
    """All examples in one row, fillers left out."""
    real = np.asarray(batches.weights) > 0
    return Evaluated(*(np.asarray(x)[real] for x in (*jax.device_get(score), batches.labels)))


def measure(found: Evaluated, metrics: Sequence[str]) -> dict[str, float]:
    """The loss per label or token, and ``metrics``; without any, the part of tokens that is right.

    A metric that is not defined, such as a correlation with a constant, is left out.
    """
    values = {"loss": mean(found.loss, found.count)}
    if not metrics:
        values["token_accuracy"] = mean(found.correct, found.count)
    values |= {name: METRICS[name](found.predicted, found.labels) for name in metrics}
    return {name: value for name, value in values.items() if name == "loss" or not math.isnan(value)}


def mean(sums: Float[np.ndarray, " n"], counts: Float[np.ndarray, " n"]) -> float:
    """The mean over all that was asked.

    >>> mean(np.array([3.0, 0.0]), np.array([1.0, 1.0]))
    1.5
    """
    return float(sums.sum(dtype=float) / counts.sum(dtype=float))
