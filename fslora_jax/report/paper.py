"""The page's charts for paper: PNG and PDF of a column's width, the same bytes for the same numbers."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from fslora_jax.report.charts import Chart, styles
from fslora_jax.report.names import words
from fslora_jax.report.statistics import Row, grouped
from fslora_jax.report.styles import COLOURS, OF_MATPLOTLIB
from fslora_jax.report.tables import Tables

COLUMN = 3.3
"""Width of a panel in inches, of a column of a two-column paper."""
MARKED, BANDS = 12, 8
"""Markers of a curve, and curves of a panel that have bands, at most."""
PRINT: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # embedded TrueType, which publishers ask for
    "text.parse_math": False,  # a name with dollar signs is a name
}


def draw_charts(charts: Sequence[Chart], tables: Tables, folder: Path) -> None:
    """Draws each chart by its main measure over each of its x axes."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(PRINT):
        for chart in charts:
            for x in chart.xs or {"": ""}:
                name = f"{chart.name}_{x}" if len(chart.xs) > 1 else chart.name
                save(draw(chart, tables, x), folder / name)


def draw(chart: Chart, tables: Tables, x: str) -> Figure:
    """One chart; a panel for each thing that is measured on, in two columns. Of who holds what the first."""
    rows = [row for row in chart.rows if not chart.measures or row["measure"] == chart.measures[0]]
    panels = grouped(rows, "panel")
    if chart.kind == "shares":
        panels = dict(list(panels.items())[:1])
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = 2.2
    if chart.kind == "intervals":
        deepest = max(wrapped(row["series"]).count("\n") for row in rows)
        height = 0.6 + (0.26 + 0.12 * deepest) * max(map(len, panels.values()))
    looks: Looks = {
        name: {
            "color": COLOURS[s.colour],
            "marker": OF_MATPLOTLIB[s.marker],
            "ls": (0, s.dash) if s.dash else "-",
        }
        for name, s in styles(chart, tables).items()
    }
    named = list(dict.fromkeys(row["series"] for row in rows)) if chart.kind in ("lines", "shares") else []
    beside = columns * (1 if max(map(len, named), default=0) > 24 else 2)
    legend = 0.17 * -(-len(named) // beside)
    figure = Figure(figsize=(COLUMN * columns, height * lines + legend + 0.1), layout="constrained")
    for number, ((panel,), mine) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, number, title=panel if len(panels) > 1 else "")
        metric = words(tables.metrics.get(str(panel), next(iter(tables.metrics.values()))))
        measure = metric if chart.measures[:1] in ((), ("main",)) else words(chart.measures[0])
        axes.set(xlabel=chart.xs.get(x, measure), ylabel=measure)
        KINDS[chart.kind](axes, mine, chart, x, looks)
    found = {n: h for axes in figure.axes for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        figure.legend(found.values(), found, loc="outside lower center", ncols=beside, frameon=False)
    return figure


Looks = Mapping[str, Any]


def column(rows: Sequence[Row], name: str) -> Float[np.ndarray, " n"]:
    """A column; what is missing is NaN."""
    return np.array([row[name] for row in rows], float)


def _lines(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> None:
    groups = grouped(rows, "series")
    for number, ((series,), mine) in enumerate(groups.items()):
        look = looks[str(series)]
        at, mean, low, high = (column(mine, name) for name in (x, "mean", "low", "high"))
        aside = 1.5 * (number - (len(groups) - 1) / 2) / 72 if chart.ends == "bars" else 0.0
        beside = axes.transData + ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans)
        every = -(-len(mine) // MARKED)
        axes.plot(
            at, mean, label=series, transform=beside, markevery=((len(mine) - 1) % every, every), **look
        )
        # What is moved aside counts for the limits as if it were not.
        ends = (mean, low, high) if len(groups) <= BANDS or chart.ends == "bars" else (mean,)
        axes.update_datalim([(a, b) for end in ends for a, b in zip(at, end, strict=True) if np.isfinite(b)])
        if chart.ends == "bars":
            axes.vlines(at, low, high, color=look["color"], transform=beside)
        elif np.isfinite(low).sum() > 1 and len(groups) <= BANDS:
            axes.fill_between(at, low, high, color=look["color"], alpha=0.14, lw=0)
    at = column(rows, x)
    if chart.ends == "bars" and at.min() > 0 and at.max() >= 30 * at.min():
        axes.set_xscale("log")
    elif (at == at.round()).all():
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.autoscale_view()


def _intervals(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> None:
    del x
    names = [row["series"] for row in rows]
    for number, row in enumerate(rows):
        look = {"color": COLOURS[0], "marker": "o"} if chart.ends == "differences" else looks[row["series"]]
        axes.plot(row["mean"], number, marker=look["marker"], color=look["color"])
        axes.hlines(number, row["low"], row["high"], color=look["color"])
    if chart.ends == "differences":
        axes.axvline(0, color="0.4", lw=0.6)
        axes.set_xlabel(f"{axes.get_xlabel()}, difference")
    _named(axes, names)


def wrapped(name: str) -> str:
    """A name in lines that leave a column its room."""
    return textwrap.fill(name, 26)


def _named(axes: Axes, names: Sequence[str]) -> None:
    axes.set(ylabel="", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])


def _shares(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> None:
    del chart, x
    many = len(looks) > len(COLOURS)
    shades = colormaps["cividis"](np.linspace(0, 1, len(looks)))
    left = np.zeros(1 + max(row["client"] for row in rows))
    for (series,), mine in grouped(rows, "series").items():
        colour = shades[list(looks).index(str(series))] if many else looks[str(series)]["color"]
        clients, counts = [row["client"] for row in mine], column(mine, "examples")
        axes.barh(
            clients, counts, left=left[clients], color=colour, height=0.85, label=None if many else series
        )
        left[clients] += counts
    axes.set(xlabel="examples", ylabel="client", ylim=(len(left) - 0.5, -0.5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def _clients(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> None:
    del chart, x
    groups = grouped(rows, "series")
    for number, ((series,), mine) in enumerate(groups.items()):
        values = column(mine, "value")
        axes.plot(
            values, np.full(len(values), number), "|", color=looks[str(series)]["color"], ms=10, alpha=0.6
        )
        axes.plot(values.mean(), number, "D", color="black")
    _named(axes, [str(series) for (series,) in groups])


KINDS = {"lines": _lines, "intervals": _intervals, "shares": _shares, "clients": _clients}


def save(figure: Figure, path: Path) -> None:
    """PNG and PDF, without date and version inside, whole or not there."""
    unsaid = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for kind, metadata in unsaid.items():
        fresh = path.with_name(f".{path.name}.{kind}")
        figure.savefig(fresh, dpi=300, format=kind, metadata=metadata)
        fresh.replace(path.with_name(f"{path.name}.{kind}"))
