"""Who holds what: every example goes to exactly one client."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from fslora_jax.errors import UserError

LISTED = 1000
"""Clients that a description lists one by one; a population may have a thousand times as many."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The examples of all clients in one array, client after client, each one's sorted.

    Client ``c`` holds ``examples[offsets[c]:offsets[c + 1]]``, which is what ``partition[c]`` gives. A million clients
    are two arrays.

    >>> partition = Partition.of([np.array([0, 2]), np.array([1])])
    >>> len(partition), partition[0].tolist(), partition.sizes.tolist()
    (2, [0, 2], [2, 1])
    """

    examples: Int[np.ndarray, " n"]
    offsets: Int[np.ndarray, " clients+1"]

    @classmethod
    def of(cls, shares: Sequence[Int[np.ndarray, " n_c"]]) -> "Partition":
        """From each client's own array."""
        return cls(np.concatenate(shares), np.append(0, np.cumsum([len(share) for share in shares])))

    @property
    def sizes(self) -> Int[np.ndarray, " clients"]:
        """How many examples each client holds."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> Int[np.ndarray, " n"]:
        """The client of each entry of ``examples``."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> Int[np.ndarray, " n_c"]:
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.examples[self.offsets[client] : self.offsets[client + 1]]

    def __iter__(self) -> Iterator[Int[np.ndarray, " n_c"]]:
        return (self[client] for client in range(len(self)))


def iid(labels: Int[np.ndarray, " n"], num_clients: int, rng: np.random.Generator) -> Partition:
    """Deal the examples at random, in shares that differ by one at most.

    >>> iid(np.zeros(7, int), 3, np.random.default_rng(0)).sizes.tolist()
    [3, 2, 2]
    """
    _check_counts(len(labels), num_clients, 1)
    return _by_owner(rng.permutation(len(labels)), _even(len(labels), num_clients), num_clients)


def dirichlet(
    labels: Int[np.ndarray, " n"],
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_examples: int = 1,
) -> Partition:
    """Divide each label among the clients in proportions drawn from ``Dirichlet(alpha)``.

    The smaller ``alpha``, the fewer clients hold most of a label. The draw per label is that of Yurochkin et
    al. (arXiv 1905.12022); Hsu et al. (arXiv 1909.06335) draw per client instead. Then, client by client in
    order, one that holds fewer than ``min_examples`` gets what it lacks, each time a random example of the
    client that holds most (the first of several).
    """
    _check_counts(len(labels), num_clients, min_examples)
    if not 0 < alpha <= 1e6:
        raise UserError(f"alpha is {alpha}; expected above 0 to 1e6 (0.1 is strong skew, 100 nearly none)")
    dealt, owners = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(int)
        dealt.append(members)
        owners.append(np.repeat(np.arange(num_clients), np.diff(cuts, prepend=0, append=len(members))))
    examples, owner = np.concatenate(dealt), np.concatenate(owners)
    _fill_up(owner, num_clients, min_examples, rng)
    return _by_owner(examples, owner, num_clients)


def shards(
    labels: Int[np.ndarray, " n"], num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> Partition:
    """Sort the examples by label, cut them into equal shards and deal each client some (McMahan 2017).

    Most clients hold as many labels as they have shards, or one more.

    >>> shards(np.array([0, 0, 1, 1, 2, 2]), 3, 1, np.random.default_rng(0)).sizes.tolist()
    [2, 2, 2]
    """
    count = num_clients * shards_per_client
    _check_counts(len(labels), num_clients, shards_per_client)
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner_of = np.empty(count, int)
    owner_of[rng.permutation(count)] = np.repeat(np.arange(num_clients), shards_per_client)
    return _by_owner(by_label, owner_of[_even(len(labels), count)], num_clients)


def quantity(
    labels: Int[np.ndarray, " n"],
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_examples: int = 1,
) -> Partition:
    """Shares of all sizes, drawn from ``Dirichlet(alpha)``, with the labels at random.

    A client that would hold fewer than ``min_examples`` gets what it lacks as in ``dirichlet``.
    """
    return dirichlet(np.zeros(len(labels), int), num_clients, alpha, rng, min_examples)


def natural(
    labels: Int[np.ndarray, " n"], num_clients: int, rng: np.random.Generator, min_examples: int = 1
) -> Partition:
    """A client for each distinct label that at least ``min_examples`` have, in their order; nothing is random."""
    del rng
    owners, owner, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    large = sizes >= min_examples
    if large.sum() != num_clients:
        raise UserError(
            f"num_clients is {num_clients}, but the column names {large.sum()} clients with at least {min_examples} "
            f"examples, of {len(owners)} in all; set it to {large.sum()}"
        )
    kept, number = large[owner], np.cumsum(large) - 1
    return _by_owner(np.flatnonzero(kept), number[owner[kept]], num_clients)


def hold_back(partition: Partition, fraction: float, rng: np.random.Generator) -> tuple[Partition, Partition]:
    """What each client trains on, and the ``fraction`` of its examples, rounded down, that it holds out at random.

    >>> train, held = hold_back(Partition.of([np.arange(5), np.array([5])]), 0.4, np.random.default_rng(0))
    >>> train.sizes.tolist(), held.sizes.tolist()
    ([3, 1], [2, 0])
    """
    order = np.lexsort((rng.random(len(partition.examples)), partition.owners))
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order)) - np.repeat(partition.offsets[:-1], partition.sizes)
    held = place < np.repeat((fraction * partition.sizes).astype(int), partition.sizes)

    def part(chosen: Bool[np.ndarray, " n"]) -> Partition:
        return _by_owner(partition.examples[chosen], partition.owners[chosen], len(partition))

    return part(~held), part(held)


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "natural": natural,
}
"""Name -> partition, called with ``labels``, ``num_clients``, ``rng`` and options of its own by keyword."""


def label_counts(
    labels: Int[np.ndarray, " n"], partition: Partition, num_labels: int
) -> Int[np.ndarray, "clients num_labels"]:
    """How many examples of each label each client holds.

    >>> label_counts(np.array([0, 1, 1]), Partition.of([np.array([0, 2]), np.array([1])]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    cells = partition.owners * num_labels + labels[partition.examples]
    return np.bincount(cells, minlength=len(partition) * num_labels).reshape(-1, num_labels)


def describe(counts: Int[np.ndarray, "clients labels"], names: Sequence[str]) -> dict[str, Any]:
    """Who holds how much of what, and the mean distance (total variation) of a client's labels from all labels.

    Of a large population the first ``LISTED`` clients are listed.

    >>> describe(np.array([[2, 0], [0, 2]]), ["a", "b"])["label_skew"]
    0.5
    """
    sizes, whole = counts.sum(1), counts.sum(0) / counts.sum()
    own = counts / np.maximum(sizes, 1)[:, None]
    return {
        "examples": {"least": int(sizes.min()), "median": float(np.median(sizes)), "most": int(sizes.max())},
        "num_clients": len(counts),
        "label_skew": float(np.abs(own - whole).sum(1).mean() / 2),
        "clients": [dict(zip(names, map(int, row), strict=True)) for row in counts[:LISTED]],
    }


def check_partition(partition: Partition) -> None:
    """Refuse a partition that leaves a client without data."""
    empty = np.flatnonzero(partition.sizes == 0)
    if len(empty):
        raise UserError(
            f"client {empty[0]} has no data ({len(empty)} of {len(partition)} clients);"
            " choose fewer clients, a larger alpha or min_examples of 1"
        )


def _check_counts(num_examples: int, num_clients: int, min_examples: int) -> None:
    if num_clients < 1 or min_examples < 0:
        raise UserError(f"num_clients {num_clients}, min_examples {min_examples}: expected at least 1 and 0")
    if num_clients * min_examples > num_examples:
        raise UserError(
            f"num_clients {num_clients} with min_examples {min_examples} needs {num_clients * min_examples}"
            f" examples, but the data has {num_examples}; lower one of them"
        )


def _even(n: int, parts: int) -> Int[np.ndarray, " n"]:
    """Numbers of parts whose sizes differ by one at most, as ``np.array_split`` has them."""
    return np.repeat(np.arange(parts), n // parts + (np.arange(parts) < n % parts))


def _by_owner(examples: Int[np.ndarray, " n"], owner: Int[np.ndarray, " n"], num_clients: int) -> Partition:
    sizes = np.bincount(owner, minlength=num_clients)
    return Partition(examples[np.lexsort((examples, owner))], np.append(0, np.cumsum(sizes)))


def _fill_up(owner: Int[np.ndarray, " n"], num_clients: int, floor: int, rng: np.random.Generator) -> None:
    """Gives each client below ``floor`` what it lacks; changes ``owner``.

    Every gift is of the client that then holds most, the first of several, so the order of givers follows from the
    sizes alone: all that hold the most, by number, then all that hold one less or held that from the start.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    takers = np.repeat(np.arange(num_clients), np.maximum(floor - sizes, 0))
    if not len(takers):
        return
    level = _level(sizes, len(takers))  # nobody gives below it
    spare = np.maximum(sizes - level, 0)
    givers = np.repeat(np.arange(num_clients), spare)
    held = np.repeat(sizes, spare) - (np.arange(len(givers)) - np.repeat(np.cumsum(spare) - spare, spare))
    order = np.lexsort((givers, -held))[: len(takers)]
    picks = [int(rng.integers(n)) for n in held[order]]

    of_giver: dict[int, list[tuple[int, int]]] = {}
    for giver, pick, taker in zip(givers[order].tolist(), picks, takers.tolist(), strict=True):
        of_giver.setdefault(giver, []).append((pick, taker))
    places, ends = np.argsort(owner, kind="stable"), np.cumsum(sizes)
    for giver, gifts in of_giver.items():
        own = places[ends[giver] - sizes[giver] : ends[giver]].tolist()
        for pick, taker in gifts:
            owner[own.pop(pick)] = taker


def _level(sizes: Int[np.ndarray, " clients"], gifts: int) -> int:
    """The highest level such that what clients hold above it makes up ``gifts``."""
    by_size = np.bincount(sizes)
    above = np.cumsum(by_size[::-1])[::-1]  # clients of at least each size
    spare = np.append(np.cumsum(above[::-1])[::-1][1:], 0)  # examples above each size
    return int(np.flatnonzero(spare >= gifts).max())
