"""What a round asks for, whatever engine does it: clients, examples, real tokens, floating-point operations."""

from typing import NamedTuple

import numpy as np

from fslora_jax.federation.feed import local_examples
from fslora_jax.federation.setup import Federation


class Work(NamedTuple):
    """One round. ``flops`` are the model's on real tokens: no padding, nothing computed twice."""

    clients: int
    examples: int
    tokens: int
    flops: float


def work_of(federation: Federation) -> Work:
    """The work of round 0.

    A frozen matrix costs ``2 i o`` a token forward and as much backward (there is no gradient of a frozen weight), an
    adapter of rank k three times ``2 k (i + o)``, attention three times ``4 d`` for each pair of an example's tokens.
    """
    ids, population = federation.cohort(0), federation.task.population
    chosen = local_examples(population, federation.steps, ids, 0).reshape(len(ids), -1)
    lengths = population.store.lengths_of(chosen).astype(float)
    modules = federation.task.model.modules.values()
    frozen = sum(2 * t.i * t.o * t.layers for t in modules)
    unit = sum(2 * (t.i + t.o) * t.layers for t in federation.spec.targets.values())
    width, layers = next((t.i, t.layers) for t in modules)
    tokens_of_client = lengths.sum(1)
    flops = (
        2 * frozen * lengths.sum()
        + 3 * unit * (population.ranks[ids] * tokens_of_client).sum()
        + 3 * 4 * width * layers * np.square(lengths).sum()
    )
    return Work(len(ids), chosen.size, int(lengths.sum()), float(flops))
