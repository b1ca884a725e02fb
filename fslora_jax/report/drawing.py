"""How a panel of a chart is drawn with matplotlib: the same for the page and for paper."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from fslora_jax.report.charts import BANDS, Chart, styles
from fslora_jax.report.names import measure_label, words
from fslora_jax.report.statistics import Row, grouped
from fslora_jax.report.styles import COLOURS, ZERO
from fslora_jax.report.tables import Tables

MARKED = 12
"""Markers of a curve at most."""
BAR = 0.85
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
Looks = Mapping[str, Mapping[str, Any]]
Points = Float[np.ndarray, "rows 2"]


def looks(chart: Chart, tables: Tables) -> Looks:
    """What matplotlib takes for each series: colour, marker, dash; labels beyond the colours are shades."""
    known = styles(chart, tables)
    found = {
        name: {"color": COLOURS[s.colour], "marker": s.marker, "ls": (0, s.dash) if s.dash else "-"}
        for name, s in known.items()
    }
    if chart.kind == "shares" and max(map(len, _labels(chart))) > len(COLOURS):
        shades = colormaps["cividis"](np.linspace(0, 1, len(known)))
        found = {
            name: look | {"color": to_hex(shade)}
            for (name, look), shade in zip(found.items(), shades, strict=True)
        }
    return found


def _labels(chart: Chart) -> list[set[str]]:
    return [{row["series"] for row in rows} for rows in grouped(chart.rows, "panel").values()]


def draw_panel(
    axes: Axes, rows: Sequence[Row], chart: Chart, tables: Tables, measure: str, x: str, looks: Looks
) -> Points:
    """Draws rows of one panel and measure over ``x``; returns where each row is, in the data's coordinates.

    Artists have a gid: what part they are, and for a part of a series its number.
    """
    metric = words(tables.metrics.get(rows[0]["panel"], next(iter(tables.metrics.values()))))
    label = metric if measure in ("", "main") else measure_label(measure)
    axes.set(xlabel=chart.xs.get(x, label), ylabel=label)
    points = KINDS[chart.kind](axes, rows, chart, x, looks)
    axes.xaxis.label.set_gid("x-label")
    axes.yaxis.label.set_gid("y-label")
    return np.array(points, float)


def deepest(rows: Sequence[Row]) -> int:
    """How often the longest name of a series is broken into lines."""
    return max(wrapped(row["series"]).count("\n") for row in rows)


def column(rows: Sequence[Row], name: str) -> Float[np.ndarray, " n"]:
    """A column; what is missing is NaN."""
    return np.array([row[name] for row in rows], float)


def _lines(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> Any:
    groups = grouped(rows, "series")
    names = list(looks)
    for number, ((series,), mine) in enumerate(groups.items()):
        look, gid = looks[str(series)], names.index(str(series))
        at, mean, low, high = (column(mine, name) for name in (x, "mean", "low", "high"))
        aside = 1.5 * (number - (len(groups) - 1) / 2) / 72 if chart.ends == "bars" else 0.0
        beside = axes.transData + ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans)
        every = -(-len(mine) // MARKED)
        marks = ((len(mine) - 1) % every, every)
        axes.plot(at, mean, label=series, transform=beside, markevery=marks, gid=f"line.{gid}", **look)
        # What is moved aside counts for the limits as if it were not.
        ends = (mean, low, high) if len(groups) <= BANDS or chart.ends == "bars" else (mean,)
        axes.update_datalim([(a, b) for end in ends for a, b in zip(at, end, strict=True) if np.isfinite(b)])
        if chart.ends == "bars":
            axes.vlines(at, low, high, color=look["color"], transform=beside, gid=f"bar.{gid}")
        elif np.isfinite(low).sum() > 1 and len(groups) <= BANDS:
            axes.fill_between(at, low, high, color=look["color"], alpha=0.14, lw=0, gid=f"band.{gid}")
    at = column(rows, x)
    if chart.ends == "bars" and at.min() > 0 and at.max() >= 30 * at.min():
        axes.set_xscale("log")
    elif (at == at.round()).all():
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.autoscale_view()
    return np.column_stack([at, column(rows, "mean")])


def _intervals(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> Any:
    del x
    for number, row in enumerate(rows):
        look = {"color": COLOURS[0], "marker": "o"} if chart.ends == "differences" else looks[row["series"]]
        axes.plot(row["mean"], number, marker=look["marker"], color=look["color"])
        axes.hlines(number, row["low"], row["high"], color=look["color"])
    if chart.ends == "differences":
        axes.axvline(0, color=ZERO, lw=0.6)
        axes.set_xlabel(f"{axes.get_xlabel()}, difference")
    _named(axes, [row["series"] for row in rows])
    return np.column_stack([column(rows, "mean"), np.arange(len(rows))])


def wrapped(name: str) -> str:
    """A name in lines that leave a column its room."""
    return textwrap.fill(name, 26)


def _named(axes: Axes, names: Sequence[str]) -> None:
    axes.set(ylabel="", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), [wrapped(name) for name in names])


def _shares(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> Any:
    """All bars of a label are one path: a hundred clients stay a small file."""
    del chart, x
    names = list(looks)
    left = np.zeros(1 + max(row["client"] for row in rows))
    middle = {}
    for (series,), mine in grouped(rows, "series").items():
        clients, counts = column(mine, "client").astype(int), column(mine, "examples")
        start, end, low, high = left[clients], left[clients] + counts, clients - BAR / 2, clients + BAR / 2
        corners = np.stack([start, low, end, low, end, high, start, high], -1).reshape(-1, 4, 2)
        bars = Path.make_compound_path_from_polys(corners)
        gid, colour = f"share.{names.index(str(series))}", looks[str(series)]["color"]
        label = series if len(names) <= len(COLOURS) else None
        axes.add_patch(PathPatch(bars, facecolor=colour, linewidth=0, label=label, gid=gid))
        middle |= {(client, series): at for client, at in zip(clients, (start + end) / 2, strict=True)}
        left[clients] = end
    axes.set(xlabel="examples", ylabel="client", xlim=(0, 1.02 * left.max()), ylim=(len(left) - 0.5, -0.5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    return [(middle[row["client"], row["series"]], row["client"]) for row in rows]


def _clients(axes: Axes, rows: Sequence[Row], chart: Chart, x: str, looks: Looks) -> Any:
    del chart, x
    groups = grouped(rows, "series")
    for number, ((series,), mine) in enumerate(groups.items()):
        values, colour = column(mine, "value"), looks[str(series)]["color"]
        axes.plot(values, np.full(len(values), number), "|", color=colour, ms=10, alpha=0.6)
        axes.plot(values.mean(), number, "D", color="black")
    names = [str(series) for (series,) in groups]
    _named(axes, names)
    return [(row["value"], names.index(row["series"])) for row in rows]


KINDS = {"lines": _lines, "intervals": _intervals, "shares": _shares, "clients": _clients}
