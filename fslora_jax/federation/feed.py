"""The host's side of a round: who takes part, with which examples, as arrays on the devices."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from fslora_jax.data.batches import FILLER, BatchShape, make_batch, shape_for, stream
from fslora_jax.data.tokens import TokenStore
from fslora_jax.federation.cohort import EMPTY, Layout, place, steps_done
from fslora_jax.federation.round import Cohort
from fslora_jax.methods import Client
from fslora_jax.sharding import groups_here, over_clients


class Population(NamedTuple):
    """All clients: the tokenised examples, who holds which, each one's rank and share of the average."""

    store: TokenStore
    labels: Int[np.ndarray, " n"]
    examples: Sequence[Int[np.ndarray, " n_c"]]
    ranks: Int[np.ndarray, " clients"]
    shares: np.ndarray


class Steps(NamedTuple):
    """Local training: seed of the batches, local steps, examples a step, tokens a row, packing.

    A client does at least ``min_local_steps`` (by default all) unless it fails, with probability ``failure_rate``.
    """

    seed: int
    local_steps: int
    batch_size: int
    row_length: int
    packing: bool
    min_local_steps: int | None = None
    failure_rate: float = 0.0

    def done(self, num_clients: int, round: int) -> Int[np.ndarray, " clients"]:
        """The steps that each client of the population would do in a round."""
        return steps_done(
            self.seed,
            round,
            num_clients,
            local_steps=self.local_steps,
            min_local_steps=self.min_local_steps or self.local_steps,
            failure_rate=self.failure_rate,
        )


def local_examples(
    population: Population, steps: Steps, ids: Int[np.ndarray, "*slots"], round: int
) -> Int[np.ndarray, "*slots H E"]:
    """The examples of each client's local steps in a round; fillers in an empty slot and in steps not done."""
    count = steps.local_steps * steps.batch_size
    done = steps.done(len(population.ranks), round)
    chosen = np.full((*ids.shape, count), FILLER)
    for slot, client in np.ndenumerate(ids):
        if client != EMPTY:
            mine = population.examples[client]
            window = stream(mine, steps.seed, int(client), round * count, count)
            chosen[slot] = (
                deal(window, population.store.lengths, steps.local_steps) if steps.packing else window
            )
            chosen[slot][done[client] * steps.batch_size :] = FILLER
    return chosen.reshape(*ids.shape, steps.local_steps, steps.batch_size)


def deal(
    examples: Int[np.ndarray, " HE"], lengths: Int[np.ndarray, " n"], hands: int
) -> Int[np.ndarray, " HE"]:
    """The examples of a round, dealt to its ``hands`` minibatches by length, there and back like cards.

    Minibatches of nearly equal token counts need nearly equal rows, so the static shape is filled better. Which
    examples a round sees is as random as before.

    >>> deal(np.arange(6), np.array([1, 2, 3, 4, 5, 6]), hands=2).tolist()
    [5, 2, 1, 4, 3, 0]
    """
    by_length = examples[np.argsort(-lengths[examples], kind="stable")].reshape(-1, hands)
    by_length[1::2] = by_length[1::2, ::-1]
    return by_length.T.ravel()


def best_row_length(population: Population, steps: Steps, cohorts: Sequence[np.ndarray]) -> int:
    """The row length, from the longest example to twice that, with which batches cost least.

    Longer rows pack better, but attention grows with their length: a token costs about ``1 + L / 512``. The first
    rounds stand for all.
    """

    def cost(row_length: int) -> float:
        rows = plan_shape(population, steps._replace(row_length=row_length), cohorts[:8]).rows
        return rows * row_length * (1 + row_length / 512)

    longest = int(population.store.lengths.max())
    start = -(-longest // 8) * 8
    return min(range(start, 2 * start + 1, 8), key=cost) if steps.packing else start


def plan_shape(population: Population, steps: Steps, cohorts: Sequence[np.ndarray]) -> BatchShape:
    """A shape that holds every batch of every round, so that one program serves them all."""
    shapes = [
        shape_for(
            population.store, local_examples(population, steps, ids, t), steps.row_length, steps.packing
        )
        for t, ids in enumerate(cohorts)
    ]
    return BatchShape(*map(max, zip(*shapes, strict=True)))


def make_cohort(
    population: Population,
    steps: Steps,
    layout: Layout,
    ids: np.ndarray,
    round: int,
    *,
    shape: BatchShape,
    chunks: int,
    mesh: Mesh | None = None,
) -> Cohort:
    """The arrays of a round's cohort; every process builds only what its own devices train."""
    lanes = place(ids, population.ranks, layout)
    taken = lanes != EMPTY
    reports = taken & (steps.done(len(population.ranks), round)[lanes] > 0)
    shares = np.where(reports, population.shares[lanes], 0.0)
    ranks = np.where(taken, population.ranks[lanes], 1)
    weights = shares / (shares.sum() or 1.0)  # where all fail, nothing is averaged
    clients = Client._make((lanes.astype(np.int32), ranks.astype(np.int32), weights.astype(np.float32)))
    groups, here = layout.lanes // chunks, slice(None) if mesh is None else groups_here(mesh)
    mine = jax.tree.map(lambda x: x.reshape(groups, chunks, -1)[here], clients)
    chosen = local_examples(population, steps, mine.id, round)
    batches = make_batch(population.store, population.labels, chosen, shape, steps.packing)
    cohort = Cohort(mine, batches)
    sharding = over_clients(mesh)
    if sharding is None:
        return jax.device_put(cohort)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (groups, *x.shape[1:])), cohort
    )
