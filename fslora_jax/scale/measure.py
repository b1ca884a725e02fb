"""Measures one point of a curve: its processes start, compile, run, and are gone before the next."""

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fslora_jax.bench.compare import Worker
from fslora_jax.errors import UserError
from fslora_jax.processes import ENVIRONMENT
from fslora_jax.scale.curves import Point

SHORT, MOST = 5.0, 50
"""Seconds for which rounds are timed at least, and how many that may be."""


def measure(point: Point, repeats: int) -> dict[str, Any]:
    """The record of a point.

    Seconds are the median of at least ``repeats`` rounds after one that is not counted, the slowest process of each;
    what a device holds or sends is that of the first process, and memory of processes is added up.

    Raises:
      UserError: a process reports bad input, or has died.
    """
    with workers_of(point) as workers:
        facts, *_ = [worker.answer() for worker in workers]
        rounds = timed(workers, repeats) if point.runs else []
        peaks = ask_all(workers, "peak") if point.runs else []
    record = {"line": point.line, "x": point.x, "clients": point.config.clients_per_round} | facts
    record["chunks"] = point.config.federation.cohort_chunks
    if not point.runs:
        return record
    for name in ("seconds", "feed_seconds"):
        slowest = [max(process[name] for process in one) for one in rounds]
        record[name] = float(np.median(slowest))
        record[f"all_{name}"] = slowest
    record["seconds_per_client"] = record["seconds"] / record["clients"]
    record["peak_bytes"] = sum(process["peak_bytes"] for process in peaks)
    return record


def timed(workers: list[Worker], repeats: int) -> list[list[dict[str, Any]]]:
    """What all say of each round; of short ones more are timed, for `SHORT` seconds."""
    ask_all(workers, "run")  # pages are touched and threads started here
    rounds: list[list[dict[str, Any]]] = []
    while len(rounds) < repeats or (len(rounds) < MOST and sum(r[0]["seconds"] for r in rounds) < SHORT):
        rounds.append(ask_all(workers, "run"))
    return rounds


def ask_all(workers: list[Worker], command: str) -> list[dict[str, Any]]:
    """All do the same, at the same time."""
    for worker in workers:
        worker.tell(command)
    return [worker.answer() for worker in workers]


@contextmanager
def workers_of(point: Point) -> Iterator[list[Worker]]:
    """The processes of a point.

    Raises:
      UserError: its devices cannot be divided among them.
    """
    devices, count = point.devices, point.processes
    if devices is not None and devices % count:
        raise UserError(f"{point.name}: {devices} devices in {count} processes; expected a multiple")
    virtual = (
        {} if devices is None else {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // count)}
    )
    settings = virtual | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "point.json"
        plain = point._replace(config=point.config.model_dump(mode="json"))
        path.write_text(json.dumps(plain._asdict()), encoding="utf-8")
        workers = []
        for who in meeting(count):
            worker = Worker(point.name, "fslora_jax.scale.worker", [str(path)], settings | who)
            workers.append(worker)
        for worker in workers:
            stack.callback(worker.close)
        yield workers


def meeting(count: int) -> list[dict[str, str]]:
    """What tells processes of this machine who they are; nothing for one alone."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        dict(zip(ENVIRONMENT, (address, str(count), str(number)), strict=True)) for number in range(count)
    ]
