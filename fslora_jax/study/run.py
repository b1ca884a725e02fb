"""Runs the points of a study one after another; whatever is finished is not run again."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import jax

from fslora_jax.errors import Diverged, UserError
from fslora_jax.federation.loop import Display, run_together
from fslora_jax.federation.together import program_of
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
    together: int = 1,
) -> dict[str, str]:
    """Runs what is missing, trials before the points that they settle; returns why points failed, by name.

    At most ``together`` points that can share a program are trained at the same time. A point that another process is
    working on is passed over, so several processes may share a study: the one that finishes the last trial goes on
    with what it settles. A failure does not stop the others, and a trial that diverges is none.
    """
    failures: dict[str, str] = {}
    everything = with_trials(points)
    left = [point for point in everything if not is_done(out, point)]
    while left:
        first = left[0].name
        try:
            pack = next_pack(out, left, together)
            ended = run_pack(out, pack, tell, display) if pack else {}
            if not pack:
                tell(f"{first}: its trials are not finished")
        except UserError as error:  # it can never be settled
            pack, ended = [], {first: error}
        for name, error in ended.items():
            tell(f"{name}: {'another process is at it' if isinstance(error, InUse) else error}")
            if isinstance(error, Diverged) and name not in {point.name for point in points}:
                write_atomically(out / name / DIVERGED, f"{error}\n")
            elif not isinstance(error, InUse):
                failures[name] = str(error)
        done = {first, *(point.name for point in pack)}
        left = [point for point in left if point.name not in done]
        jax.clear_caches()  # the next point may have other shapes; what is the same comes from the cache on disk
        gc.collect()
    return failures


def count_programs(points: Sequence[Point], together: int) -> int:
    """In how many programs the points can be run, at most so many in each."""
    by_program = Counter(program_of(point.config) or point.name for point in points)
    return sum(-(-count // together) for count in by_program.values())


def next_pack(out: Path, left: Sequence[Point], together: int) -> list[Point]:
    """The first of the points that are left, with others that can share its program; none if it is not settled yet.

    Raises:
      UserError: it can never be settled.
    """
    first = settled(out, left[0])
    if first is None:
        return []
    pack, program = [first], program_of(first.config)
    for point in left[1:] if program is not None else []:
        if len(pack) >= together:
            break
        with suppress(UserError):
            if (ready := settled(out, point)) and program_of(ready.config) == program:
                pack.append(ready)
    return pack


def run_pack(
    out: Path,
    pack: Sequence[Point],
    tell: Callable[[str], None],
    display: Callable[[], AbstractContextManager[Display]],
) -> dict[str, UserError]:
    """Runs some points together, or one by one where that does not work; returns why some were not finished."""
    try:
        tell(f"running {', '.join(point.name for point in pack)}")
        with display() as shown:
            ended = run_together([(point.config, out / point.name) for point in pack], shown)
        return {point.name: ended[out / point.name] for point in pack if out / point.name in ended}
    except (UserError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, UserError) and len(pack) == 1:
            return {pack[0].name: error}
        if len(pack) == 1 or not (isinstance(error, UserError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        tell(f"together: {str(error).splitlines()[0]}; going on one by one")
    failures: dict[str, UserError] = {}
    for point in pack:
        failures |= run_pack(out, [point], tell, display)
    return failures
