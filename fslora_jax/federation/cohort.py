"""The cohort: who takes part in a round, and in which slot of which lane each client is placed.

A *lane* is one chunk on one device. All lanes run the same program, so they have the same *slots*; a slot is a place
for one client and has a rank ``cap``. A client sits in a slot of at least its own rank. Slots of equal cap
form a tier. The masked layout is the one where every cap is r.
"""

from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fslora_jax.random import Purpose, host_rng

EMPTY = -1
"""The id in a slot that no client takes in a round; it trains on nothing and has weight 0."""


class Layout(NamedTuple):
    """``caps[j]``: rank of slot j of a lane, largest first; ``groups`` of devices with ``chunks`` each."""

    caps: tuple[int, ...]
    groups: int = 1
    chunks: int = 1

    @property
    def lanes(self) -> int:
        """In all groups."""
        return self.groups * self.chunks

    @property
    def tiers(self) -> tuple[tuple[int, int], ...]:
        """``(cap, number of slots)`` of each tier of a lane, in slot order."""
        return tuple((cap, len(list(slots))) for cap, slots in groupby(self.caps))


def sample_cohort(seed: int, round: int, num_clients: int, clients_per_round: int) -> np.ndarray:
    """Ids of the clients of a round, uniform without replacement, sorted; a pure function of (seed, round).

    >>> sample_cohort(0, 0, num_clients=3, clients_per_round=3).tolist()
    [0, 1, 2]
    """
    if clients_per_round == num_clients:
        return np.arange(num_clients)
    rng = host_rng(seed, Purpose.COHORT, round)
    return np.sort(rng.choice(num_clients, clients_per_round, replace=False))


def steps_done(
    seed: int, round: int, num_clients: int, *, local_steps: int, min_local_steps: int, failure_rate: float
) -> np.ndarray:
    """The local steps that each client would do in a round, 0 where it fails; a pure function of (seed, round).

    >>> steps_done(0, 0, 3, local_steps=5, min_local_steps=5, failure_rate=0.0).tolist()
    [5, 5, 5]
    """
    if min_local_steps == local_steps and not failure_rate:
        return np.full(num_clients, local_steps)
    rng = host_rng(seed, Purpose.PARTICIPATION, round)
    steps = rng.integers(min_local_steps, local_steps, num_clients, endpoint=True)
    return np.where(rng.random(num_clients) < failure_rate, 0, steps)


MOST_TIERS = 2
"""So many tiers a layout has at most.

Each has products of its own: one more takes MiniLM's round two seconds to compile, a unit of rank a thousandth longer.
"""


def plan_layout(
    ranks: np.ndarray,
    cohorts: Iterable[np.ndarray],
    *,
    r: int,
    tiered: bool,
    groups: int = 1,
    chunks: int = 1,
    max_tiers: int = MOST_TIERS,
) -> Layout:
    """The smallest slots that hold every cohort of a run, so that one program serves all rounds.

    ``ranks``: k of every client, by id. With clients sorted by rank, slot j of all L lanes takes the j-th block of L
    clients; its cap is the largest rank that block has in any round. Where that gives more than ``max_tiers``
    different caps, neighbours get the larger one's cap, first those to whom that adds least. No group has more
    ``chunks`` than clients.

    >>> plan_layout(np.array([8, 16, 32, 48]), [np.arange(4)], r=64, tiered=True).tiers
    ((48, 2), (16, 2))
    """
    cohorts = iter(cohorts)
    first = next(cohorts)
    chunks = min(chunks, -(-len(first) // groups))

    def largest(cohort: np.ndarray) -> np.ndarray:
        return np.sort(ranks[cohort])[::-1][:: groups * chunks]

    caps = largest(first)
    if not tiered:
        return Layout((r,) * len(caps), groups, chunks)
    for cohort in cohorts:
        caps = np.maximum(caps, largest(cohort))
    layout = Layout(tuple(caps.tolist()), groups, chunks)
    while len(layout.tiers) > max_tiers:
        layout = layout._replace(caps=_one_tier_less(layout))
    return layout


def _one_tier_less(layout: Layout) -> tuple[int, ...]:
    pairs = pairwise(layout.tiers)
    (larger, _), (smaller, _) = min(pairs, key=lambda pair: (pair[0][0] - pair[1][0]) * pair[1][1])
    return tuple(larger if cap == smaller else cap for cap in layout.caps)


def place(
    ranks: Int[np.ndarray, " cohort"], loads: Int[np.ndarray, " cohort"], layout: Layout
) -> Int[np.ndarray, "lanes slots"]:
    """Which client of the cohort sits in which slot, ``EMPTY`` where none is left.

    A lane takes the time of its fullest client, so in a tier those of like ``loads`` (tokens of the round) share one;
    the first lanes are the fullest.

    >>> place(np.array([8, 8, 8, 8]), np.array([50, 90, 60, 80]), Layout((8, 8), groups=2)).tolist()
    [[1, 3], [2, 0]]
    """
    by_rank = np.full(len(layout.caps) * layout.lanes, EMPTY)
    by_rank[: len(ranks)] = np.argsort(-ranks, kind="stable")
    loads = np.append(loads, -1)  # of EMPTY, the last one
    ends = np.cumsum([count * layout.lanes for _, count in layout.tiers])
    tiers = np.split(by_rank, ends[:-1])
    sorted_tiers = [tier[np.argsort(-loads[tier], kind="stable")] for tier in tiers]
    return np.concatenate([tier.reshape(layout.lanes, -1) for tier in sorted_tiers], axis=1)
