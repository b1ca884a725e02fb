"""Who holds what: every example goes to exactly one client."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fslora_jax.errors import UserError

Partition = list[Int[np.ndarray, " n_c"]]
"""The sorted example numbers of each client."""


def iid(labels: Int[np.ndarray, " n"], num_clients: int, rng: np.random.Generator) -> Partition:
    """Deal the examples at random, in shares that differ by one at most.

    >>> [len(share) for share in iid(np.zeros(7, int), 3, np.random.default_rng(0))]
    [3, 2, 2]
    """
    _check_counts(len(labels), num_clients, 1)
    return [np.sort(share) for share in np.array_split(rng.permutation(len(labels)), num_clients)]


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
    shares: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(int)
        for share, part in zip(shares, np.split(members, cuts), strict=True):
            share.extend(part.tolist())
    _fill_up(shares, min_examples, rng)
    return [np.sort(np.array(share, np.int64)) for share in shares]


def shards(
    labels: Int[np.ndarray, " n"], num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> Partition:
    """Sort the examples by label, cut them into equal shards and deal each client some (McMahan 2017).

    Most clients hold as many labels as they have shards, or one more.

    >>> [len(share) for share in shards(np.array([0, 0, 1, 1, 2, 2]), 3, 1, np.random.default_rng(0))]
    [2, 2, 2]
    """
    count = num_clients * shards_per_client
    _check_counts(len(labels), num_clients, shards_per_client)
    shuffled = rng.permutation(len(labels))
    cut = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], count)
    dealt = rng.permutation(count).reshape(num_clients, shards_per_client)
    return [np.sort(np.concatenate([cut[shard] for shard in mine])) for mine in dealt]


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
    """A client for each distinct label, in their order; nothing is random."""
    del rng
    owners, sizes = np.unique(labels, return_counts=True)
    if len(owners) != num_clients:
        raise UserError(
            f"num_clients is {num_clients}, but the column names {len(owners)} clients; set it to {len(owners)}"
        )
    if sizes.min() < min_examples:
        raise UserError(
            f"min_examples is {min_examples}, but client {sizes.argmin()} has {sizes.min()}; lower it, or remove "
            "the small clients from the data"
        )
    return [np.flatnonzero(labels == owner) for owner in owners]


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "natural": natural,
}
"""Name -> partition, called with ``labels``, ``num_clients``, ``rng`` and options of its own by keyword."""


def label_counts(
    labels: Int[np.ndarray, " n"], partition: Sequence[Int[np.ndarray, " n_c"]], num_labels: int
) -> Int[np.ndarray, "clients num_labels"]:
    """How many examples of each label each client holds.

    >>> label_counts(np.array([0, 1, 1]), [np.array([0, 2]), np.array([1])], 2).tolist()
    [[1, 1], [0, 1]]
    """
    return np.stack([np.bincount(labels[share], minlength=num_labels) for share in partition])


def describe(counts: Int[np.ndarray, "clients labels"], names: Sequence[str]) -> dict[str, Any]:
    """Who holds how much of what, and the mean distance (total variation) of a client's labels from all labels.

    >>> describe(np.array([[2, 0], [0, 2]]), ["a", "b"])["label_skew"]
    0.5
    """
    sizes, whole = counts.sum(1), counts.sum(0) / counts.sum()
    own = counts / np.maximum(sizes, 1)[:, None]
    return {
        "examples": {"least": int(sizes.min()), "median": float(np.median(sizes)), "most": int(sizes.max())},
        "label_skew": float(np.abs(own - whole).sum(1).mean() / 2),
        "clients": [dict(zip(names, map(int, row), strict=True)) for row in counts],
    }


def check_partition(partition: Sequence[Int[np.ndarray, " n_c"]]) -> None:
    """Refuse a partition that leaves a client without data."""
    empty = [client for client, share in enumerate(partition) if len(share) == 0]
    if empty:
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


def _fill_up(shares: list[list[int]], min_examples: int, rng: np.random.Generator) -> None:
    sizes = np.array([len(share) for share in shares])
    for client in np.flatnonzero(sizes < min_examples):
        while sizes[client] < min_examples:
            donor = int(sizes.argmax())
            shares[client].append(shares[donor].pop(rng.integers(sizes[donor])))
            sizes[client] += 1
            sizes[donor] -= 1
