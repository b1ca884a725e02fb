"""Who holds what: every example goes to exactly one client."""

from collections.abc import Callable, Sequence

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


PARTITIONS: dict[str, Callable[..., Partition]] = {"iid": iid, "dirichlet": dirichlet}
"""Name -> partition, called with ``labels``, ``num_clients``, ``rng`` and options of its own by keyword."""


def label_counts(
    labels: Int[np.ndarray, " n"], partition: Sequence[Int[np.ndarray, " n_c"]], num_labels: int
) -> Int[np.ndarray, "clients num_labels"]:
    """How many examples of each label each client holds.

    >>> label_counts(np.array([0, 1, 1]), [np.array([0, 2]), np.array([1])], 2).tolist()
    [[1, 1], [0, 1]]
    """
    return np.stack([np.bincount(labels[share], minlength=num_labels) for share in partition])


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
