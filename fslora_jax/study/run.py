"""Runs the points of a study one after another; whatever is finished is not run again."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from fslora_jax.errors import Diverged, UserError
from fslora_jax.federation.loop import Display, run
from fslora_jax.provenance import code_fingerprint
from fslora_jax.rundir import InUse, code_of, read_summary, write_atomically
from fslora_jax.study.points import Point, with_trials
from fslora_jax.study.tuning import DIVERGED, settled


def is_done(out: Path, point: Point) -> bool:
    """Whether a point has its results, or is a trial that can have none."""
    return read_summary(out / point.name) is not None or (out / point.name / DIVERGED).exists()


def check_code(out: Path, points: Sequence[Point]) -> None:
    """Refuses to go on with a study whose runs were begun by other code, where anything is left to run.

    Raises:
      UserError: tells both fingerprints, and what to do.
    """
    runs = with_trials(points)
    if all(is_done(out, point) for point in runs):
        return
    by_others = {
        code: point.name
        for point in runs
        if (code := code_of(out / point.name)) not in (None, code_fingerprint())
    }
    if by_others:
        code, name = next(iter(by_others.items()))
        raise UserError(
            f"{out}: {name} was begun by code {code}, but this is {code_fingerprint()}; use that version of the code, "
            "another --out, or --mixed to go on all the same (the tables tell which run is whose)"
        )


def run_points(
    out: Path,
    points: Sequence[Point],
    tell: Callable[[str], None],
    display: Callable[[], AbstractContextManager[Display]],
) -> dict[str, str]:
    """Runs what is missing, trials before the points that they settle; returns why points failed, by name.

    A point that another process is working on is passed over, so several processes may share a study: the one that
    finishes the last trial goes on with what it settles. A failure does not stop the others, and a trial that
    diverges is none.
    """
    failures = {}
    everything = with_trials(points)
    for number, point in enumerate(everything, 1):
        if is_done(out, point):
            continue
        tell(f"[{number}/{len(everything)}] {point.name}")
        try:
            ready = settled(out, point)
            if ready is None:
                tell(f"{point.name}: its trials are not finished")
                continue
            with display() as shown:
                run(ready.config, out / point.name, shown)
        except InUse:
            tell(f"{point.name}: another process is at it")
        except UserError as error:
            tell(f"{point.name}: {error}")
            if isinstance(error, Diverged) and point not in points:
                write_atomically(out / point.name / DIVERGED, f"{error}\n")
            else:
                failures[point.name] = str(error)
        jax.clear_caches()  # the next point may have other shapes; what is the same comes from the cache on disk
        gc.collect()
    return failures
