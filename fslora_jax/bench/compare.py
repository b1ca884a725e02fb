"""Runs engines in turn on the same round and compares them by paired ratios."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fslora_jax.config import Config, dump_config
from fslora_jax.errors import UserError

VERSIONS = ("fslora_jax", "jax", "jaxlib", "flax", "torch", "transformers", "peft", "drjax")


class Worker:
    """A process that answers commands, and does nothing between two of them.

    Args:
      name: of what it measures, for messages.
      module: run as ``python -m`` with ``arguments``; reads commands from stdin and answers in JSON lines.
      arguments: of the module.
      settings: environment variables beside those of this process.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], settings: Mapping[str, str]):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )

    def answer(self) -> dict[str, Any]:
        """What the process says next.

        Raises:
          UserError: it reports bad input, or has died.
        """
        assert self._process.stdout is not None
        lines = iter(self._process.stdout.readline, "")
        line = next((line for line in lines if line.startswith("{")), "")  # gloo writes to stdout, too
        if not line:
            raise UserError(f"{self.name} died (exit code {self._process.wait()}); its last words are above")
        said = json.loads(line)
        if "error" in said:
            raise UserError(said["error"])
        return said

    def tell(self, command: str) -> None:
        """Sends a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def ask(self, command: str) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self.tell(command)
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def engine_worker(engine: str, config: Path, device: str | None) -> Worker:
    """An engine in its own process, on a kind of device."""
    platforms = {None: {}, "gpu": {"JAX_PLATFORMS": "cuda"}}.get(device, {"JAX_PLATFORMS": device or ""})
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TRANSFORMERS_VERBOSITY": "error"}
    if device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""  # for torch
    return Worker(
        f"engine {engine!r}", "fslora_jax.bench.worker", (engine, str(config)), settings | platforms
    )


def compare(
    config: Config, engines: Sequence[str], *, repeats: int, device: str | None, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Compiles one engine after another, then times them in turn ``repeats`` times, and tells what was found so far.

    Yields JSON-able records: for each engine seconds of every repetition, seconds of compilation, tokens and clients
    per second, peak bytes, the part of the machine's best matrix-product rate and of its data sheet's (``mfu``), and
    the medians of the paired ratios of its time to the others'. ``fill``: real tokens in those that this package
    computes with.
    """
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        workers, facts, first, seconds = {}, {}, {}, {engine: [] for engine in engines}
        for engine in engines:
            tell(f"{engine}: loading and compiling")
            worker = engine_worker(engine, path, device)
            stack.callback(worker.close)
            facts[engine] = worker.answer()
            first[engine] = worker.ask("run")["seconds"]
            workers[engine] = worker  # which now waits, so that the next one loads and compiles undisturbed
        rates = []
        for n in range(repeats):
            rates.append(workers[engines[0]].ask("rate")["flops_per_second"])
            for engine, worker in workers.items():
                tell(f"repetition {n + 1} of {repeats}: {engine}")
                seconds[engine].append(worker.ask("run")["seconds"])
            peaks = {engine: worker.ask("peak")["peak_bytes"] for engine, worker in workers.items()}
            yield record_of(facts, first, seconds, peaks, max(rates))


def record_of(
    facts: Mapping[str, Mapping[str, Any]],
    first: Mapping[str, float],
    seconds: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    rate: float,
) -> dict[str, Any]:
    """What `compare` yields, of each engine's facts, first round, later rounds and peak bytes.

    ``time_over`` are the medians of a row's paired ratios to every other one. ``mfu`` is model FLOPs utilisation, the
    model's operations on real tokens (`Work`) over what the devices' data sheets promise; None where that is not known.
    """
    common = next(iter(facts.values()))
    work = common["work"]
    rows = {}
    for engine, times in seconds.items():
        typical, promised = float(np.median(times)), facts[engine]["peak_flops_per_second"]
        rows[engine] = {
            "seconds": list(times),
            "compile_seconds": max(first[engine] - typical, 0.0),
            "tokens_per_second": work["tokens"] / typical,
            "clients_per_second": work["clients"] / typical,
            "peak_bytes": peaks[engine],
            "of_best_matmul": work["flops"] / typical / rate,
            "peak_flops_per_second": promised,
            "mfu": None if promised is None else work["flops"] / typical / promised,
            "time_over": {
                other: float(np.median(np.array(times) / np.array(theirs)))
                for other, theirs in seconds.items()
            },
        }
    return {
        "machine": machine() | {"device": common["device"]},
        "work": work,
        "fill": common["fill"],
        "best_matmul_flops_per_second": rate,
        "engines": rows,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, system, versions."""
    found = {}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
    }


def processor() -> str:
    """The processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
