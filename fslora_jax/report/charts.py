"""What is drawn, as data: the page and the paper draw the same charts."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fslora_jax.federation.fairness import FACTS
from fslora_jax.report.collect import Run, Subject
from fslora_jax.report.names import short, told
from fslora_jax.report.statistics import Row, grouped
from fslora_jax.report.styles import Style, style
from fslora_jax.report.tables import Tables

CLIENTS_DRAWN, PARTITIONS_DRAWN = 100, 12
BANDS = 8
"""Curves of a panel at most, where they have bands."""
X_LABELS = {"round": "rounds", "MB": "MB uploaded, all clients", "clock": "simulated seconds"}


class Chart(NamedTuple):
    """Tidy rows, each with its ``panel``, and how to draw them.

    ``kind`` is ``lines`` (means over x; ``ends`` of intervals as a band or as bars), ``intervals`` (a row for each
    series; of ``differences`` with a line at 0), ``clients`` (a mark for each client) or ``shares`` (who holds what).
    """

    name: str
    title: str
    note: str
    kind: str
    rows: list[Row]
    xs: dict[str, str] = {}
    measures: tuple[str, ...] = ()
    ends: str = "band"

    @property
    def panels(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(row["panel"] for row in self.rows))


def all_charts(subject: Subject, tables: Tables) -> list[Chart]:
    """Every chart that has something to show."""
    runs = [run for run in subject.runs if run.name in tables.places]
    return [chart for chart in _charts(runs, tables) if chart.rows]


def _charts(runs: Sequence[Run], t: Tables) -> Iterator[Chart]:
    yield _learning(t)
    yield _finals(t)
    yield _differences(t)
    yield from _by_setting(t)
    yield _aggregation(t)
    yield _theorem(runs)
    yield _growth(runs)
    yield _fairness(runs, t)
    yield _resources(t)
    yield _shares(runs, t)


def _learning(t: Tables) -> Chart:
    rows = [row for row in t.curves if not row["measure"].startswith("aggregation/")]
    main = [row for row in rows if row["measure"] == t.metrics[row["panel"]]]
    if (
        len(set(t.metrics.values())) > 1
    ):  # panels of different metrics share a chart: each one's own is its main one
        main = [row | {"measure": "main"} for row in main]
        rows = [*main, *rows]
    measures = _measures(main, rows)
    note = _note(rows, "Means of the repetitions that have come so far", _bands(rows))
    return Chart("learning", "Learning curves", note, "lines", rows, _xs(rows), measures)


def _measures(*parts: Iterable[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["measure"] for rows in parts for row in rows))


def _xs(rows: Sequence[Row]) -> dict[str, str]:
    """The x axes on which there is anything after the start."""
    return {
        x: label
        for x, label in X_LABELS.items()
        if any(row["round"] and not math.isnan(row[x]) for row in rows)
    } or {"round": X_LABELS["round"]}


def _note(rows: Sequence[Row], what: str, drawn: Sequence[bool] = (True,)) -> str:
    """Of means; ``drawn`` says of each of the chart's drawings whether its intervals are."""
    if not any(row["n"] > 1 for row in rows):
        return "Without repetitions there are no intervals."
    if all(drawn):
        return f"{what}, with 95 % intervals (Student's t)."
    if any(drawn):
        return f"{what}, with 95 % intervals (Student's t) where there are at most {BANDS} curves."
    return f"{what}; of more than {BANDS} curves no intervals are drawn."


def _bands(rows: Sequence[Row]) -> list[bool]:
    """Of each panel and measure whether its curves are few enough for bands."""
    groups = grouped(rows, "panel", "measure").values()
    return [len({row["series"] for row in group}) <= BANDS for group in groups]


def _finals(t: Tables) -> Chart:
    rows = t.means if len(t.means) > 1 else []
    return Chart(
        "final", "Final results", _note(rows, "Means of the finished repetitions"), "intervals", rows
    )


def _differences(t: Tables) -> Chart:
    rows = [
        row | {"series": f"{told({row['axis']: row['choice']})} instead of {row['against']}{where}"}
        for row in t.differences
        for where in [f", {row['where']}" if row["where"] else ""]
    ]
    repeated = any(row["n"] > 1 for row in t.differences)
    what = "The choice minus the first choice of its axis, all else equal"
    note = (
        f"{what}, paired over the repetitions, with 95 % intervals (Student's t). "
        "Not corrected for the number of comparisons."
        if repeated
        else f"{what}; of one pair each, without intervals."
    )
    return Chart("differences", "Paired differences", note, "intervals", rows, ends="differences")


def _by_setting(t: Tables) -> Iterator[Chart]:
    """The final metric over each axis whose labels are numbers that mean more or less."""
    for axis in t.axes:
        if axis == "federation.only_client":
            continue
        others = [name for name in t.axes if name != axis]
        rows = [
            {"panel": row["panel"], "series": told({a: row[a] for a in others}) or "all else equal"}
            | {"measure": "main", "x": x, **{name: row[name] for name in ("mean", "low", "high", "n")}}
            for row in t.means
            if (x := _number(row[axis])) is not None
        ]
        groups = grouped(sorted(rows, key=lambda row: row["x"]), "panel", "series").values()
        rows = [row for group in groups if len(group) > 1 for row in group]
        note = _note(rows, "Means of the finished repetitions")
        title = f"Final result by {short(axis)}"
        yield Chart(f"by_{short(axis)}", title, note, "lines", rows, {"x": short(axis)}, ("main",), "bars")


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def _aggregation(t: Tables) -> Chart:
    rows = [row for row in t.curves if row["measure"].startswith("aggregation/")]
    note = (
        "How far the server's step is from the mean of what the clients trained, relative to that mean: "
        "error counts their changes, from mean their weights."
    )
    return Chart("aggregation", "Aggregation error", note, "lines", rows, _xs(rows), _measures(rows))


def _theorem(runs: Sequence[Run]) -> Chart:
    """What ``fslora theory`` estimated at checkpoints."""
    rows = [
        _measured(run, runs, found, found["round"]) | {"series": "measured", "measure": found["name"]}
        for run in runs
        for found in run.theory.get("estimates", [])
    ]
    note = "Estimates at checkpoints with 95 % intervals, by fslora theory."
    return Chart(
        "theory", "The theorem's terms", note, "lines", rows, {"x": "rounds"}, _measures(rows), "bars"
    )


def _growth(runs: Sequence[Run]) -> Chart:
    rows = [
        _measured(run, runs, measured, found["local_steps"])
        | {"series": f"{name}, {what}", "measure": "variance"}
        for run in runs
        for found in run.theory.get("growth", [])
        for name in [found["name"].rpartition(" ")[2]]
        for what, measured in (("measured", found), ("theory", {"value": found["theory"]}))
    ]
    note = "Variance by the sketch of a client's local update, with 95 % intervals, beside theory."
    return Chart(
        "growth", "Variance over local steps", note, "lines", rows, {"x": "local steps"}, ("variance",)
    )


def _measured(run: Run, runs: Sequence[Run], found: dict[str, Any], x: float) -> Row:
    panel = run.name if sum(bool(other.theory) for other in runs) > 1 else ""
    return {"panel": panel, "x": x, "n": 1, "mean": found["value"]} | {
        end: found.get(end) for end in ("low", "high")
    }


def _fairness(runs: Sequence[Run], t: Tables) -> Chart:
    rows = [
        {"panel": t.places[run.name].panel, "series": t.places[run.name].series, "measure": name}
        | {"client": record.get("name", f"client {record['client']}"), "k": record.get("k"), "value": value}
        for run in runs
        for record in run.clients
        for name, value in record.items()
        if name not in FACTS
    ]
    measures = sorted(_measures(rows), key=lambda name: name.endswith("loss"))
    note = "A mark for each client's own held-out examples, by fslora eval --per-client; the diamond is their mean."
    return Chart("clients", "Over the clients", note, "clients", rows, measures=tuple(measures))


def _resources(t: Tables) -> Chart:
    order = ("seconds", "tokens_per_second", "clients_per_second", "host_mb", "data_wait_share", "fill")
    rows = [row | {"low": None, "high": None} for row in t.clocks if row["measure"] in order]
    measures = tuple(name for name in order if name in _measures(rows))
    note = "Means of the repetitions, by the clock of the machine, which may have had other things to do."
    return Chart("resources", "Time and memory", note, "lines", rows, {"round": "rounds"}, measures)


def _shares(runs: Sequence[Run], t: Tables) -> Chart:
    """Who holds what: a panel for each way of dealing out, of its first repetition."""
    seen: dict[tuple[str, str], Run] = {}
    for run in runs:
        dealt = {
            k: v for k, v in run.settings.items() if k.startswith("partition.") or k.endswith("num_clients")
        }
        if run.partition.get("clients"):
            seen.setdefault((t.places[run.name].panel, str(dealt)), run)
    rows = [
        {"panel": run.name, "client": client, "series": label, "examples": count}
        for run in list(seen.values())[:PARTITIONS_DRAWN]
        for client, counts in enumerate(run.partition["clients"][:CLIENTS_DRAWN])
        for label, count in counts.items()
    ]
    return Chart("shares", "Who holds what", "Training examples of each client by label.", "shares", rows)


def styles(chart: Chart, t: Tables) -> dict[str, Style]:
    """How each series of a chart looks; runs look the same in all charts."""
    known = {name: i for i, name in enumerate(dict.fromkeys(place.series for place in t.places.values()))}
    groups = [chart.rows] if chart.kind != "shares" else grouped(chart.rows, "panel").values()
    names = [dict.fromkeys(row["series"] for row in rows) for rows in groups]
    return {name: style(known.get(name, i)) for group in names for i, name in enumerate(group)}
