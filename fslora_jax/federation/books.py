"""What the host does with what rounds leave: it looks at their losses, evaluates, writes and saves."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import PyTree

from fslora_jax.federation.calls import Call
from fslora_jax.federation.meter import Seen, speed_of
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.running import Running
from fslora_jax.federation.together import parted, parted_here
from fslora_jax.methods import Server
from fslora_jax.watchdog import Step

At = Callable[[int, Step], None]
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


class Given(NamedTuple):
    """A call that the devices were given, and what there will be to see of it.

    ``cohort`` and ``memory`` are on the devices and of all runs together, as is ``shown``. The devices were given it
    at ``started``, after they had ``waited`` so many seconds for its arrays.
    """

    call: Call
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

    def due(self, call: Call) -> bool:
        """Whether a call has to be settled before the devices get the next one."""
        remember = any(one.remembers for one in self._runs)
        return call.evaluates or call.saves or remember or self._seconds > AHEAD_SECONDS

    def see(self, given: Given) -> None:
        """Waits for a call and writes what it was; a run that left the finite numbers has failed then."""
        self._take(given)
        self._write(given)

    def settle(self, given: Given, server: Server) -> None:
        """As `see`, with the ``server`` after the call, which is evaluated where that is due."""
        self._take(given)
        for one, own in zip(self._runs, parted(server, len(self._runs)), strict=True):
            one.server = own
        if given.call.evaluates:
            self._at(given.call.rounds.stop, "evaluating")
            for one in going(self._runs):
                one.evaluate()
        self._write(given)

    def save(self, call: Call, *, stopping: bool) -> None:
        """Saves what was settled of a call, where that is due or the run stops."""
        if stopping or call.saves:
            self._at(call.rounds.stop, "saving")
            for one in going(self._runs):
                one.save()

    def _take(self, given: Given) -> None:
        rounds, count = given.call.rounds, len(self._runs)
        self._at(rounds.start + 1, "training")
        seen = jax.tree.map(np.asarray, given.shown)
        ended = time.perf_counter()
        self._seconds, self._ended = ended - max(given.started, self._ended), ended
        parts = zip(self._runs, parted_here(seen, count), parted(given.memory, count), strict=True)
        for one, own, memory in parts:
            if one.failure is None:
                one.take(rounds, own, memory)

    def _write(self, given: Given) -> None:
        runs, federation, config = self._runs, self._runs[0].federation, self._runs[0].config
        passes, rounds = federation.feed.steps.passes, given.call.rounds
        count = len(runs) * len(rounds)
        speed = speed_of(given.cohort, passes, config.clients_per_round, self._seconds, given.waited, count)
        for one in runs:
            one.write(speed)
        for one in going(runs)[:1]:
            self._display.round(rounds.stop, config.federation.num_rounds, one.told)


def going(runs: Sequence[Running]) -> list[Running]:
    """Those that have not failed."""
    return [one for one in runs if one.failure is None]
