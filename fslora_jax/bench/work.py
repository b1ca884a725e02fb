"""What a round asks for, whatever engine does it: clients, examples, real tokens, floating-point operations."""

from typing import NamedTuple

import numpy as np

from fslora_jax.config import Config
from fslora_jax.federation.calls import cohort_of
from fslora_jax.federation.feed import local_examples
from fslora_jax.federation.meter import cells
from fslora_jax.federation.resources import training_flops
from fslora_jax.federation.setup import Federation
from fslora_jax.memory import adapter_values


class Work(NamedTuple):
    """One round. ``flops`` are the model's on real tokens: no padding, nothing computed twice."""

    clients: int
    examples: int
    tokens: int
    flops: float


def work_of(federation: Federation) -> Work:
    """The work of round 0."""
    ids, population = federation.cohort(0), federation.task.population
    chosen = local_examples(population, federation.steps, ids, 0).reshape(len(ids), -1)
    lengths = population.store.lengths_of(chosen).astype(float)
    values = np.array([adapter_values(federation.spec, k) for k in population.ranks[ids].tolist()])
    flops = training_flops(federation.task.model, values, lengths.sum(1), np.square(lengths).sum(1)).sum()
    return Work(len(ids), chosen.size, int(lengths.sum()), float(flops))


def fill_of(config: Config, federation: Federation) -> float:
    """Which part of the tokens that this package computes with are real, in round 0."""
    batches = cohort_of(config, federation, 0).batches
    real, computed = cells(np.asarray(batches.segments), federation.steps.passes)
    return real / computed
