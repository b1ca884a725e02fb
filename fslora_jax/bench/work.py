"""What a round asks for, whatever engine does it: clients, examples, real tokens, floating-point operations."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fslora_jax.data.batches import FILLER
from fslora_jax.federation.calls import cohort_of
from fslora_jax.federation.feed import lengths_of, seat
from fslora_jax.federation.meter import cells
from fslora_jax.federation.resources import training_flops
from fslora_jax.federation.setup import Federation
from fslora_jax.memory import adapter_values


class Work(NamedTuple):
    """One round: the clients whose reports count, and what they train on.

    ``flops`` are the model's on real tokens, as model FLOPs utilisation has them: no padding, nothing computed twice,
    and the last layer as a whole, also where an engine computes only what is asked of it. They are of the linear
    modules of the layers, attention and adapters; embeddings and heads are not counted.
    """

    clients: int
    examples: int
    tokens: int
    flops: float


class Part(NamedTuple):
    """One client's part in a round: its rank, its weight in the average, the examples of its steps, or fillers."""

    k: int
    weight: float
    examples: Int[np.ndarray, "H E"]


def parts_of(federation: Federation) -> Iterator[Part]:
    """The parts in round 0 of the clients whose reports count."""
    feed = federation.feed
    clients, chosen = seat(federation.task.population, feed.steps, feed.layout, feed.cohort(0), 0)
    for place in zip(*np.nonzero(clients.weight), strict=True):
        yield Part(int(clients.k[place]), float(clients.weight[place]), chosen[place])


def work_of(federation: Federation) -> Work:
    """The work of round 0."""
    population, parts = federation.task.population, list(parts_of(federation))
    chosen = np.array([part.examples.ravel() for part in parts])
    lengths = lengths_of(population, chosen).astype(float)
    values = np.array([adapter_values(federation.spec, part.k) for part in parts])
    flops = training_flops(federation.task.model, values, lengths.sum(1), np.square(lengths).sum(1)).sum()
    return Work(len(parts), int((chosen != FILLER).sum()), int(lengths.sum()), float(flops))


def fill_of(federation: Federation) -> float:
    """Which part of the tokens that this package computes with are real, in round 0."""
    batches = cohort_of(federation, 0).batches
    real, computed = cells(np.asarray(batches.segments), federation.feed.steps.passes)
    return real / computed
