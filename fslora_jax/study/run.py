"""Runs the points of a study one after another; whatever is finished is not run again."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from fslora_jax.errors import UserError
from fslora_jax.federation.loop import Display, run
from fslora_jax.rundir import InUse, read_summary
from fslora_jax.study.points import Point


def is_done(out: Path, point: Point) -> bool:
    """Whether a point has its results."""
    return read_summary(out / point.name) is not None


def run_points(
    out: Path,
    points: Sequence[Point],
    tell: Callable[[str], None],
    display: Callable[[], AbstractContextManager[Display]],
) -> dict[str, str]:
    """Runs what is missing; returns why points failed, by name.

    A point that another process is working on is passed over, so several processes may share a study. A failure
    does not stop the others.
    """
    failures = {}
    for number, point in enumerate(points, 1):
        if is_done(out, point):
            continue
        tell(f"[{number}/{len(points)}] {point.name}")
        try:
            with display() as shown:
                run(point.config, out / point.name, shown)
        except InUse:
            tell(f"{point.name}: another process is at it")
        except UserError as error:
            failures[point.name] = str(error)
            tell(f"{point.name}: {error}")
        jax.clear_caches()  # the next point may have other shapes; what is the same comes from the cache on disk
        gc.collect()
    return failures
