"""The host's side of a round: who takes part, with which examples, as arrays on the devices."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Real, Shaped

from fslora_jax.data.batches import FILLER, BatchShape, make_batch, shape_for, stream
from fslora_jax.data.partition import Partition
from fslora_jax.data.tokens import TokenStore
from fslora_jax.federation.cohort import EMPTY, Layout, place, steps_done
from fslora_jax.federation.local import Passes
from fslora_jax.federation.resources import Clock
from fslora_jax.federation.round import Cohort
from fslora_jax.methods import Client
from fslora_jax.sharding import groups_here, over_clients

Ids = Int[np.ndarray, " cohort"]


class Population(NamedTuple):
    """All clients: the tokenised examples, who holds which, each one's rank and share of the average.

    ``clock`` is there where the config says what devices they have.
    """

    store: TokenStore
    labels: Real[np.ndarray, " n"]
    examples: Partition
    ranks: Int[np.ndarray, " clients"]
    shares: np.ndarray
    clock: Clock | None = None


class Steps(NamedTuple):
    """Local training: seed of the batches, local steps, examples a step, tokens a row, packing.

    A client does at least ``min_local_steps`` (by default all) unless it fails, with probability ``failure_rate``.
    The first ``wanted`` reports by the simulated clock count, by default all. ``row_multiple`` divides the rows of a
    batch, which go through the model in ``passes``.
    """

    seed: int
    local_steps: int
    batch_size: int
    row_length: int
    packing: bool
    min_local_steps: int | None = None
    failure_rate: float = 0.0
    wanted: int | None = None
    row_multiple: int = 1
    passes: Passes | None = None

    def undisturbed(self) -> "Steps":
        """The same where nobody is slow or fails."""
        return self._replace(min_local_steps=None, failure_rate=0.0, wanted=None)

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


def counted_steps(population: Population, steps: Steps, ids: Ids, round: int) -> Int[np.ndarray, " cohort"]:
    """The steps of each client of a cohort that reach the server: 0 for one that fails, or reports too late."""
    done = steps.done(len(population.ranks), round)[ids]
    if population.clock is not None and steps.wanted is not None:
        seconds = np.where(
            done > 0, population.clock.seconds(round, ids, population.ranks[ids], done), np.inf
        )
        done[np.argsort(seconds, kind="stable")[steps.wanted :]] = 0
    return done


def round_seconds(population: Population, steps: Steps, ids: Ids, round: int) -> float:
    """Simulated seconds of a round: those of the last client whose report counts.

    Where nobody reports the server waits until the slowest, had it not failed, would have.
    """
    done = counted_steps(population, steps, ids, round)
    if population.clock is None:
        return 0.0
    if not done.any():
        done = np.full(len(ids), steps.local_steps)
    seconds = population.clock.seconds(round, ids, population.ranks[ids], done)
    return float(seconds[done > 0].max())


def local_examples(
    population: Population,
    steps: Steps,
    ids: Int[np.ndarray, "*clients"],
    round: int,
    done: Int[np.ndarray, "*clients"] | None = None,
) -> Int[np.ndarray, "*clients H E"]:
    """The examples of each client's local steps in a round; fillers in steps not done.

    ``done`` are the steps that count, by default all that each client does.
    """
    count = steps.local_steps * steps.batch_size
    done = steps.done(len(population.ranks), round)[ids] if done is None else done
    windows = [
        stream(population.examples[client], steps.seed, client, round * count, count)
        for client in ids.ravel().tolist()
    ]
    chosen = np.array(windows).reshape(*ids.shape, count)
    if steps.packing:
        chosen = deal(chosen, population.store.lengths_of(chosen), steps.local_steps)
    chosen = chosen.reshape(*ids.shape, steps.local_steps, steps.batch_size)
    return np.where((np.arange(steps.local_steps) < done[..., None])[..., None], chosen, FILLER)


def deal(
    examples: Int[np.ndarray, "*clients HE"], lengths: Int[np.ndarray, "*clients HE"], hands: int
) -> Int[np.ndarray, "*clients HE"]:
    """The examples of a round, dealt to its ``hands`` minibatches by length, there and back like cards.

    Minibatches of nearly equal token counts need nearly equal rows, so the static shape is filled better. Which
    examples a round sees is as random as before.

    >>> deal(np.arange(6), np.array([1, 2, 3, 4, 5, 6]), hands=2).tolist()
    [5, 2, 1, 4, 3, 0]
    """
    by_length = np.take_along_axis(examples, np.argsort(-lengths, axis=-1, kind="stable"), axis=-1)
    dealt = by_length.reshape(*examples.shape[:-1], -1, hands)
    dealt[..., 1::2, :] = dealt[..., 1::2, ::-1].copy()
    return np.swapaxes(dealt, -1, -2).reshape(examples.shape)


def fitting(shape: BatchShape, needed: BatchShape, split: int = 1) -> BatchShape:
    """The planned shape, or where a round needs more, the first that does of a series that grows by quarters.

    A function of the round alone, so a run that goes on has the same shapes; each is one more program.
    ``split`` divides the rows.

    >>> fitting(BatchShape(8, 64, 0), BatchShape(9, 64, 0)).rows
    10
    """
    grown, steps = shape, 0
    while grown.rows < needed.rows or grown.places < needed.places:
        steps += 1
        rows, places = (math.ceil(max(n, 1) * 1.25**steps) for n in (shape.rows, shape.places))
        grown = BatchShape(-(-rows // split) * split, shape.row_length, places if needed.places else 0)
    return grown


class Feed(NamedTuple):
    """What makes any round's arrays of a population: who takes part in it (``cohort``), where, with how many steps.

    Batches have the planned ``shape``, or the next that holds them (`fitting`), the same in every process.
    """

    steps: Steps
    layout: Layout
    cohort: Callable[[int], Ids]
    shape: BatchShape


def make_cohort(
    population: Population, feed: Feed, rounds: Sequence[int], mesh: Mesh | None = None
) -> Cohort:
    """The arrays of a round's cohort on the devices; of several rounds on a leading axis, with batches of one shape.

    Every process builds only what its own devices train.
    """

    def made(feed: Feed) -> list[Cohort]:
        return [host_cohort(population, feed, t, mesh) for t in rounds]

    cohorts = made(feed)
    shapes = [shape_of(cohort) for cohort in cohorts]
    if len(set(shapes)) > 1:
        cohorts = made(feed._replace(shape=max(shapes)))  # they are of one series, so the largest holds all
    if len(rounds) == 1:
        return on_devices(cohorts[0], feed.layout.groups, mesh)
    return on_devices(
        jax.tree.map(lambda *of_round: np.stack(of_round), *cohorts), feed.layout.groups, mesh, 1
    )


def shape_of(cohort: Cohort) -> BatchShape:
    """The static shape of a cohort's batches."""
    rows, row_length = cohort.batches.tokens.shape[-2:]
    return BatchShape(rows, row_length, cohort.batches.places.shape[-1])


def host_cohort(population: Population, feed: Feed, round: int, mesh: Mesh | None = None) -> Cohort:
    """The arrays of one round before they are on the devices: NumPy's, of this process's groups alone."""
    steps, layout, cohort, shape = feed
    clients, chosen = seat(population, steps, layout, cohort(round), round)
    needed = shape_for(population.store, chosen, shape.row_length, steps.packing)
    shape = fitting(shape, needed, steps.row_multiple)
    here = slice(None) if mesh is None else groups_here(mesh)
    mine, chosen = jax.tree.map(lambda x: dealt(x, layout.groups)[here], (clients, chosen))
    batches = make_batch(population.store, population.labels, chosen, shape, steps.packing)
    return Cohort(mine, batches)


def seat(
    population: Population, steps: Steps, layout: Layout, ids: Ids, round: int
) -> tuple[Client, Int[np.ndarray, "lanes slots H E"]]:
    """The clients of a cohort in their slots, weighted, and the examples of each one's local steps."""
    done = counted_steps(population, steps, ids, round)
    chosen = local_examples(population, steps, ids, round, done)
    seats = place(population.ranks[ids], lengths_of(population, chosen).sum((1, 2)), layout)
    taken = seats != EMPTY
    shares = np.where(taken & (done[seats] > 0), population.shares[ids][seats], 0.0)
    weights = shares / (shares.sum() or 1.0)  # where all fail, nothing is averaged
    who = np.where(taken, ids[seats], EMPTY).astype(np.int32)
    ranks = np.where(taken, population.ranks[ids][seats], 1).astype(np.int32)
    clients = Client._make((who, ranks, weights.astype(np.float32), {}))
    return clients, np.where(taken[..., None, None], chosen[seats], FILLER)


def dealt(lanes: Shaped[np.ndarray, "lanes ..."], groups: int) -> Shaped[np.ndarray, "groups chunks ..."]:
    """Lanes by group of devices, there and back, so that each group has its share of full ones.

    >>> dealt(np.arange(4), groups=2).tolist()
    [[0, 3], [1, 2]]
    """
    by_chunk = lanes.reshape(-1, groups, *lanes.shape[1:]).copy()
    by_chunk[1::2] = by_chunk[1::2, ::-1].copy()
    return np.swapaxes(by_chunk, 0, 1)


def on_devices(cohort: Cohort, groups: int, mesh: Mesh | None, axis: int = 0) -> Cohort:
    """A cohort on the devices, its groups on ``axis``."""
    sharding = over_clients(mesh, axis)
    if sharding is None:
        return jax.device_put(cohort)

    def place_one(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:axis], groups, *x.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place_one, cohort)


def lengths_of(population: Population, examples: Int[np.ndarray, "*some"]) -> Int[np.ndarray, "*some"]:
    """The tokens of some examples, none of a filler."""
    return np.where(examples == FILLER, 0, population.store.lengths_of(examples))
