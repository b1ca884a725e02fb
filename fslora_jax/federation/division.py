"""Who holds which examples, as the config divides them among the clients."""

import numpy as np

from fslora_jax.config import Config
from fslora_jax.data.examples import Examples
from fslora_jax.data.partition import PARTITIONS, Partition, check_partition, hold_back
from fslora_jax.errors import UserError
from fslora_jax.random import Purpose, host_rng


def divide(config: Config, train: Examples) -> tuple[Partition, Partition]:
    """Which examples each client trains on, and which it holds out."""
    p, (marks, _) = config.partition, marks_of(config, train)
    skew, floor = {"alpha": p.dirichlet_alpha}, {"min_examples": p.min_examples}
    options = {
        "iid": {},
        "dirichlet": skew | floor,
        "shards": {"shards_per_client": p.shards_per_client},
        "quantity": skew | floor,
        "natural": floor,
    }
    rng = host_rng(config.seed, Purpose.PARTITION)
    partition = PARTITIONS[p.name](marks, config.federation.num_clients, rng=rng, **options[p.name])
    parts = hold_back(partition, p.held_out, host_rng(config.seed, Purpose.HELD_OUT))
    check_partition(parts[0])
    if (only := config.federation.only_client) is not None:
        parts = Partition.of([parts[0][only]]), Partition.of([parts[1][only]])
    return parts


def marks_of(config: Config, train: Examples) -> tuple[np.ndarray, tuple[str, ...]]:
    """What the partition goes by, as numbers, and their names: labels, tasks or natural clients.

    Raises:
      UserError: the data has nothing of the kind.
    """
    p = config.partition
    if p.name == "natural" or p.by == "task":
        if not train.groups:
            needed = "data.client_column" if p.name == "natural" else "data.parts"
            raise UserError(
                f"partition: {p.name} by {p.by} needs {needed}; set it, or choose another partition"
            )
        names, marks = np.unique(train.groups, return_inverse=True)
        return marks, tuple(names.tolist())
    if train.label_names:
        return train.labels, train.label_names
    if p.name in ("dirichlet", "shards"):
        raise UserError(
            f"partition.name: {p.name} needs labels, but the data has numbers; choose iid or quantity"
        )
    return np.zeros(len(train.labels), int), ("examples",)
