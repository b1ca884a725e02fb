"""The page's charts for paper: PNG and PDF of a column's width, the same bytes for the same numbers."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from fslora_jax.report.charts import Chart
from fslora_jax.report.drawing import PRINT, deepest, draw_panel, looks
from fslora_jax.report.statistics import grouped
from fslora_jax.report.tables import Tables

COLUMN = 3.3
"""Width of a panel in inches, of a column of a two-column paper."""


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
    measure = chart.measures[0] if chart.measures else ""
    rows = [row for row in chart.rows if not measure or row["measure"] == measure]
    panels = grouped(rows, "panel")
    if chart.kind == "shares":
        panels = dict(list(panels.items())[:1])
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    height = 2.2
    if chart.kind == "intervals":
        height = 0.6 + (0.26 + 0.12 * deepest(rows)) * max(map(len, panels.values()))
    named = list(dict.fromkeys(row["series"] for row in rows)) if chart.kind in ("lines", "shares") else []
    beside = columns * (1 if max(map(len, named), default=0) > 24 else 2)
    legend = 0.17 * -(-len(named) // beside)
    figure = Figure(figsize=(COLUMN * columns, height * lines + legend + 0.1), layout="constrained")
    for number, ((panel,), mine) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, number, title=panel if len(panels) > 1 else "")
        draw_panel(axes, mine, chart, tables, measure, x, looks(chart, tables))
    found = {n: h for axes in figure.axes for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(found) > 1:
        figure.legend(found.values(), found, loc="outside lower center", ncols=beside, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """PNG and PDF, without date and version inside, whole or not there."""
    unsaid = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for kind, metadata in unsaid.items():
        fresh = path.with_name(f".{path.name}.{kind}")
        figure.savefig(fresh, dpi=300, format=kind, metadata=metadata)
        fresh.replace(path.with_name(f"{path.name}.{kind}"))
