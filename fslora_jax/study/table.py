"""What a study found, as tidy tables: a row for each run, and means with intervals over repetitions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from fslora_jax.errors import UserError
from fslora_jax.log import read_records
from fslora_jax.rundir import METRICS, code_of, read_mapping, read_summary, write_atomically
from fslora_jax.study.points import TRIALS, Point, with_trials
from fslora_jax.study.tuning import settled

LEVEL = 0.95
"""Of all intervals."""
STUDY = "study.json"
"""In a study's folder: its grids, its points, and the commands that ran it."""


def collect(out: Path, points: Sequence[Point]) -> pd.DataFrame:
    """A row for each finished point: grid, axes, what was measured in the end, bytes and seconds."""
    rows = [
        _row(out, point, summary)
        for point in settled_points(out, points)
        if (summary := read_summary(out / point.name))
    ]
    return pd.DataFrame(rows)


def settled_points(out: Path, points: Sequence[Point]) -> Iterator[Point]:
    """All runs, trials among them, whose settings are known."""
    for point in with_trials(points):
        with suppress(UserError):  # all its trials diverged
            if ready := settled(out, point):
                yield ready


def _row(out: Path, point: Point, summary: dict[str, Any]) -> dict[str, Any]:
    folder = out / point.name
    clocks = read_records(folder / "timings.jsonl", "round", "seconds")
    records = read_records(folder / METRICS, "round")
    told = {name for record in records for name in record if name.startswith("aggregation/")}
    measured = {name.removeprefix("eval/"): value for name, value in summary["after"].items()}
    return (
        {"grid": point.grid}
        | point.labels
        | measured
        | {f"before/{name.removeprefix('eval/')}": value for name, value in summary["before"].items()}
        | {
            "rounds": summary["rounds"],
            "up_MB": summary["up_bytes"] / 1e6,
            "down_MB": summary["down_bytes"] / 1e6,
            "seconds": sum(clock["seconds"] for clock in clocks),
            "round_seconds": summary["median_round_seconds"],
            "compile_seconds": summary["compile_seconds"],
        }
        | {name: float(np.mean([r[name] for r in records if name in r])) for name in sorted(told)}
        | {"code": code_of(folder)}
    )


def curves(out: Path, points: Sequence[Point]) -> pd.DataFrame:
    """A row for each evaluation of each point, also of those that are not finished."""
    return pd.DataFrame(
        {"grid": point.grid} | point.labels | record
        for point in settled_points(out, points)
        for record in read_records(out / point.name / METRICS, "round")
        if any(name.startswith("eval/") for name in record)
    )


def interval(values: Sequence[float] | Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """Mean, standard deviation and half the width of the 95 % interval of the mean (Student's t); NaN of one value.

    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, 1.0, 2.484]
    """
    x, n = np.asarray(values, float), len(values)
    deviation = float(x.std(ddof=1)) if n > 1 else float("nan")
    half = float(stats.t.ppf(0.5 + LEVEL / 2, n - 1) * deviation / np.sqrt(n)) if n > 1 else float("nan")
    return float(x.mean()), deviation, half


def over_repetitions(table: pd.DataFrame, axes: Sequence[str], repeat: str) -> pd.DataFrame:
    """Means over the axis ``repeat``, with ``.sd``, ``.ci`` (half a 95 % interval) of each measure, and ``n``."""
    kept = [axis for axis in ("grid", *axes) if axis != repeat and axis in table]
    measures = [name for name in table.columns if name not in (*kept, repeat, "code")]
    rows = []
    for _, group in table.groupby(kept, sort=False, dropna=False):
        row: dict[str, Any] = {name: group[name].iloc[0] for name in kept} | {"n": len(group)}
        for name in measures:
            values = group[name].dropna().to_numpy(float)
            if len(values):
                row[name], row[f"{name}.sd"], row[f"{name}.ci"] = interval(values)
        rows.append(row)
    return pd.DataFrame(rows)


def at_equal_bytes(drawn: pd.DataFrame, axes: Sequence[str], compare: str, repeat: str) -> pd.DataFrame:
    """Each run's evaluations where it has uploaded what the cheapest choice of ``compare`` beside it uploads in all.

    ``drawn`` are `curves`; values between two evaluations are interpolated. Trials of a tuning are left out.
    """
    drawn = drawn.loc[~drawn["grid"].str.endswith(TRIALS)].fillna({"traffic/up_bytes": 0.0})
    places = ["grid", *(axis for axis in axes if axis in drawn)]
    beside = [axis for axis in places if axis not in (compare, repeat)]
    measures = [name for name in drawn.columns if name.startswith("eval/")]
    rows = []
    for _, group in drawn.groupby(beside, sort=False, dropna=False):
        runs = [run for _, run in group.groupby(places, sort=False, dropna=False)]
        budget = min(run["traffic/up_bytes"].max() for run in runs)
        for run in runs:
            sent = run["traffic/up_bytes"]
            values = {name: np.interp(budget, sent, run[name]) for name in (*measures, "round")}
            row = {name: run[name].iloc[0] for name in places}
            row |= {name.removeprefix("eval/"): values[name] for name in measures}
            rows.append(row | {"rounds": values["round"], "up_MB": budget / 1e6})
    return pd.DataFrame(rows)


def write_tables(out: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Each as CSV and Parquet, every file whole or not at all."""
    for name, frame in tables.items():
        write_atomically(out / f"{name}.csv", frame.to_csv(index=False))
        write_atomically(out / f"{name}.parquet", frame.to_parquet(index=False))


def axes_of(points: Sequence[Point]) -> list[str]:
    """All axes in the order in which grids name them."""
    return list(dict.fromkeys(axis for point in points for axis in point.labels))


def tuned_axes(points: Sequence[Point]) -> list[str]:
    """The axes of what is chosen by trials."""
    return list(dict.fromkeys(axis for point in points for choice in point.choices for axis in choice.labels))


def write_plan(out: Path, study: dict[str, Any], points: Sequence[Point], command: str) -> None:
    """What the folder is a study of, and each command that ran it once.

    Raises:
      UserError: there is a plan that cannot be read.
    """
    commands = dict.fromkeys([*commands_of(out), command])
    runs = [{"name": p.name, "grid": p.grid, **p.labels} for p in with_trials(points)]
    content = {"study": study, "points": runs, "commands": list(commands)}
    write_atomically(out / STUDY, json.dumps(content, indent=1) + "\n")


def check_own(out: Path, points: Sequence[Point]) -> None:
    """Refuses a folder in which another study was begun, none of whose runs this one has.

    Raises:
      UserError: names one of them.
    """
    if not (out / STUDY).exists():
        return
    begun = [
        p["name"] for p in read_mapping(out / STUDY).get("points", []) if (out / p["name"] / METRICS).exists()
    ]
    if begun and not {point.name for point in with_trials(points)} & set(begun):
        raise UserError(
            f"{out}: holds another study, with a run {begun[0]}; choose another --out for this one"
        )


def commands_of(out: Path) -> list[str]:
    """The commands that ran a study so far; none of a study that keeps none, or has not begun.

    Raises:
      UserError: the plan cannot be read.
    """
    found = read_mapping(out / STUDY).get("commands", []) if (out / STUDY).exists() else []
    if not isinstance(found, list) or not all(isinstance(command, str) for command in found):
        raise UserError(f"{out / STUDY}: commands: found {found!r}, expected a list of texts; is it damaged?")
    return found
