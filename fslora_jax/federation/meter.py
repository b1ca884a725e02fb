"""What is measured of a round: loss, traffic, speed."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fslora_jax.errors import Diverged
from fslora_jax.federation.cohort import EMPTY
from fslora_jax.federation.feed import round_seconds
from fslora_jax.federation.local import Passes
from fslora_jax.federation.round import Cohort, Played
from fslora_jax.federation.setup import Federation
from fslora_jax.methods import Client, Traffic
from fslora_jax.processes import all_gathered
from fslora_jax.random import Purpose, device_key


class Seen(NamedTuple):
    """What a host sees of the rounds of a call: the clients, losses of their steps, weights of their examples, and
    what the method tells."""

    clients: Client
    losses: Float[Array, "*rounds groups chunks slots H"]
    weights: Float[Array, "*rounds groups chunks slots H E"]
    told: dict[str, Float[Array, "*rounds"]]


def shown(cohort: Cohort, played: Played) -> Seen:
    """The same on the devices, whole in every process: asked for before they are given the next round."""
    return all_gathered(Seen(cohort.clients, played.losses, cohort.batches.weights, played.told))


class Meter:
    """Loss and traffic of a round; refuses a loss that is not finite.

    ``last`` is the record of the round before, from which bytes and simulated seconds go on counting.
    """

    def __init__(self, federation: Federation, last: dict[str, Any]):
        self._method, self._head = federation.method, head_values(federation)
        self._federation, self._seconds = federation, last.get("clock/simulated_seconds", 0.0)
        self._down, self._up = last.get("traffic/down_bytes", 0), last.get("traffic/up_bytes", 0)

    def _count(self, t: int, clients: Client) -> None:
        """Adds the bytes of a round: down to the whole cohort, up from those that report."""
        down, up = self._method.traffic(t, clients, self._head)
        self._down += int(np.sum(down))
        self._up += int(np.sum(up * (clients.weight > 0)))

    def _clock(self, t: int) -> dict[str, float]:
        """Simulated seconds of all rounds so far, where the clients have devices."""
        population, feed = self._federation.task.population, self._federation.feed
        if population.clock is None:
            return {}
        self._seconds += round_seconds(population, feed.steps, feed.cohort(t), t)
        return {"clock/simulated_seconds": self._seconds}

    def measure(self, t: int, seen: Seen) -> dict[str, Any]:
        """Mean training loss of the round unless nobody reported, bytes of all rounds so far, what the method tells.

        Raises:
          UserError: a client's loss is NaN or infinite; names the round and the client.
        """
        ids = np.asarray(seen.clients.id)
        by_step: np.ndarray = np.asarray(seen.losses)[ids != EMPTY]
        done: np.ndarray = np.any(np.asarray(seen.weights)[ids != EMPTY] > 0, axis=-1)
        broken = ~np.isfinite(by_step)
        if broken.any():
            which, h = np.argwhere(broken)[0]
            raise Diverged(
                f"round {t + 1}: client {ids[ids != EMPTY][which]}: loss {by_step[which, h]} at local step {h + 1}; "
                "lower client_optimizer.learning_rate, set client_optimizer.max_grad_norm, or look at its data; "
                "the last checkpoint is kept"
            )
        self._count(t, jax.tree.map(lambda x: x[ids != EMPTY], seen.clients))
        reported = int(done.any(1).sum())
        loss = {"train/loss": mean_loss(by_step, done)} if reported else {}
        return (
            self._clock(t)
            | loss
            | {
                "clients/reported": reported,
                "traffic/down_bytes": self._down,
                "traffic/up_bytes": self._up,
                **{name: float(value) for name, value in seen.told.items()},
            }
        )


def mean_loss(by_step: Float[np.ndarray, "C H"], done: Bool[np.ndarray, "C H"]) -> float:
    """The mean over the clients that trained, at least one, of each one's mean over its steps."""
    reported = done.any(1)
    of_client = (by_step * done).sum(1)[reported] / done.sum(1)[reported]
    return math.fsum(of_client) / len(of_client)


def client_traffic(federation: Federation, k: int) -> Traffic:
    """Bytes of one client of rank ``k`` in the first round, with the others of that cohort, whose stack it may get."""
    ids = federation.feed.cohort(0)
    ks = np.append(k, federation.task.population.ranks[ids[1:]])
    cohort = Client(*jax.tree.map(np.asarray, (ids, ks, np.ones(len(ids)))))
    down, up = (
        np.broadcast_to(x, len(ids)) for x in federation.method.traffic(0, cohort, head_values(federation))
    )
    return Traffic(int(down[0]), int(up[0]))


def head_values(federation: Federation) -> int:
    """Values of the trained head."""
    head = jax.eval_shape(federation.task.model.init_head, device_key(0, Purpose.INIT))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(head))


def speed_of(
    cohort: Cohort, passes: Passes | None, clients: int, seconds: float, waited: float, rounds: int = 1
) -> dict[str, float]:
    """What the clock says of a round, or on average of ``rounds`` that were one dispatch: real tokens only, and which
    part they are of all that is computed.

    ``data_wait`` are the seconds that the devices waited for the round's arrays, beside its ``seconds``, and
    ``data_wait_share`` is their part of both.
    """
    here = cohort.batches.segments.addressable_shards  # all of one size
    real, computed = np.sum([cells(np.asarray(shard.data), passes) for shard in here], axis=0)
    tokens = float(real) / sum(shard.data.size for shard in here) * cohort.batches.tokens.size
    return {
        "seconds": seconds / rounds,
        "clients_per_second": rounds * clients / seconds,
        "tokens_per_second": tokens / seconds,
        "fill": float(real / computed),
        "data_wait": waited / rounds,
        "data_wait_share": waited / (waited + seconds),
        "host_mb": resident_bytes() / 1e6,
    }


def cells(segments: Int[np.ndarray, "*lanes C H B L"], passes: Passes | None) -> tuple[int, int]:
    """Tokens of examples, and tokens that are computed with.

    >>> segments = np.array([[[[[1, 1], [0, 0]]], [[[1, 0], [0, 0]]]]])  # two clients that need one row of two
    >>> cells(segments, None), cells(segments, Passes(1))
    ((3, 8), (3, 4))
    """
    real = segments > 0
    if passes is None or not passes.skip:
        return int(real.sum()), segments.size
    *_, clients, _, rows, row_length = segments.shape
    taken = np.where(real.any(-1), np.arange(1, rows + 1), 0).max(axis=(-3, -1))
    computed = -(-taken // passes.rows) * passes.rows * clients * row_length
    return int(real.sum()), int(computed.sum())


def resident_bytes() -> int:
    """Memory that this process takes; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
