"""A run from the first round to the exported adapter; killed at any point, it goes on to the same end."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import jax

from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config
from fslora_jax.errors import Diverged
from fslora_jax.evaluate import make_evaluation, measure
from fslora_jax.federation.calls import Programs, by_round, cohorts_of, dispatches
from fslora_jax.federation.memories import remembering
from fslora_jax.federation.meter import Meter, speed_of
from fslora_jax.federation.method import check_method
from fslora_jax.federation.privacy import privacy_record
from fslora_jax.federation.round import base_keys
from fslora_jax.federation.setup import Federation, global_model, initial_server, open_memories, set_up
from fslora_jax.federation.summary import draw_partition, told_truncated, write_results
from fslora_jax.log import JsonLines, Logger, open_loggers, read_records
from fslora_jax.methods import Server
from fslora_jax.preemption import Preempted, watching
from fslora_jax.processes import leader_first, leads, seconds_of
from fslora_jax.rundir import MEMORIES, keep_start, open_run, own_start, read_summary
from fslora_jax.sharding import replicated
from fslora_jax.watchdog import watchdog


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
        limits = map(seconds_of, ("FSLORA_WATCHDOG", "FSLORA_HEARTBEAT_TIMEOUT"))
        at = stack.enter_context(watchdog(run_dir, *limits))
        display.stage("loading model and data")
        started = time.perf_counter()
        federation = set_up(own_start(run_dir, config))
        spent = {"load_seconds": time.perf_counter() - started}
        leader_first(lambda: keep_start(run_dir, config))
        if cut := told_truncated(config, federation):
            display.stage(cut)
        leader_first(lambda: draw_partition(federation, run_dir))
        server, spent["compile_seconds"] = train(config, federation, run_dir, display, at)
        display.stage("writing adapter and figures")
        at(config.federation.num_rounds, "writing results")
        leader_first(lambda: write_results(config, federation, server, run_dir, spent))
        return read_summary(run_dir) or {}


def train(
    config: Config, federation: Federation, run_dir: Path, display: Display, at: Callable[[int, str], None]
) -> tuple[Server, float]:
    """All remaining rounds; returns the final server and the seconds that compilation took.

    ``at(round, step)`` hears what is done now.
    """
    num_rounds, mesh, base = config.federation.num_rounds, federation.mesh, federation.task.base
    checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
    server = initial_server(config, federation)
    memories = open_memories(config, federation, server, run_dir / MEMORIES)
    done, server = checkpoints.resume(server, memories, display.stage)
    if done == num_rounds:  # killed between the last checkpoint and the summary
        checkpoints.close()
        return server, 0.0
    kept = done or -1  # without a checkpoint the evaluation of the start is done again, too
    loggers = open_loggers(config.loggers, run_dir, kept) if leads() else []
    clocks: list[Logger] = [JsonLines(run_dir / "timings.jsonl", kept)] if leads() else []
    keys = base_keys(config.seed, mesh)
    evaluate, meter = evaluator(federation), Meter(federation, last_record(run_dir, done))
    private = privacy_record(config, federation.method)
    with ExitStack() as stack:
        for opened in (*loggers, *clocks, checkpoints):
            stack.callback(opened.close)
        stop_is_due = stack.enter_context(watching())
        ahead = stack.enter_context(ThreadPoolExecutor(1))
        calls = dispatches(config, done)
        upcoming = ahead.submit(cohorts_of, config, federation, calls[0])
        display.stage("compiling the round")
        at(done, "compiling")
        programs = Programs(config, federation)
        programs.of(server, keys, remembering(upcoming.result(), memories))
        if not done:
            display.stage("evaluating the start")
            at(0, "evaluating")
            write(loggers, {"round": 0, **evaluate(server)})
        for number, rounds in enumerate(calls):
            at(rounds.start + 1, "waiting for data")
            asked = time.perf_counter()
            cohort, started = remembering(upcoming.result(), memories), time.perf_counter()
            if number + 1 < len(calls):
                upcoming = ahead.submit(cohorts_of, config, federation, calls[number + 1])
            step = programs.of(server, keys, cohort)
            at(rounds.start + 1, "training")
            with jax.transfer_guard("disallow"):
                server, played = step(base, server, keys, cohort)
            parts = by_round(rounds, cohort, played)
            records = [{"round": t + 1, **meter.measure(t, *part)} for t, part in parts]
            if memories is not None:
                memories.scatter(jax.device_get(cohort.clients.id), played.memory)
            seconds = time.perf_counter() - started
            done = rounds.stop
            if done % config.evaluate_every == 0 or done == num_rounds:
                at(done, "evaluating")
                records[-1] |= evaluate(server) | private(done)
            speed = speed_of(
                cohort,
                federation.steps.passes,
                config.clients_per_round,
                seconds,
                started - asked,
                len(rounds),
            )
            for record in records:
                write(loggers, record)
                write(clocks, {"round": record["round"], **speed})
            display.round(done, num_rounds, records[-1] | speed)
            stopping = stop_is_due(done) and done < num_rounds
            if stopping or done % config.checkpoint_every == 0 or done == num_rounds:
                at(done, "saving")
                checkpoints.save(done, server, memories)
            if stopping:
                raise Preempted(f"{run_dir}: stopped after round {done} of {num_rounds}, which is saved")
    return server, programs.seconds


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
            raise Diverged(
                f"round {int(server.round)}: loss {found['loss']} on the held-out examples; lower "
                "client_optimizer.learning_rate, or look at the model's weights; the last checkpoint is kept"
            )
        return {f"eval/{name}": value for name, value in found.items()}

    return evaluate


def write(loggers: list[Logger], record: dict[str, Any]) -> None:
    """One record to every logger."""
    for logger in loggers:
        logger.write(record)
