"""Tidy tables of what runs found: finals, means over repetitions, paired differences, curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fslora_jax.log import Record
from fslora_jax.metrics import headline
from fslora_jax.report.collect import Run, Subject
from fslora_jax.report.names import told
from fslora_jax.report.statistics import Row, at_equal_bytes, differences, estimate, grouped, means

PROBLEM = ("task", "name", "parts", "text_columns", "label_column", "test_name", "test_split")
"""Settings of ``data`` that decide what a metric is measured on; only equal ones are compared."""
DRAWN = 240
"""Points of a curve at most."""
ALL = "all runs"
"""The series where no axis varies."""


class Place(NamedTuple):
    """Where a run is drawn: its panel (what it is measured on), its series, and its repetition."""

    panel: str
    series: str
    repetition: str
    labels: dict[str, str]


class Tables(NamedTuple):
    """All that is drawn and told; ``axes`` vary between series, ``metrics`` is the main one of each panel.

    ``equal`` and its differences are at equal uploaded bytes, where the study compares the choices of an axis.
    """

    axes: list[str]
    places: dict[str, Place]
    metrics: dict[str, str]
    finals: list[Row]
    means: list[Row]
    differences: list[Row]
    equal: list[Row]
    equal_differences: list[Row]
    curves: list[Row]
    clocks: list[Row]


def tabulate(subject: Subject) -> Tables:
    """Makes all tables; trials, unreadable runs and those not begun are in none."""
    runs = [run for run in subject.runs if run.settings and not run.trial]
    axes, places = place(runs, subject.repeat)
    metrics = {
        panel: headline(record for run in runs if places[run.name].panel == panel for record in run.records)
        for panel in dict.fromkeys(p.panel for p in places.values())
    }
    finals = [
        final(run.summary, run.clocks, metrics[at.panel])
        | {"run": run.name, "panel": at.panel}
        # An axis that this run's grid does not have is an empty label.
        | {"series": at.series, "repetition": at.repetition, **{a: at.labels.get(a, "") for a in axes}}
        for run in runs
        if run.summary is not None and (at := places[run.name])
    ]
    equal = []
    if subject.compare in axes:
        sent = {run.name: sent_and_value(run, metrics[places[run.name].panel]) for run in runs}
        equal = at_equal_bytes(finals, sent, axes, subject.compare)
    learnt = ("eval/", "train/", "aggregation/", "privacy/")
    return Tables(
        axes,
        places,
        metrics,
        finals,
        means(finals, axes),
        differences(finals, axes, axes),
        means(equal, axes),
        differences(equal, axes, [subject.compare]),
        curves(runs, places, lambda run: run.records, learnt),
        curves(runs, places, lambda run: run.clocks, ("",)),
    )


def place(runs: Sequence[Run], repeat: str) -> tuple[list[str], dict[str, Place]]:
    """The axes that tell series apart, and each run's place by its name."""
    everything = [{"grid": run.grid} | run.labels for run in runs]
    names = dict.fromkeys(axis for labels in everything for axis in labels if axis != repeat)
    problems = [tuple(str(run.settings.get(f"data.{name}")) for name in PROBLEM) for run in runs]
    varying = [axis for axis in names if len({labels.get(axis) for labels in everything}) > 1]
    of_panel = next((axis for axis in varying if _tells(axis, everything, problems)), None)
    axes = [axis for axis in varying if axis != of_panel]
    places = {}
    for run, labels, problem in zip(runs, everything, problems, strict=True):
        if of_panel is not None:
            panel = labels[of_panel]
        else:
            panel = "" if len(set(problems)) == 1 else f"{problem[0]} {Path(problem[1]).name}"
        mine = {axis: labels[axis] for axis in axes if axis in labels}
        places[run.name] = Place(panel, told(mine) or ALL, labels.get(repeat, ""), mine)
    return axes, places


def _tells(axis: str, labels: Sequence[Mapping[str, str]], problems: Sequence[tuple]) -> bool:
    """Whether an axis's label and the problem decide each other."""
    pairs = {(label.get(axis, ""), problem) for label, problem in zip(labels, problems, strict=True)}
    found = {label for label, _ in pairs}
    return "" not in found and len(pairs) == len(found) == len(set(problems))


def final(summary: Mapping[str, Any], clocks: Sequence[Record], metric: str) -> Row:
    """What a finished run found: its main metric as ``value`` and ``start``, bytes, seconds."""
    return {
        "metric": metric.removeprefix("eval/"),
        "value": summary["after"].get(metric, math.nan),
        "start": summary["before"].get(metric, math.nan),
        **{f"final {name.removeprefix('eval/')}": value for name, value in summary["after"].items()},
        "rounds": summary["rounds"],
        "up_MB": summary["up_bytes"] / 1e6,
        "down_MB": summary["down_bytes"] / 1e6,
        "seconds": sum(clock.get("seconds", 0.0) for clock in clocks),
        "compile_seconds": summary["compile_seconds"],
        "simulated_seconds": summary.get("simulated_seconds") or math.nan,
    }


def sent_and_value(run: Run, metric: str) -> tuple[list[float], list[float]]:
    """MB uploaded and a metric, at each evaluation."""
    at = [record for record in run.records if metric in record]
    return [record.get("traffic/up_bytes", 0) / 1e6 for record in at], [record[metric] for record in at]


def curves(
    runs: Sequence[Run],
    places: Mapping[str, Place],
    of: Callable[[Run], list[Record]],
    kept: tuple[str, ...],
) -> list[Row]:
    """Means over the repetitions that have come so far, by panel, series, measure and round, with 95 % intervals.

    ``MB`` uploaded and the simulated ``clock`` are means, too; NaN where there is none.
    """
    points = [
        {"panel": places[run.name].panel, "series": places[run.name].series, "measure": name, "value": value}
        | {"round": record["round"], "MB": record.get("traffic/up_bytes", start) / 1e6}
        | {"clock": record.get("clock/simulated_seconds", start)}
        for run in runs
        for record in of(run)
        for name, value in record.items()
        if name.startswith(kept) and name != "round" and isinstance(value, int | float)
        # Before the first round nothing was sent, and no time has passed.
        for start in [math.nan if record["round"] else 0.0]
    ]
    found = []
    for where, group in grouped(points, "panel", "series", "measure").items():
        rounds = grouped(sorted(group, key=lambda point: point["round"]), "round")
        curve = [
            dict(zip(("panel", "series", "measure"), where, strict=True))
            | {"round": at[0]["round"]}
            | {x: sum(point[x] for point in at) / len(at) for x in ("MB", "clock")}
            | estimate([point["value"] for point in at])
            for at in rounds.values()
        ]
        found += thinned(curve)
    return found


def thinned(curve: list[Row]) -> list[Row]:
    """At most `DRAWN` points, evenly, with both ends.

    >>> len(thinned([{}] * 1000))
    240
    """
    if len(curve) <= DRAWN:
        return curve
    return [curve[round(i * (len(curve) - 1) / (DRAWN - 1))] for i in range(DRAWN)]
