"""The static shape of a run's batches, planned from its first rounds: how long the rows, and how many."""

from collections.abc import Callable

import numpy as np

from fslora_jax.data import packing
from fslora_jax.data.batches import BatchShape, shape_for
from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.feed import Ids, Population, Steps, counted_steps, lengths_of, local_examples, seat

PLANNED = 2**20
"""Examples of the first rounds that are laid out beforehand to find the shape of a batch."""

COMPARED = 2**17
"""Examples of the first rounds that are packed into rows of every length, to find the best; it takes a second."""


def planned_rounds(steps: Steps, num_rounds: int, clients: int) -> int:
    """How many rounds are laid out beforehand: all, unless they have very many examples."""
    return min(num_rounds, max(1, PLANNED // (clients * steps.local_steps * steps.batch_size)))


def best_row_length(
    population: Population,
    steps: Steps,
    layout: Layout,
    cohort: Callable[[int], Ids],
    rounds: int,
    width: float,
) -> int:
    """The row length, from the longest example to twice that, with which batches cost least.

    Longer rows pack better, but attention grows with their length: in a model as wide as ``width`` a token costs about
    ``1 + L / (4/3 width)``. The first rounds stand for all. Where empty passes are skipped a chunk costs what its
    fullest batch needs, else all cost what the fullest of a run does.
    """
    longest = int(population.store.lengths.max())
    start = -(-longest // 8) * 8
    if not steps.packing:
        return start
    of_a_round = layout.lanes * len(layout.caps) * steps.local_steps * steps.batch_size
    compared = range(min(rounds, max(8, COMPARED // of_a_round)))
    seated = [seat(population, steps, layout, cohort(t), t) for t in compared]
    lengths = [lengths_of(population, examples) for _, examples in seated]

    def cost(row_length: int) -> float:
        needed = 1 + np.array([packing.pack(of_round, row_length).max(axis=-1) for of_round in lengths])
        rows = float(needed.max())
        if steps.passes and steps.passes.skip:
            by_chunk = needed.max(axis=2)  # (rounds, lanes, H)
            rows = float(np.mean(-(-by_chunk // steps.passes.rows))) * steps.passes.rows
        return rows * row_length * (1 + row_length / (4 / 3 * width))

    return min(range(start, 2 * start + 1, 8), key=cost)


def plan_shape(population: Population, steps: Steps, cohort: Callable[[int], Ids], rounds: int) -> BatchShape:
    """The smallest shape, in whole multiples of rows, for every batch of the first rounds; others: `feed.fitting`."""

    def of_round(t: int) -> BatchShape:
        ids = cohort(t)
        chosen = local_examples(population, steps, ids, t, counted_steps(population, steps, ids, t))
        return shape_for(population.store, chosen, steps.row_length, steps.packing)

    rows, row_length, places = map(max, zip(*map(of_round, range(rounds)), strict=True))
    return BatchShape(-(-rows // steps.row_multiple) * steps.row_multiple, row_length, places)
