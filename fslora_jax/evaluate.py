"""Evaluation of the global adapter: what it says to every held-out example, in one dispatch, and what that is worth."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.data.batches import FILLER
from fslora_jax.data.held_out import HeldOut
from fslora_jax.federation.local import ScoreFn
from fslora_jax.methods import Spec, whole
from fslora_jax.metrics import METRICS
from fslora_jax.sharding import CLIENTS, manual_axes, replicated
from fslora_jax.types import Batch, Score, Trainable


class Answers(NamedTuple):
    """The score of each row, as in ``types.Score``, without fillers."""

    loss: Float[np.ndarray, " n"]
    correct: Float[np.ndarray, " n"]
    count: Float[np.ndarray, " n"]
    predicted: Float[np.ndarray, " n"]


def make_evaluation(
    score: ScoreFn, spec: Spec, mesh: Mesh | None = None
) -> Callable[[PyTree, Trainable, Batch], Score]:
    """``(base, weights, batches) -> Score`` of the global adapter with ``S = I``; leaves are ``(batches, ...)``.

    The whole held-out set is one dispatch: a scan over its batches. On a mesh the groups of devices along ``clients``
    share the batches, whose number they divide, and all devices have all scores.
    """

    def evaluation(base: PyTree, weights: Trainable, batches: Batch) -> Score:
        held = jax.tree.map(lambda x: x[None], whole(spec, weights))

        def one(batch: Batch) -> Score:
            found = score(base, [held], jax.tree.map(lambda x: x[None], batch), None)
            return jax.tree.map(lambda x: x[0], found)

        return jax.lax.map(one, batches)

    if mesh is not None:
        evaluation = jax.shard_map(
            evaluation,
            mesh=mesh,
            axis_names=manual_axes(mesh),
            in_specs=(P(), P(), P(CLIENTS)),
            out_specs=P(CLIENTS),
        )
    return jax.jit(evaluation, out_shardings=replicated(mesh), compiler_options=compiler_options())


def gather(score: Score, slots: Int[np.ndarray, "*batches E"]) -> Answers:
    """The scores of all rows in their order, fillers left out; ``slots`` as ``HeldOut`` has them."""
    real = slots != FILLER
    order = np.argsort(slots[real])
    return Answers(*(np.asarray(x)[real][order] for x in jax.device_get(score)))


def measure(score: Score, held: HeldOut, metrics: Sequence[str]) -> dict[str, float]:
    """What ``measure_rows`` finds of all rows, and then of each group, under ``GROUP/``."""
    answers, groups = gather(score, held.slots), np.array(held.groups)
    values = measure_rows(answers, held, np.ones(len(held.owner), bool), metrics)
    for group in sorted(set(held.groups)):
        found = measure_rows(answers, held, groups == group, metrics)
        values |= {f"{group}/{name}": value for name, value in found.items()}
    return values


def measure_rows(
    answers: Answers, held: HeldOut, rows: Bool[np.ndarray, " rows"], metrics: Sequence[str]
) -> dict[str, float]:
    """The loss of what is right and ``metrics``; of language models which tokens, and which options, are right.

    A metric that is not defined, such as a correlation with a constant, is left out.
    """
    right = held.right & rows
    said = Answers(*(x[right] for x in answers))
    values = {"loss": mean(said.loss, said.count)}
    if not held.right.all():
        options = held.owner[rows], held.right[rows]
        values["option_accuracy"] = option_accuracy(answers.loss[rows], *options)
        values["option_accuracy_per_token"] = option_accuracy((answers.loss / answers.count)[rows], *options)
    if not metrics:
        values["token_accuracy"] = mean(said.correct, said.count)
    values |= {name: METRICS[name](said.predicted, held.labels[right]) for name in metrics}
    return {name: value for name, value in values.items() if name == "loss" or not math.isnan(value)}


def option_accuracy(
    loss: Float[np.ndarray, " rows"], owner: Int[np.ndarray, " rows"], right: Bool[np.ndarray, " rows"]
) -> float:
    """How often the option with the least loss, the first of several, is the right one.

    >>> option_accuracy(np.array([2.0, 1.0, 3.0, 4.0]), np.array([0, 0, 1, 1]), np.array([False, True, False, True]))
    0.5
    """
    order = np.lexsort((loss, owner))
    first = np.append(True, owner[order][1:] != owner[order][:-1])
    return float(right[order][first].mean())


def mean(sums: Float[np.ndarray, " n"], counts: Float[np.ndarray, " n"]) -> float:
    """The mean over all that was asked.

    >>> mean(np.array([3.0, 0.0]), np.array([1.0, 1.0]))
    1.5
    """
    return float(sums.sum(dtype=float) / counts.sum(dtype=float))
