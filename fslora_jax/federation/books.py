"""What the host does with what rounds leave: it looks at their losses, evaluates, writes and saves."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import PyTree

from fslora_jax.federation.meter import Seen, speed_of
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.running import Running
from fslora_jax.federation.together import parted, parted_here
from fslora_jax.methods import Server

At = Callable[[int, str], None]
"""Hears of what is done now: the round, and the step."""

AHEAD_SECONDS = 1.0
"""A call that takes longer is seen before the next one starts. The host's part is nothing beside it, and a run that is
asked to stop has one call to end, not two."""


class Display(Protocol):
    """What the loop tells a person while it runs."""

    def stage(self, text: str) -> None:
        """What happens now."""
        ...

    def round(self, done: int, total: int, values: dict[str, float]) -> None:
        """A round has ended."""
        ...


class Call(NamedTuple):
    """Rounds that the devices were asked for, and what there will be to see of them.

    ``cohort`` and ``memory`` are on the devices and of all runs together, as is ``shown``. The devices were given the
    call at ``started``, after they had ``waited`` so many seconds for its arrays.
    """

    rounds: range
    cohort: Cohort
    shown: Seen
    memory: dict[str, PyTree]
    started: float
    waited: float

    def has_ended(self) -> bool:
        """Whether the devices are done with it."""
        losses: Any = self.shown.losses
        return losses.is_ready()


class Books:
    """The books of runs in lock-step."""

    def __init__(self, runs: Sequence[Running], display: Display, at: At):
        self._runs, self._display, self._at = runs, display, at
        self._ended, self._seconds = 0.0, math.inf

    def due(self, rounds: range) -> bool:
        """Whether a call has to be settled before the devices get the next one."""
        return (
            self._evaluates(rounds.stop)
            or self._saves(rounds.stop)
            or any(one.remembers for one in self._runs)
            or self._seconds > AHEAD_SECONDS
        )

    def see(self, call: Call) -> None:
        """Waits for a call and writes what it was; a run that left the finite numbers has failed then."""
        self._take(call)
        self._write(call)

    def settle(self, call: Call, server: Server) -> None:
        """As `see`, with the ``server`` after the call, which is evaluated where that is due."""
        self._take(call)
        for one, own in zip(self._runs, parted(server, len(self._runs)), strict=True):
            one.server = own
        if self._evaluates(call.rounds.stop):
            self._at(call.rounds.stop, "evaluating")
            for one in going(self._runs):
                one.evaluate()
        self._write(call)

    def save(self, done: int, *, stopping: bool) -> None:
        """Saves what was settled after ``done`` rounds, where that is due or the run stops."""
        if stopping or self._saves(done):
            self._at(done, "saving")
            for one in going(self._runs):
                one.save()

    def _evaluates(self, done: int) -> bool:
        config = self._runs[0].config
        return done == config.federation.num_rounds or done % config.evaluate_every == 0

    def _saves(self, done: int) -> bool:
        config = self._runs[0].config
        return done == config.federation.num_rounds or done % config.checkpoint_every == 0

    def _take(self, call: Call) -> None:
        self._at(call.rounds.start + 1, "training")
        seen = jax.tree.map(np.asarray, call.shown)
        ended = time.perf_counter()
        self._seconds, self._ended = ended - max(call.started, self._ended), ended
        count = len(self._runs)
        parts = zip(self._runs, parted_here(seen, count), parted(call.memory, count), strict=True)
        for one, own, memory in parts:
            if one.failure is None:
                one.take(call.rounds, own, memory)

    def _write(self, call: Call) -> None:
        runs, federation, config = self._runs, self._runs[0].federation, self._runs[0].config
        passes, rounds = federation.steps.passes, len(runs) * len(call.rounds)
        speed = speed_of(call.cohort, passes, config.clients_per_round, self._seconds, call.waited, rounds)
        for one in going(runs):
            one.write(speed)
        for one in going(runs)[:1]:
            self._display.round(call.rounds.stop, config.federation.num_rounds, one.told)


def going(runs: Sequence[Running]) -> list[Running]:
    """Those that have not failed."""
    return [one for one in runs if one.failure is None]
