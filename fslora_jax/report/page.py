"""The report as one HTML page that asks the network for nothing."""

import base64
import hashlib
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fslora_jax.metrics import headline
from fslora_jax.report.charts import Chart
from fslora_jax.report.collect import Run, Subject, different
from fslora_jax.report.drawing import looks
from fslora_jax.report.inline import views
from fslora_jax.report.names import measure_label, number, short, words
from fslora_jax.report.statistics import Row
from fslora_jax.report.tables import Tables, final
from fslora_jax.report.words import answer, facts, half, standing
from fslora_jax.rundir import flat


class Cell(NamedTuple):
    """A cell of a table: what it says, and by what it is sorted."""

    text: str
    key: float | str


class Grid(NamedTuple):
    """A table of the page; the last ``numeric`` columns are numbers. ``csv`` is a link that holds all of it."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    numeric: int
    csv: str


def render(subject: Subject, tables: Tables, charts: Sequence[Chart], refresh: int | None) -> str:
    """The whole page; with ``refresh`` it loads itself again after so many seconds."""
    environment = Environment(
        loader=PackageLoader("fslora_jax", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = resource("page.js")
    runs = subject.runs
    return environment.get_template("page.html").render(
        subject=subject,
        heading=subject.question or subject.title,
        standing=standing(runs),
        done=sum(run.state == "finished" for run in runs),
        answer=answer(subject, tables),
        facts=facts(runs[0]) if len(runs) == 1 else {},
        grids=result_grids(tables),
        figures=[(chart, views(chart, tables, f"f{number}")) for number, chart in enumerate(charts)],
        label=measure_label,
        runs=runs_grid(runs),
        troubles=[run for run in runs if run.trouble],
        common=common_settings(runs),
        own=[(run, own_settings(run, runs), command(run)) for run in runs if run.settings],
        versions=versions(runs),
        refresh=refresh,
        style=Markup(resource("page.css")),
        script=Markup(script),
        policy=f"'sha256-{_digest(script)}'",
        data=embedded({chart.name: drawn(chart, tables) for chart in charts}),
    )


@cache
def resource(name: str) -> str:
    """A file beside this one."""
    return files("fslora_jax.report").joinpath(name).read_text(encoding="utf-8")


def embedded(values: Any) -> Markup:
    r"""JSON that no text in it can leave.

    >>> str(embedded("</script>"))
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def drawn(chart: Chart, tables: Tables) -> dict[str, Any]:
    """What the script tells of a chart's points: its columns, and what they are called."""
    return {
        "kind": chart.kind,
        "xs": chart.xs,
        "measures": {measure: measure_label(measure) for measure in chart.measures},
        "metrics": {panel: words(metric) for panel, metric in tables.metrics.items()},
        "series": list(looks(chart, tables)),
        "columns": {name: packed([plain(row[name]) for row in chart.rows]) for name in chart.rows[0]},
    }


def packed(values: list[Any]) -> list[Any] | dict[str, Any]:
    """A column of texts as numbers into its different texts.

    >>> packed(["a", "b", "a"]), packed([1, None])
    ({'texts': ['a', 'b'], 'at': [0, 1, 0]}, [1, None])
    """
    if not all(isinstance(value, str) for value in values):
        return values
    number = {text: i for i, text in enumerate(dict.fromkeys(values))}
    return {"texts": list(number), "at": [number[text] for text in values]}


def plain(value: Any) -> Any:
    """A value for JSON: five significant digits are what a figure shows; what is missing is null.

    >>> [plain(x) for x in (0.123456789, float("nan"), 3, "a", None)]
    [0.12346, None, 3, 'a', None]
    """
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def result_grids(t: Tables) -> list[Grid]:
    """Means and paired differences, in the end and at equal bytes, where there is anything to compare."""
    several = any(row["n"] > 1 for row in t.means)
    means = [("means", "Means over repetitions" if several else "Results", t.means)]
    means += [("equal", "At equal uploaded bytes", t.equal)]
    differ = [("differences", "Paired differences", t.differences)]
    differ += [("equal_differences", "Paired differences at equal uploaded bytes", t.equal_differences)]
    numbers = ["mean", "half", "n", "start", "up_MB", "seconds"]
    texts = ["panel", "axis", "choice", "against", "where", "metric"]
    return [
        *(
            grid(name, title, rows, ["panel", "series", "metric"], numbers)
            for name, title, rows in means
            if len(rows) > 1
        ),
        *(grid(name, title, rows, texts, numbers[:3]) for name, title, rows in differ if rows),
    ]


def runs_grid(runs: Sequence[Run]) -> Grid:
    """A row for each run, also of those that are not finished."""
    axes = list(dict.fromkeys(axis for run in runs for axis in run.labels))
    measured = ["value", "start", "rounds", "up_MB", "seconds", "compile_seconds"]
    rows = [
        {"run": run.name, "grid": run.grid, **{axis: run.labels.get(axis, "") for axis in axes}}
        | {"state": run.state, "metric": "", **dict.fromkeys(measured)}
        | (final(run.summary, run.clocks, headline(run.records)) if run.summary else {})
        for run in runs
    ]
    places = ["grid", *axes] if axes else ["run"]
    return grid("runs", "Runs", rows, [*places, "state", "metric"], measured)


TITLES = {
    "panel": "measured on",
    "half": "± 95 %",
    "up_MB": "MB up",
    "value": "final",
    "against": "instead of",
    "where": "all else equal",
}


def grid(name: str, title: str, rows: list[Row], texts: list[str], numbers: list[str]) -> Grid:
    """A table of the page from some columns, without empty ones; the link has all columns, and all digits."""
    rows = [row | {"half": half(row)} if "low" in row else row for row in rows]
    texts = [n for n in texts if any(row[n] for row in rows)]
    numbers = [n for n in numbers if any(_key(row[n]) != "" for row in rows)]
    cells = [
        [Cell(_text(row[n], n), _key(row[n])) for n in texts]
        + [Cell(number(row[n]), _key(row[n])) for n in numbers]
        for row in rows
    ]
    columns = [TITLES.get(n, short(n).replace("_", " ")) for n in (*texts, *numbers)]
    return Grid(name, title, columns, cells, len(numbers), csv_link(rows))


def _text(value: Any, column: str) -> str:
    return words(value) if column == "metric" else short(value) if column == "axis" else str(value)


def _key(value: Any) -> float | str:
    """Numbers, and texts that are numbers, are sorted as numbers."""
    try:
        key = float(value)
    except (TypeError, ValueError):
        return "" if value is None else str(value).lower()
    return key if math.isfinite(key) else ""


def csv_link(rows: list[Row]) -> str:
    """A link that is the table."""
    text = pd.DataFrame(rows).to_csv(index=False).encode()
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text).decode()}"


def common_settings(runs: Sequence[Run]) -> str:
    """What all runs have in common, as YAML."""
    begun = [run for run in runs if run.settings]
    apart = set(different(begun))
    return _yaml({k: v for k, v in begun[0].settings.items() if k not in apart}) if begun else ""


def own_settings(run: Run, runs: Sequence[Run]) -> str:
    """In what a run differs from the others, as YAML."""
    apart = different([other for other in runs if other.settings])
    return _yaml({name: run.settings[name] for name in apart if name in run.settings})


def _yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100) if settings else ""


def command(run: Run) -> str:
    """What trains the same again."""
    return f"fslora train {shlex.quote(str(run.folder / 'config.yaml'))} --run-dir {shlex.quote(f'again/{run.name}')}"


def versions(runs: Sequence[Run]) -> list[str]:
    """Of the code and packages that began the runs; more than one line where they differ."""
    made = Counter(
        ", ".join(
            f"{name} {version}" for name, version in (flat(run.made_by) if run.made_by else {}).items()
        ).replace("versions.", "")
        for run in runs
        if run.settings
    )
    return [
        f"{text or 'not recorded'} ({count} {'run' if count == 1 else 'runs'})"
        for text, count in made.items()
    ]


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
