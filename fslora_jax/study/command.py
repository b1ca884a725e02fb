"""``fslora study``: plans, runs and tabulates."""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import tyro
import yaml
from filelock import FileLock
from rich.console import Console
from rich.table import Table

from fslora_jax.arguments import parse
from fslora_jax.display import TerminalDisplay
from fslora_jax.errors import UserError
from fslora_jax.federation.setup import settle_devices
from fslora_jax.metrics import headline
from fslora_jax.study.estimate import rates, rounds_left, seconds_left, start_seconds, told_time
from fslora_jax.study.points import TRIALS, Point, Study, load_study, with_trials
from fslora_jax.study.reuse import finished_in, finished_points
from fslora_jax.study.run import check_code, count_programs, is_done, run_points
from fslora_jax.study.table import (
    at_equal_bytes,
    axes_of,
    check_own,
    collect,
    curves,
    over_repetitions,
    tuned_axes,
    write_plan,
    write_tables,
)


@dataclasses.dataclass
class RunStudy:
    """Run all points of a study, or go on with one; each is a run folder of its own below --out.

    A point that is finished is not run again, and one that was interrupted goes on from its last checkpoint. Several
    processes may work on one study: each takes what no other has begun, or its part by --part.
    """

    study: tyro.conf.Positional[Path]
    """YAML study: a base config, and grids over its settings."""
    out: Path
    """The study's folder."""
    set: tuple[str, ...] = ()
    """NAME=VALUE over all settings; the value may name axes, as in data.name=glue/{task}."""
    grids: tuple[str, ...] = ()
    """Only these grids."""
    part: tuple[int, int] | None = None
    """I N: this process is the I-th of N, from 0, as of a SLURM array; by default it takes all points."""
    together: int = 8
    """At most so many points in one program, where they differ only in seed, learning rates and skew; 1: one by one."""
    reuse: tuple[Path, ...] = ()
    """Folders of other studies or runs: what is finished there with equal settings and code is copied, not trained."""
    plan: bool = False
    """Only show what would be run."""
    mixed: bool = False
    """Go on although some runs were begun by another version of the code; the tables tell which."""


def study_command(argv: Sequence[str]) -> None:
    """Plans, runs and prints the table."""
    args = parse(RunStudy, "fslora study", RunStudy.__doc__ or "", argv)
    study, everything = load_study(args.study, dict(map(read_change, args.set)))
    if unknown := set(args.grids) - set(study.grids):
        raise UserError(f"--grids: unknown {sorted(unknown)}; expected some of {list(study.grids)}")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is a file; expected a folder for --out")
    if args.together < 1:
        raise UserError(f"--together: found {args.together}, expected 1 or more")
    chosen = args.grids or list(study.grids)
    points = [point for point in everything if point.grid in chosen]
    mine = part_of(points, args.part)
    elsewhere = finished_in(args.reuse)
    settle_devices(points[0].config)
    console = Console(stderr=True)
    console.print(plan_table(args.out, points, args.together))
    if args.plan:
        return
    if not args.mixed:
        check_code(args.out, points)
    finished = elsewhere | finished_points(args.out, with_trials(everything))
    check_own(args.out, everything)
    begun = {grid for grid in study.grids for name in (grid, grid + TRIALS) if (args.out / name).is_dir()}
    covered = [point for point in everything if point.grid in begun.union(chosen)]
    with going_on(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        with alone(args.out):
            write_plan(
                args.out, study.model_dump(mode="json"), covered, shlex.join(["fslora", "study", *argv])
            )
        failures = run_points(
            args.out,
            mine,
            lambda text: console.print(text, markup=False),
            lambda: TerminalDisplay(console),
            args.together,
            finished,
        )
        with alone(args.out):  # the last of several processes sees what all have done
            show(args.out, covered, study)
    if failures:
        name, reason = next(iter(failures.items()))
        raise UserError(f"{len(failures)} of {len(points)} points failed; {name}: {reason}")


def alone(out: Path) -> FileLock:
    """Holds what is written into the study's folder itself; other processes wait for a moment."""
    return FileLock(out / ".lock")


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """What the disk refuses, as one line that says how to go on.

    Raises:
      UserError: no room, no permission.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; make room or choose another --out: what is finished "
            "is kept, and the same command goes on"
        ) from None


def read_change(text: str) -> tuple[str, object]:
    """``NAME=VALUE`` as a setting, the value as YAML.

    >>> read_change("federation.num_rounds=3")
    ('federation.num_rounds', 3)
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set: found {text!r}, expected NAME=VALUE, such as federation.num_rounds=3")
    if "{" in value:  # names of axes, not a YAML mapping
        return name, value
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set: found {text!r}, expected a YAML value behind {name}=") from None


def part_of(points: Sequence[Point], part: tuple[int, int] | None) -> list[Point]:
    """Every N-th point, or all; what has trials in common stays together."""
    if part is None:
        return list(points)
    index, count = part
    if not 0 <= index < count:
        raise UserError(f"--part: found {index} {count}, expected I N with 0 <= I < N")
    tied = [point.choices[0].trial.name if point.choices else point.name for point in points]
    mine = set(list(dict.fromkeys(tied))[index::count])
    return [point for point, name in zip(points, tied, strict=True) if name in mine]


def plan_table(out: Path, points: Sequence[Point], together: int) -> Table:
    """What there is to do: runs, programs and rounds of each grid, and how long by what is done."""
    table = Table(title="plan", title_justify="left")
    for name in ("grid", "points", "done", "programs to do", "rounds to do", "time, by what is done"):
        table.add_column(name, no_wrap=name == "grid")  # what is long is broken elsewhere
    everything = with_trials(points)
    rated, start = rates(out, everything), start_seconds(out, everything)
    rows = {
        grid: [p for p in everything if p.grid == grid] for grid in dict.fromkeys(p.grid for p in everything)
    }
    for grid, mine in [*rows.items(), *([("in all", everything)] if len(rows) > 1 else [])]:
        left = [point for point in mine if not is_done(out, point)]
        seconds = seconds_left(out, left, rated, start)
        table.add_row(
            grid,
            str(len(mine)),
            str(len(mine) - len(left)),
            str(count_programs(left, together)),
            str(sum(rounds_left(out, point) for point in left)),
            "?" if seconds is None else told_time(seconds),
        )
    return table


def show(out: Path, points: Sequence[Point], study: Study) -> None:
    """Writes the tables, and prints the means of the main metric with their intervals."""
    found = collect(out, points)
    if not len(found):
        return
    own, drawn = axes_of(points), curves(out, points)
    axes = [*own, *tuned_axes(points)]
    kept = [axis for axis in axes if axis != study.repeat]
    means = over_repetitions(found, axes, study.repeat)
    tables = {"results": found, "means": means, "curves": drawn}
    console = Console()
    console.print(means_table(means, kept, "mean {metric}"))
    if study.compare is not None:
        equal = over_repetitions(at_equal_bytes(drawn, own, study.compare, study.repeat), own, study.repeat)
        tables["equal_bytes"] = equal
        console.print(
            means_table(equal, kept, "mean {metric} where each has sent what the cheapest sends in all")
        )
    write_tables(out, tables)


def means_table(means: pd.DataFrame, axes: Sequence[str], title: str) -> Table:
    """A row for each place on the axes."""
    kept = ["grid", *(axis for axis in axes if axis in means)]
    measured = [name.removesuffix(".ci") for name in means.columns if name.endswith(".ci")]
    metric = headline([{f"eval/{name}": 0.0 for name in measured}]).removeprefix("eval/")
    beside = {"rounds": 0, "up_MB": 1, "seconds": 0, "round_seconds": 2}
    intervals = ", with 95 % intervals" if any(n > 1 for n in means["n"]) else ""
    shown = Table(title=f"{title.format(metric=metric)}{intervals}", title_justify="left")
    for name in (*kept, "n", metric, "loss", *beside):
        shown.add_column(
            name.rpartition(".")[2].replace("_", " "), justify="left" if name in kept else "right"
        )
    for row in means.to_dict("records"):
        places = ["" if pd.isna(row[name]) else str(row[name]) for name in kept]
        values = [f"{row[name]:.4f}{_half(row, name)}" if name in row else "" for name in (metric, "loss")]
        costs = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in beside.items()]
        shown.add_row(*places, str(row["n"]), *values, *costs)
    return shown


def _half(row: dict, name: str) -> str:
    half = row.get(f"{name}.ci")
    return "" if half is None or pd.isna(half) else f" ± {half:.4f}"
