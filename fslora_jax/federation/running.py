"""One run while it trains: its server, what it logs and saves, and what its clients remember."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config
from fslora_jax.errors import Diverged, UserError
from fslora_jax.evaluate import measure
from fslora_jax.federation.calls import by_round
from fslora_jax.federation.memories import remembering
from fslora_jax.federation.meter import Meter, Seen
from fslora_jax.federation.privacy import privacy_record
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.setup import (
    Federation,
    global_model,
    initial_server,
    open_memories,
    run_constants,
)
from fslora_jax.log import JsonLines, Logger, open_loggers, read_records
from fslora_jax.processes import leader_first
from fslora_jax.rundir import CHECKPOINTS, MEMORIES, METRICS
from fslora_jax.sharding import over_clients
from fslora_jax.types import Batch, Score

Evaluation = Callable[[PyTree, PyTree, Batch], Score]


class Running:
    """A run from its last checkpoint on, ``done`` rounds of which have been seen.

    ``server`` is that of the last evaluation or checkpoint; the next call of the device takes its place.
    ``failure`` is why its training has ended early: it left the finite numbers, and is told of no more. ``told`` is
    its newest record.
    """

    def __init__(
        self,
        config: Config,
        federation: Federation,
        run_dir: Path,
        evaluation: Evaluation,
        load_seconds: float,
        tell: Callable[[str], None],
    ):
        self.config, self.federation, self.run_dir = config, federation, run_dir
        self.load_seconds = load_seconds
        self.constants = run_constants(config, federation.mesh)
        self.failure: Diverged | None = None
        self.told: dict[str, Any] = {}
        self._records: list[dict[str, Any]] = []
        first = initial_server(config, federation)
        self._memories = open_memories(config, federation, first, run_dir / MEMORIES)
        self._checkpoints = Checkpoints(run_dir / CHECKPOINTS, config.keep_checkpoints)
        self.done, self.server = self._checkpoints.resume(first, self._memories, tell)
        kept = self.done or -1  # without a checkpoint the evaluation of the start is done again, too
        self._loggers: list[Logger] = []
        self._clocks: list[Logger] = []
        leader_first(partial(self._open, kept))
        self._meter = Meter(federation, last_record(run_dir, self.done))
        self._private = privacy_record(config, federation.method)
        self._evaluation = evaluation
        self._test = jax.device_put(federation.task.test.batches, over_clients(federation.mesh))

    def _open(self, kept: int) -> None:
        """Opens what is written to, with the records of the rounds that are ``kept``.

        Raises:
          UserError: one is not there.
        """
        check_recorded(self.run_dir, self.done)
        self._loggers = open_loggers(self.config.loggers, self.run_dir, kept)
        self._clocks = [JsonLines(self.run_dir / "timings.jsonl", kept)]

    def remembering(self, cohort: Cohort) -> Cohort:
        """A cohort whose clients know what they remember; only after the round before."""
        return remembering(cohort, self._memories)

    @property
    def remembers(self) -> bool:
        """Whether a round needs what clients remember of the one before."""
        return self._memories is not None

    def take(self, rounds: range, seen: Seen, memory: dict[str, PyTree]) -> None:
        """Takes over what some rounds left, but the server."""
        self.done = rounds.stop
        for t, part in by_round(rounds, seen):
            try:
                self._records.append({"round": t + 1, **self._meter.measure(t, part)})
            except Diverged as error:
                self.failure = error
                return
        if self._memories is not None:
            self._memories.scatter(np.asarray(seen.clients.id), memory)

    def begin(self, twin: "Running") -> None:
        """Evaluates the start, or takes over what a ``twin`` found, which starts from the same weights."""
        if twin is self:
            self._records = [{"round": 0}]
            self.evaluate()
        else:
            self._records, self.failure = [dict(record) for record in twin._records], twin.failure

    def evaluate(self) -> None:
        """Adds to the newest record what the global adapter is worth on the held-out examples."""
        task = self.federation.task
        score = self._evaluation(*global_model(self.federation, self.server), self._test)
        found = measure(score, task.test, task.metrics)
        if not math.isfinite(found["loss"]):
            self.failure = Diverged(
                f"round {self.done}: loss {found['loss']} on the held-out examples; lower "
                "client_optimizer.learning_rate, or look at the model's weights; the last checkpoint is kept"
            )
            self._records.pop()
            return
        self._records[-1] |= {f"eval/{name}": value for name, value in found.items()}
        self._records[-1] |= self._private(self.done) if self.done else {}

    def write(self, speed: dict[str, float] | None = None) -> None:
        """Writes the records that are not written yet, of rounds with what the clock says of each."""
        for record in self._records:
            for logger in self._loggers:
                logger.write(record)
            for clock in self._clocks if speed else []:
                clock.write({"round": record["round"], **(speed or {})})
            self.told = record | (speed or {})
        self._records = []

    def save(self) -> None:
        """A checkpoint, unless the last local steps left the finite numbers, of which there is no loss yet."""
        if not all_finite((self.server.weights, self.server.base_delta)):
            self.failure = Diverged(
                f"round {self.done}: the server's weights are not finite; lower client_optimizer.learning_rate, or set "
                "client_optimizer.max_grad_norm; the last checkpoint is kept"
            )
            return
        self._checkpoints.save(self.done, self.server, self._memories)

    def close(self) -> None:
        """Releases files and folder, each also where another one cannot be written any more."""
        with ExitStack() as stack:
            for opened in (*self._loggers, *self._clocks, self._checkpoints):
                stack.callback(opened.close)


@jax.jit
def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether there is no NaN and no infinity."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def check_recorded(run_dir: Path, done: int) -> None:
    """Refuses to go on after ``done`` rounds without the record of one of them, as after a crash of the machine.

    Raises:
      UserError: names the round, and what to do.
    """
    if not done:
        return
    path = run_dir / METRICS
    known = {record.get("round") for record in read_records(path)}
    missing = next((t for t in range(done + 1) if t not in known), None)
    if missing is not None:
        raise UserError(
            f"{path}: no record of round {missing}, though there is a checkpoint of round {done}; put back a copy of "
            f"the file, or delete the checkpoints from round {missing} on to do their rounds again"
        )


def last_record(run_dir: Path, done: int) -> dict[str, Any]:
    """What was recorded of the last round that counts."""
    records = read_records(run_dir / METRICS) if done else []
    return next((record for record in records if record["round"] == done), {})
