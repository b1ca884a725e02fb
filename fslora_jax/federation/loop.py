"""Runs from the first round to the exported adapter; killed at any point, they go on to the same end."""

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.evaluate import make_evaluation
from fslora_jax.federation.books import At, Books, Display, Given, going
from fslora_jax.federation.calls import Call, Programs, calls_of
from fslora_jax.federation.meter import shown
from fslora_jax.federation.method import check_method
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.running import Running
from fslora_jax.federation.setup import Federation, data_fingerprint, set_up, settle_devices
from fslora_jax.federation.summary import draw_partition, told_truncated, write_results
from fslora_jax.federation.together import alike, cohorts_together, joined, start_of
from fslora_jax.preemption import Preempted, watching
from fslora_jax.processes import leader_first, seconds_of
from fslora_jax.rundir import InUse, keep_data, keep_start, open_run, own_start, read_summary
from fslora_jax.watchdog import watchdog


def run(config: Config, run_dir: Path, display: Display) -> dict[str, Any]:
    """Trains to the end, from the last checkpoint if there is one, and returns the summary.

    Raises:
      UserError: bad input, a full disk, a client's loss that is not finite, a run folder of another config.
      Preempted: SIGTERM came; the rounds so far are saved.
    """
    for failure in run_together([(config, run_dir)], display).values():
        raise failure
    return read_summary(run_dir) or {}


def run_together(runs: Sequence[tuple[Config, Path]], display: Display) -> dict[Path, UserError]:
    """`run` of several configs with one program (`together.program_of`), in lock-step where that is possible.

    Returns why some were not run (another process is at them) or ended early (they diverged), by folder.

    Raises:
      UserError, Preempted: as in `run`.
    """
    failures: dict[Path, UserError] = {}
    settle_devices(runs[0][0])
    with ExitStack() as stack:
        opened = []
        for config, run_dir in runs:
            check_method(config)
            try:
                leader_first(lambda c=config, d=run_dir: stack.enter_context(open_run(d, c)))
            except InUse as error:
                failures[run_dir] = error
                continue
            if read_summary(run_dir) is None:
                opened.append((config, run_dir))
            else:
                display.stage("already finished")
        if not opened:
            return failures
        limits = map(seconds_of, ("FSLORA_WATCHDOG", "FSLORA_HEARTBEAT_TIMEOUT"))
        at = stack.enter_context(watchdog(opened[0][1], *limits))
        running = sorted(prepared(opened, display, stack), key=lambda one: -one.done)
        for _, group in groupby(running, key=lambda one: one.done):  # a kill may have left some ahead
            members = list(group)
            compile_seconds = train(members, display, at)
            failures |= {one.run_dir: one.failure for one in members if one.failure}
            for one in going(members):
                display.stage("writing adapter and figures")
                at(one.done, "writing results")
                spent = {"load_seconds": one.load_seconds, "compile_seconds": compile_seconds}
                leader_first(
                    partial(write_results, one.config, one.federation, one.server, one.run_dir, spent)
                )
    return failures


def prepared(opened: Sequence[tuple[Config, Path]], display: Display, stack: ExitStack) -> Iterator[Running]:
    """The runs of one program, each where its last checkpoint is; of several, one base model serves all."""
    display.stage("loading model and data")
    federations: list[Federation] = []
    loaded: dict[Any, Federation] = {}
    seconds = []
    for config, run_dir in opened:
        started, start = time.perf_counter(), start_of(config)
        if start not in loaded:
            loaded[start] = set_up(own_start(run_dir, config), federations[0] if federations else None)
        federations.append(loaded[start])
        seconds.append(time.perf_counter() - started)
        leader_first(partial(keep_start, run_dir, config))
        leader_first(partial(keep_data, run_dir, data_fingerprint(loaded[start].task)))
        if cut := told_truncated(config, federations[-1]):
            display.stage(cut)
        leader_first(partial(draw_partition, federations[-1], run_dir))
    first = federations[0]
    evaluation = make_evaluation(first.task.model.score, first.spec, first.mesh)
    same = alike([config for config, _ in opened], federations)
    for (config, run_dir), federation, spent in zip(opened, same, seconds, strict=True):
        one = Running(config, federation, run_dir, evaluation, spent, display.stage)
        stack.callback(one.close)
        yield one


def train(runs: Sequence[Running], display: Display, at: At) -> float:
    """All remaining rounds of runs that stand at the same one; returns the seconds of compilation for each.

    Where rounds are short, the devices have the next one before the host looks at what the last one left, so that
    they do not wait for it. A run whose training leaves the finite numbers is told of no more, and the others go on.
    """
    config, federation, done, count = runs[0].config, runs[0].federation, runs[0].done, len(runs)
    num_rounds = config.federation.num_rounds
    if done == num_rounds:  # killed between the last checkpoint and the summary
        return 0.0
    with ExitStack() as stack:
        stop_is_due = stack.enter_context(watching())
        arrays = stack.enter_context(closing(fed(runs, calls_of(config, done), at)))
        if not done:
            display.stage("evaluating the start")
            at(0, "evaluating")
            begin(runs)
        display.stage(f"compiling the round{f' of {count} runs' if count > 1 else ''}")
        at(done, "compiling")
        programs = Programs(config, federation, count)
        server, constants = joined([one.server for one in runs]), joined([one.constants for one in runs])
        server = jax.tree.map(jnp.copy, server)  # calls replace it, and parts of it may be held elsewhere
        books, unseen = Books(runs, display, at), None
        for call, cohorts, waited in arrays:
            if not going(runs):
                break
            rounds = call.rounds
            idle = unseen is None or unseen.has_ended()
            cohort = joined(remembered(runs, cohorts))
            at(rounds.start + 1, "compiling")
            step, started = programs.of(server, constants, cohort), time.perf_counter()
            at(rounds.start + 1, "training")
            with jax.transfer_guard("disallow"):
                server, played = step(programs.base, server, constants, cohort)
            given = Given(
                call, cohort, shown(cohort, played), played.memory, started, waited if idle else 0.0
            )
            if unseen is not None:
                books.see(unseen)
            held = books.due(call)
            if held:
                books.settle(given, server)
            stopping = stop_is_due(rounds) and rounds.stop < num_rounds
            if stopping and not held:
                books.settle(given, server)
            unseen = None if held or stopping else given
            if unseen is None:
                books.save(call, stopping=stopping)
            if stopping and going(runs):
                raise Preempted(
                    f"{runs[0].run_dir}: stopped after round {rounds.stop} of {num_rounds}, which is saved"
                )
    return programs.seconds / count


class Fed(NamedTuple):
    """Each run's arrays of a call, and the seconds that were waited for them."""

    call: Call
    cohorts: list[Cohort]
    waited: float


def fed(runs: Sequence[Running], calls: Sequence[Call], at: At) -> Generator[Fed]:
    """What the calls need, in their order; the arrays of the next one are made in the background."""
    feed = partial(cohorts_together, [one.federation for one in runs])
    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(feed, calls[0].rounds)
        for call, following in zip_longest(calls, calls[1:]):
            at(call.rounds.start + 1, "waiting for data")
            asked = time.perf_counter()
            cohorts = upcoming.result()
            waited = time.perf_counter() - asked
            if following is not None:
                upcoming = ahead.submit(feed, following.rounds)
            yield Fed(call, cohorts, waited)


def begin(runs: Sequence[Running]) -> None:
    """Evaluates what runs start from, once for all that start alike."""
    starts: dict[Any, Running] = {}
    for one in runs:
        one.begin(starts.setdefault(start_of(one.config), one))
    for one in going(runs):
        one.write()


def remembered(runs: Sequence[Running], cohorts: Sequence[Cohort]) -> list[Cohort]:
    """Each run's cohort, whose clients know what they remember."""
    return [one.remembering(cohort) for one, cohort in zip(runs, cohorts, strict=True)]
