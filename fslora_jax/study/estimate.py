"""How long what is left of a study will take, by what has been done of it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fslora_jax.log import read_records
from fslora_jax.rundir import read_summary
from fslora_jax.study.points import Point

Rate = tuple[float, float]
"""Seconds, and the local steps of clients that they were spent on."""


def work(point: Point) -> int:
    """Local steps of all clients in a round."""
    return point.config.federation.local_steps * point.config.clients_per_round


def rounds_done(out: Path, point: Point) -> int:
    """By its clock; rounds beyond the last checkpoint may have to be done again."""
    return len(read_records(out / point.name / "timings.jsonl", "round"))


def rounds_left(out: Path, point: Point) -> int:
    """Rounds that a point still has to do."""
    return max(0, point.config.federation.num_rounds - rounds_done(out, point))


def rates(out: Path, points: Sequence[Point]) -> dict[str, Rate]:
    """What rounds have taken, by the data they were on, and "" for all of them together."""
    found: dict[str, Rate] = {}
    for point in points:
        clocks = read_records(out / point.name / "timings.jsonl", "round", "seconds")
        spent = sum(clock["seconds"] for clock in clocks)
        for data in (_data(point), ""):
            seconds, steps = found.get(data, (0.0, 0.0))
            found[data] = (seconds + spent, steps + len(clocks) * work(point))
    return found


def start_seconds(out: Path, points: Sequence[Point]) -> float:
    """The mean time in which a run loads and compiles; 0 where none has finished."""
    summaries = [summary for point in points if (summary := read_summary(out / point.name))]
    spent = [summary["compile_seconds"] + summary.get("load_seconds", 0.0) for summary in summaries]
    return sum(spent) / len(spent) if spent else 0.0


def seconds_left(out: Path, points: Sequence[Point], rated: Mapping[str, Rate], start: float) -> float | None:
    """Of points that are not finished: their rounds at the rate of their data, else of all; None without any rate."""
    total = 0.0
    for point in points:
        seconds, steps = next((rate for data in (_data(point), "") if (rate := rated[data])[1]), (0.0, 0.0))
        if not steps:
            return None
        total += start + rounds_left(out, point) * work(point) * seconds / steps
    return total


def told_time(seconds: float) -> str:
    """In minutes rounded up, or in hours where there are many.

    >>> told_time(90.0), told_time(9000.0)
    ('2 min', '2.5 h')
    """
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{math.ceil(seconds / 60)} min"


def _data(point: Point) -> str:
    data = point.config.data
    return f"{data.task} {data.name} {data.parts}"
