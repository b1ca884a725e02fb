"""Several processes tell each other where they are, so that one that hangs or has died is named.

Each writes ``RUN/heartbeats/NUMBER`` every few seconds: host, round, step. All read the files of the others, and so can
a person. Times go by the reader's own clock, from when a file last changed; nothing is ended here.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax

FOLDER = "heartbeats"

Step = Literal[
    "loading", "waiting for data", "compiling", "training", "evaluating", "saving", "writing results"
]
STEPS: tuple[Step, ...] = get_args(Step)
"""What a process can be at, in the order of a round."""

BEATS = 10
"""Signs of life in the time after which a process counts as silent."""


class Said(NamedTuple):
    """What a process writes: where it runs, the round and step it is at, and how often it has written."""

    host: str
    pid: int
    round: int
    step: Step
    beats: int


class Heard(NamedTuple):
    """What another knows of it: seconds on its own clock when the file last changed, and when round or step did."""

    said: Said
    beat: float
    moved: float


def hear(folder: Path, count: int, known: Mapping[int, Heard], now: float) -> dict[int, Heard]:
    """The processes whose files are there: none before the start and after the end."""
    found = {}
    for number in range(count):
        try:
            said = Said(**json.loads((folder / str(number)).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        old = known.get(number, Heard(said, now, now))
        moved = old.moved if said[2:4] == old.said[2:4] else now
        found[number] = Heard(said, old.beat if said == old.said else now, moved)
    return found


def complaint(heard: Mapping[int, Heard], now: float, patience: float, silence: float) -> str | None:
    """One line that names who is silent, or at what the run hangs; None while all is well.

    >>> said = Said("host", 7, 3, "training", beats=9)
    >>> here, late = Heard(said, 99.0, 80.0), Heard(said._replace(step="waiting for data"), 99.0, 70.0)
    >>> complaint({0: here, 1: late}, now=100.0, patience=15.0, silence=15.0)
    'nothing has moved for 15 s: process 1 (host, pid 7) is in round 3, waiting for data'
    """
    silent = {n: h for n, h in heard.items() if now - h.beat >= silence}
    if silent:
        return (
            f"no sign of life for {silence:g} s from {listed(silent)}; if it has died, the other processes end "
            "too, and the same command in each of them goes on from the last checkpoint"
        )
    if not heard or any(now - h.moved < patience for h in heard.values()):
        return None
    least = min(place(h) for h in heard.values())
    return f"nothing has moved for {patience:g} s: " + listed(
        {n: h for n, h in heard.items() if place(h) == least}
    )


def listed(heard: Mapping[int, Heard]) -> str:
    """Processes with host and place."""
    return "; ".join(
        f"process {number} ({h.said.host}, pid {h.said.pid}) is in round {h.said.round}, {h.said.step}"
        for number, h in heard.items()
    )


def place(heard: Heard) -> tuple[int, int]:
    """How far a process has come."""
    return heard.said.round, STEPS.index(heard.said.step)


@contextmanager
def watchdog(run_dir: Path, patience: float, lifetime: float) -> Iterator[Callable[[int, Step], None]]:
    """Gives ``at(round, step)``, with which a process says where it is; alone, it need not.

    A thread complains on stderr, once for each thing that is wrong: when nothing has moved for ``patience`` seconds, or
    when a process has been silent for so long or for most of ``lifetime``, after which JAX ends all.
    """
    silence = min(patience, 0.7 * lifetime)
    if jax.process_count() == 1:
        yield lambda *_: None
        return
    here = Said(socket.gethostname(), os.getpid(), 0, STEPS[0], 0)
    over = threading.Event()

    def at(round: int, step: Step) -> None:
        nonlocal here
        here = here._replace(round=round, step=step)

    def watch() -> None:
        heard, told, interval = {}, None, silence / BEATS
        for beats in range(sys.maxsize):
            write(run_dir / FOLDER, here._replace(beats=beats))
            now = time.monotonic()
            heard = hear(run_dir / FOLDER, jax.process_count(), heard, now)
            wrong = complaint(heard, now, patience, silence)
            if wrong != told:
                print(f"fslora: {wrong or 'going on'}", file=sys.stderr, flush=True)
            told = wrong
            if over.wait(interval):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield at
    finally:
        over.set()
        thread.join(timeout=5)
    (run_dir / FOLDER / str(jax.process_index())).unlink(
        missing_ok=True
    )  # after a failure it stays, to be read


def write(folder: Path, said: Said) -> None:
    """A process's own file; one that cannot be written, on a full disk say, is no reason to stop a run."""
    path = folder / str(jax.process_index())
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(exist_ok=True)
        fresh.write_text(json.dumps(said._asdict()), encoding="utf-8")
        os.replace(fresh, path)
    except OSError:
        return
