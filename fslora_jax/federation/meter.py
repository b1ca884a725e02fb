"""What is measured of a round: loss, traffic, speed."""

import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from fslora_jax.data.batches import fill
from fslora_jax.errors import UserError
from fslora_jax.federation.cohort import EMPTY
from fslora_jax.federation.feed import counted_steps
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.setup import Federation
from fslora_jax.methods import Traffic, traffic
from fslora_jax.processes import fetch
from fslora_jax.random import Purpose, device_key


class Meter:
    """Loss and traffic of a round, in order from ``done`` rounds on; refuses a loss that is not finite."""

    def __init__(self, federation: Federation, done: int):
        self._federation = federation
        ks = np.unique(federation.task.population.ranks)
        sent = {int(k): client_traffic(federation, int(k)) for k in ks}
        self._bytes = np.zeros((max(sent) + 1, 2), np.int64)
        for k, of_client in sent.items():
            self._bytes[k] = of_client.down, of_client.up
        self._sent = np.zeros(2, np.int64)
        for t in range(done):
            self._count(t)

    def _count(self, t: int) -> None:
        """Adds the bytes of a round, down to the whole cohort and up from those that report."""
        ids, population = self._federation.cohort(t), self._federation.task.population
        reported = counted_steps(population, self._federation.steps, ids, t) > 0
        down, up = self._bytes[population.ranks[ids]].T
        self._sent += down.sum(), up[reported].sum()

    def measure(self, t: int, cohort: Cohort, losses: jax.Array) -> dict[str, Any]:
        """Mean training loss of the round, and the bytes of all rounds so far.

        Raises:
          UserError: a client's loss is NaN or infinite; names the round and the client.
        """
        ids, by_step, real = fetch((cohort.clients.id, losses, cohort.batches.weights))
        by_step, done = by_step[ids != EMPTY], (real > 0).any(axis=-1)[ids != EMPTY]
        broken = ~np.isfinite(by_step)
        if broken.any():
            which, h = np.argwhere(broken)[0]
            raise UserError(
                f"round {t + 1}: client {ids[ids != EMPTY][which]}: loss {by_step[which, h]} at local step {h + 1}; "
                "lower client_optimizer.learning_rate, set client_optimizer.max_grad_norm, or look at its data; "
                "the last checkpoint is kept"
            )
        self._count(t)
        return {
            "train/loss": mean_loss(by_step, done),
            "clients/reported": int(done.any(1).sum()),
            "traffic/down_bytes": int(self._sent[0]),
            "traffic/up_bytes": int(self._sent[1]),
        }


def mean_loss(by_step: Float[np.ndarray, "C H"], done: Bool[np.ndarray, "C H"]) -> float:
    """The mean over the clients that trained of each one's mean over its steps; 0 where nobody did."""
    reported = done.any(1)
    of_client = (by_step * done).sum(1)[reported] / done.sum(1)[reported]
    return math.fsum(of_client) / max(len(of_client), 1)


def client_traffic(federation: Federation, k: int) -> Traffic:
    """Bytes of one client of rank ``k`` in one round."""
    head = jax.eval_shape(federation.task.model.init_head, device_key(0, Purpose.INIT))
    head_values = sum(math.prod(x.shape) for x in jax.tree.leaves(head))
    return traffic(federation.spec, k, head_values)


def speed_of(cohort: Cohort, clients: int, seconds: float, waited: float) -> dict[str, float]:
    """What the clock says of a round: real tokens only, and which part of the rows they fill.

    ``data_wait`` are the seconds that the devices waited for the round's arrays, beside its ``seconds``, and
    ``data_wait_share`` is their part of both.
    """
    here = cohort.batches.segments.addressable_shards  # all of one size
    filled = float(np.mean([fill(cohort.batches._replace(segments=shard.data)) for shard in here]))
    tokens = filled * cohort.batches.tokens.size
    return {
        "seconds": seconds,
        "clients_per_second": clients / seconds,
        "tokens_per_second": tokens / seconds,
        "fill": filled,
        "data_wait": waited,
        "data_wait_share": waited / (waited + seconds),
        "host_mb": resident_bytes() / 1e6,
    }


def resident_bytes() -> int:
    """Memory that this process takes; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
