"""A run from the first round to the exported adapter; killed at any point, it goes on to the same end."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from fslora_jax import figures
from fslora_jax.backend import compiler_options
from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config
from fslora_jax.data.partition import LISTED, describe, label_counts
from fslora_jax.errors import UserError
from fslora_jax.evaluate import make_evaluation, measure
from fslora_jax.federation.exports import write_global
from fslora_jax.federation.feed import make_cohort
from fslora_jax.federation.memories import Memories
from fslora_jax.federation.meter import Meter, client_traffic, head_values, speed_of
from fslora_jax.federation.method import check_method
from fslora_jax.federation.round import Cohort, Keys, base_keys, make_round
from fslora_jax.federation.setup import Federation, global_model, initial_server, open_memories, set_up
from fslora_jax.log import JsonLines, Logger, open_loggers, read_records
from fslora_jax.methods import Server, traffic
from fslora_jax.models import shifted
from fslora_jax.preemption import Preempted, watching
from fslora_jax.processes import leader_first, leads
from fslora_jax.rundir import (
    MEMORIES,
    keep_start,
    open_run,
    own_start,
    read_summary,
    write_atomically,
    write_summary,
)
from fslora_jax.sharding import replicated


class Display(Protocol):
    """What the loop tells a person while it runs."""

    def stage(self, text: str) -> None:
        """What happens now."""
        ...

    def round(self, done: int, total: int, values: dict[str, float]) -> None:
        """A round has ended."""
        ...


def run(config: Config, run_dir: Path, display: Display) -> dict[str, Any]:
    """Trains to the end, from the last checkpoint if there is one, and returns the summary.

    Raises:
      UserError: bad input, a full disk, a client's loss that is not finite, a run folder of another config.
      Preempted: SIGTERM came; the rounds so far are saved.
    """
    check_method(config)
    with ExitStack() as stack:
        leader_first(lambda: stack.enter_context(open_run(run_dir, config)))
        finished = read_summary(run_dir)
        if finished is not None:
            display.stage("already finished")
            return finished
        display.stage("loading model and data")
        federation = set_up(own_start(run_dir, config))
        leader_first(lambda: keep_start(run_dir, config))
        if cut := told_truncated(config, federation):
            display.stage(cut)
        leader_first(lambda: draw_partition(federation, run_dir))
        server, compile_seconds = train(config, federation, run_dir, display)
        display.stage("writing adapter and figures")
        leader_first(lambda: write_results(config, federation, server, run_dir, compile_seconds))
        return read_summary(run_dir) or {}


def write_results(
    config: Config, federation: Federation, server: Server, run_dir: Path, compile_seconds: float
) -> None:
    """Adapter, figures, and last the summary."""
    write_global(config, federation, server, run_dir / "adapter")
    records = read_records(run_dir / "metrics.jsonl")
    figures.run_figures(records, run_dir / "figures")
    write_summary(run_dir, summarise(config, federation, records, run_dir, compile_seconds))


def train(config: Config, federation: Federation, run_dir: Path, display: Display) -> tuple[Server, float]:
    """All remaining rounds; returns the final server and the seconds that compilation took."""
    num_rounds, mesh, base = config.federation.num_rounds, federation.mesh, federation.task.base
    checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
    server = initial_server(config, federation)
    memories = open_memories(config, federation, server, run_dir / MEMORIES)
    done = max(checkpoints.rounds(), default=0)
    if done:
        server = checkpoints.restore(done, server, memories)
    if done == num_rounds:  # killed between the last checkpoint and the summary
        checkpoints.close()
        return server, 0.0
    kept = done or -1  # without a checkpoint the evaluation of the start is done again, too
    loggers = open_loggers(config.loggers, run_dir, kept) if leads() else []
    clocks: list[Logger] = [JsonLines(run_dir / "timings.jsonl", kept)] if leads() else []
    keys = base_keys(config.seed, mesh)
    evaluate, meter = evaluator(federation), Meter(federation, last_record(run_dir, done))
    with ExitStack() as stack:
        for opened in (*loggers, *clocks, checkpoints):
            stack.callback(opened.close)
        stop_is_due = stack.enter_context(watching())
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        upcoming = ahead.submit(cohort_of, config, federation, done)
        display.stage("compiling the round")
        programs = Programs(config, federation)
        programs.of(server, keys, remembering(upcoming.result(), memories))
        if not done:
            display.stage("evaluating the start")
            write(loggers, {"round": 0, **evaluate(server)})
        for t in range(done, num_rounds):
            asked = time.perf_counter()
            cohort, started = remembering(upcoming.result(), memories), time.perf_counter()
            if t + 1 < num_rounds:
                upcoming = ahead.submit(cohort_of, config, federation, t + 1)
            step = programs.of(server, keys, cohort)
            with jax.transfer_guard("disallow"):
                server, played = step(base, server, keys, cohort)
            record = {"round": t + 1, **meter.measure(t, cohort, played.losses)}
            if memories is not None:
                memories.scatter(jax.device_get(cohort.clients.id), played.memory)
            seconds = time.perf_counter() - started
            if (t + 1) % config.evaluate_every == 0 or t + 1 == num_rounds:
                record |= evaluate(server)
            write(loggers, record)
            speed = speed_of(cohort, config.clients_per_round, seconds, started - asked)
            write(clocks, {"round": t + 1, **speed})
            display.round(t + 1, num_rounds, record | speed)
            stopping = stop_is_due(t + 1) and t + 1 < num_rounds
            if stopping or (t + 1) % config.checkpoint_every == 0 or t + 1 == num_rounds:
                checkpoints.save(t + 1, server, memories)
            if stopping:
                raise Preempted(f"{run_dir}: stopped after round {t + 1} of {num_rounds}, which is saved")
    return server, programs.seconds


def remembering(cohort: Cohort, memories: Memories | None) -> Cohort:
    """A cohort whose clients know what they remember; only after the round before, so not ahead of time."""
    if memories is None:
        return cohort
    ids = cohort.clients.id
    found = jax.device_put(memories.gather(jax.device_get(ids)), ids.sharding)
    return cohort._replace(clients=cohort.clients._replace(memory=found))


def last_record(run_dir: Path, done: int) -> dict[str, Any]:
    """What was recorded of the last round that counts."""
    records = read_records(run_dir / "metrics.jsonl") if done else []
    return next((record for record in records if record["round"] == done), {})


def evaluator(federation: Federation) -> Callable[[Server], dict[str, float]]:
    """What the global adapter is worth on the held-out examples, as ``eval/...``."""
    task, mesh = federation.task, federation.mesh
    test = jax.device_put(task.test.batches, replicated(mesh))
    evaluation = make_evaluation(task.model.score, federation.spec, mesh)

    def evaluate(server: Server) -> dict[str, float]:
        found = measure(evaluation(*global_model(federation, server), test), task.test, task.metrics)
        if not math.isfinite(found["loss"]):
            raise UserError(
                f"round {int(server.round)}: loss {found['loss']} on the held-out examples; lower "
                "client_optimizer.learning_rate, or look at the model's weights; the last checkpoint is kept"
            )
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def cohort_of(config: Config, federation: Federation, t: int) -> Cohort:
    """The arrays of round ``t``."""
    return make_cohort(
        federation.task.population,
        federation.steps,
        federation.layout,
        federation.cohort(t),
        t,
        shape=federation.shape,
        chunks=config.federation.cohort_chunks,
        mesh=federation.mesh,
    )


class Programs:
    """The compiled round: one, unless a round's batches need more rows than were planned, and the seconds it took."""

    def __init__(self, config: Config, federation: Federation):
        self._config, self._federation = config, federation
        self._by_shape: dict[tuple[int, ...], Any] = {}
        self.seconds = 0.0

    def of(self, server: Server, keys: Keys, cohort: Cohort) -> Any:
        """The program for a cohort's shape."""
        shape = (*cohort.batches.tokens.shape, *cohort.batches.places.shape)
        if shape not in self._by_shape:
            program, seconds = compile_round(self._config, self._federation, server, keys, cohort)
            self._by_shape[shape] = program
            self.seconds += seconds
        return self._by_shape[shape]


def compile_round(config: Config, federation: Federation, server: Server, keys: Keys, cohort: Cohort):
    """The executable of all rounds of this shape, and the seconds that it took."""
    started = time.perf_counter()
    one_round = make_round(
        federation.task.model.score,
        federation.method,
        federation.optimizer,
        federation.layout,
        local_steps=config.federation.local_steps,
        dropout=config.lora.lora_dropout > 0,
        mesh=federation.mesh,
        shift=shifted,
    )
    program = jax.jit(one_round, compiler_options=compiler_options())
    compiled = program.lower(federation.task.base, server, keys, cohort).compile()
    return compiled, time.perf_counter() - started


def write(loggers: list[Logger], record: dict[str, Any]) -> None:
    """One record to every logger."""
    for logger in loggers:
        logger.write(record)


def told_truncated(config: Config, federation: Federation) -> str:
    """How many texts lose their end, or of a prompt its beginning; nothing where all are whole."""
    task, longest = federation.task, config.data.max_length
    store, test = task.population.store, task.test
    cut = {"training": (store.truncated, len(store.lengths)), "held-out": (test.truncated, len(test.owner))}
    told = [f"{count} of {whole} {name} texts" for name, (count, whole) in cut.items() if count]
    return (
        f"{' and '.join(told)} are longer than data.max_length = {longest} tokens and are cut" if told else ""
    )


def draw_partition(federation: Federation, run_dir: Path) -> None:
    """Who holds what, as a picture and as numbers."""
    marks, names = federation.task.marks
    counts = label_counts(marks, federation.task.population.examples, len(names))
    write_atomically(run_dir / "partition.json", json.dumps(describe(counts, names), indent=1) + "\n")
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    figures.partition_figure(counts[:LISTED], names, folder / "partition.png")


def summarise(
    config: Config, federation: Federation, records: list[dict], run_dir: Path, compile_seconds: float
) -> dict[str, Any]:
    """What the run found, as the last table shows it."""
    evaluations = [r for r in records if "eval/loss" in r]
    clocks = read_records(run_dir / "timings.jsonl")
    seconds, waited = ([r.get(name, 0.0) for r in clocks] for name in ("seconds", "data_wait"))
    full = traffic(federation.spec, config.lora.r, head_values(federation))
    tiers = []
    ks, counts = np.unique(federation.task.population.ranks, return_counts=True)
    for k, clients in zip(ks.tolist(), counts.tolist(), strict=True):
        bytes_of = client_traffic(federation, k)
        tiers.append({"k": k, "clients": clients, "down_bytes": bytes_of.down, "up_bytes": bytes_of.up})
    return {
        "method": config.federation.method,
        "r": config.lora.r,
        "rounds": config.federation.num_rounds,
        "before": {k: v for k, v in evaluations[0].items() if k.startswith("eval/")},
        "after": {k: v for k, v in evaluations[-1].items() if k.startswith("eval/")},
        "tiers": tiers,
        "full_rank": {"down_bytes": full.down, "up_bytes": full.up},
        "down_bytes": records[-1]["traffic/down_bytes"],
        "up_bytes": records[-1]["traffic/up_bytes"],
        "compile_seconds": compile_seconds,
        "median_round_seconds": float(np.median(seconds)),
        "truncated": {
            "train": federation.task.population.store.truncated,
            "held_out": federation.task.test.truncated,
        },
        "data_wait_share": sum(waited) / (sum(waited) + sum(seconds)),
        "simulated_seconds": records[-1].get("clock/simulated_seconds"),
        "adapter": "adapter",
    }
