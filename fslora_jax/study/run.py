"""Runs the points of a study one after another; whatever is finished is not run again."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

import jax

from fslora_jax.errors import Diverged, UserError, memory_told
from fslora_jax.federation.loop import Display, run_together
from fslora_jax.federation.together import program_of
from fslora_jax.provenance import code_fingerprint
from fslora_jax.rundir import InUse, code_of, read_summary, settings_of, write_atomically
from fslora_jax.study.points import Point, with_trials
from fslora_jax.study.reuse import Finished, copied, finished_points
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
    finished: Finished | None = None,
) -> dict[str, str]:
    """Runs what is missing, trials before the points that they settle; returns why points failed, by name.

    What has the settings of a point that is finished, or of a run in ``finished``, is copied from there. At most
    ``together`` points that can share a program are trained at the same time. A point that another process is
    working on is passed over, so several processes may share a study; what was passed over is tried again as long as
    anything else was done meanwhile. A failure does not stop the others, and a trial that diverges is none.
    """
    failures: dict[str, str] = {}
    left = [point for point in with_trials(points) if not is_done(out, point)]
    wanted = {point.name for point in points}
    unknown = partial(without_known, out, points, tell, finished or {})
    while left:
        passed_over = []
        for pack, ended in packs(out, unknown, left, tell, display, together):
            for name, error in ended.items():
                tell(f"{name}: {'another process is at it' if isinstance(error, InUse) else error}")
                if isinstance(error, Diverged) and name not in wanted:
                    write_atomically(out / name / DIVERGED, f"{error}\n")
                elif not isinstance(error, InUse):
                    failures[name] = str(error)
            passed_over += [p for p in pack if not is_done(out, p) and p.name not in failures]
            jax.clear_caches()  # the next point may have other shapes; what is the same comes from the cache on disk
            gc.collect()
        anything_done = len(passed_over) < len(left)
        left = [point for point in passed_over if not is_done(out, point)] if anything_done else []
    return failures


def packs(
    out: Path,
    unknown: Callable[[Sequence[Point]], list[Point]],
    left: Sequence[Point],
    tell: Callable[[str], None],
    display: Callable[[], AbstractContextManager[Display]],
    together: int,
) -> Iterator[tuple[list[Point], dict[str, UserError]]]:
    """Runs all that is left once, pack by pack; gives each with why some of it was not finished, by name."""
    while left := unknown(left):
        pack, ended = [left[0]], {}
        try:
            if ready := next_pack(out, left, together):
                pack, ended = ready, run_pack(out, ready, tell, display)
            else:
                tell(f"{left[0].name}: its trials are not finished")
        except UserError as error:  # it can never be settled
            ended = {left[0].name: error}
        names = {point.name for point in pack}
        left = [point for point in left if point.name not in names]
        yield pack, ended


def without_known(
    out: Path, points: Sequence[Point], tell: Callable[[str], None], finished: Finished, left: Sequence[Point]
) -> list[Point]:
    """What is left to train, once what finished runs answer is copied, here or by other processes."""
    left = [point for point in left if not is_done(out, point)]
    known = finished | finished_points(out, with_trials(points))
    done = set()
    for point, source in copied(out, left, known):
        tell(f"{point.name}: copied from {source}, a run of the same settings")
        done.add(point.name)
    return [point for point in left if point.name not in done]


def count_programs(points: Sequence[Point], together: int) -> int:
    """In how many programs the points can be run, at most so many in each."""
    by_program = Counter(program_of(point.config) or point.name for point in points)
    return sum(-(-count // together) for count in by_program.values())


def next_pack(out: Path, left: Sequence[Point], together: int) -> list[Point]:
    """The first of the points that are left, with others that can share its program; none if it is not settled yet.

    Of points with equal settings one is enough: the others are copied from it.

    Raises:
      UserError: it can never be settled.
    """
    first = settled(out, left[0])
    if first is None:
        return []
    pack, program, taken = [first], program_of(first.config), {settings_of(first.config)}
    for point in left[1:] if program is not None else []:
        if len(pack) >= together:
            break
        with suppress(UserError):
            ready = settled(out, point)
            if ready is None or program_of(ready.config) != program or settings_of(ready.config) in taken:
                continue
            pack.append(ready)
            taken.add(settings_of(ready.config))
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
        with display() as shown, memory_told():
            ended = run_together([(point.config, out / point.name) for point in pack], shown)
        return {point.name: ended[out / point.name] for point in pack if out / point.name in ended}
    except UserError as error:
        if len(pack) == 1:
            return {pack[0].name: error}
        tell(f"together: {error}; going on one by one")
    failures: dict[str, UserError] = {}
    for point in pack:
        failures |= run_pack(out, [point], tell, display)
    return failures
