"""The length of rows, against every other length with the shapes and the tokens that a run would have."""

import numpy as np
import pytest

from fslora_jax.data.partition import Partition
from fslora_jax.data.tokens import TokenStore
from fslora_jax.federation import shapes
from fslora_jax.federation.cohort import Layout, sample_cohort
from fslora_jax.federation.feed import Feed, Population, Steps, host_cohort
from fslora_jax.federation.local import Passes
from fslora_jax.federation.meter import cells

CLIENTS, EACH, ROUNDS, WIDTH = 6, 40, 40, 300.0
LAYOUT = Layout((4, 4, 2), chunks=2)
STEPS = Steps(seed=0, local_steps=2, batch_size=6, row_length=0, packing=True)


def population(seed: int) -> Population:
    lengths = np.minimum(np.random.default_rng(seed).geometric(0.07, CLIENTS * EACH), 40)
    tokens = np.ones(lengths.sum(), np.int32)
    store = TokenStore(tokens, np.append(0, np.cumsum(lengths)), *np.zeros((2, len(tokens)), np.int8))
    examples = Partition(np.arange(CLIENTS * EACH), np.arange(CLIENTS + 1) * EACH)
    ranks = np.array([4, 4, 4, 4, 2, 2])
    return Population(store, np.zeros(len(lengths), int), examples, ranks, np.ones(CLIENTS))


def cohort(t: int) -> np.ndarray:
    return sample_cohort(0, t, CLIENTS, CLIENTS)


def cost(people: Population, steps: Steps, rounds: int) -> float:
    """Tokens computed with, at what each costs in rows of their length."""
    shape = shapes.plan_shape(people, steps, cohort, rounds)
    computed = 0
    feed = Feed(steps, LAYOUT, cohort, shape)
    for t in range(rounds):
        of_round = host_cohort(people, feed, t)
        assert of_round.batches.segments.shape[-2:] == (shape.rows, shape.row_length)
        computed += cells(of_round.batches.segments, steps.passes)[1]
    return computed * (1 + shape.row_length / (4 / 3 * WIDTH))


@pytest.mark.parametrize("passes", [None, Passes(1), Passes(1, skip=False)], ids=str)
@pytest.mark.parametrize("seed", [2, 6, 9])
def test_no_other_length_of_rows_costs_less(seed, passes):
    people, steps = population(seed), STEPS._replace(passes=passes)
    found = shapes.best_row_length(people, steps, LAYOUT, cohort, ROUNDS, WIDTH)
    costs = {length: cost(people, steps._replace(row_length=length), ROUNDS) for length in range(40, 81, 8)}
    assert found in costs
    assert costs[found] == min(costs.values())


def test_a_length_that_the_first_rounds_like_costs_more_in_the_end():
    people = population(2)
    early, late = (
        shapes.best_row_length(people, STEPS, LAYOUT, cohort, rounds, WIDTH) for rounds in (8, ROUNDS)
    )
    of_early, of_late = (cost(people, STEPS._replace(row_length=length), ROUNDS) for length in (early, late))
    assert of_late < 0.97 * of_early


def test_texts_that_are_not_packed_have_rows_of_the_longest():
    people, steps = population(0), STEPS._replace(packing=False)
    assert shapes.best_row_length(people, steps, LAYOUT, cohort, ROUNDS, WIDTH) == 40
