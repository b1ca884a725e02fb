"""Leaving when the machine is taken away: SIGTERM lets the round end, saves, and exits with a code to restart on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM
"""What the command line exits with: `launch/` has SLURM and SkyPilot go on; Kubernetes restarts on any code but 0."""


class Preempted(Exception):
    """The run was asked to stop and has saved what it did; the same command goes on."""


@contextmanager
def watching() -> Iterator[Callable[[range], bool]]:
    """Gives ``due(rounds)``, which tells after these rounds whether to save and stop; it is asked about all in turn.

    Among several processes JAX's preemption service has them all stop after the same round, whichever was asked.
    Python takes signals in its main thread alone; elsewhere nobody watches.
    """
    if jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        # JAX says yes to one number alone, the one after all that any process has asked about: so none is left out.
        yield lambda rounds: sum(reached(t + 1) for t in rounds) > 0
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda _: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
