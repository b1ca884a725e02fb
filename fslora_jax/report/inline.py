"""The page's charts: the figures for paper as SVG inside the page, in its font and colours."""

import io
import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from fslora_jax.report.charts import Chart
from fslora_jax.report.drawing import PRINT, Looks, Points, deepest, draw_panel, looks
from fslora_jax.report.statistics import Row, grouped
from fslora_jax.report.styles import COLOURS, RULE, ZERO
from fslora_jax.report.tables import Tables

WIDTH = 4.0
"""Inches of a panel; on a phone its smallest text is then about 10 pixels high."""
SCREEN: dict[Any, Any] = PRINT | {
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "ytick.left": False,  # rules lead there
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fslora",  # the same names of parts each time
}
ON_PAGE = {colour: f"var(--s{number})" for number, colour in enumerate(COLOURS)} | {
    "#000000": "currentColor",
    ZERO: "var(--soft)",
    RULE: "var(--line)",
}
"""What the page's style sheet calls the colours of paper."""
CODES = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
"""Of matplotlib's paths, as SVG writes them."""


class Key(NamedTuple):
    """A series in a legend: its number in the chart, how its line is dashed, its marker's outline."""

    number: int
    series: str
    colour: str
    dash: str
    outline: str


class View(NamedTuple):
    """What a figure shows for one choice of its controls: a drawing for each panel, nothing where there is none."""

    x: str
    measure: str
    panel: str
    keys: list[Key]
    drawings: dict[str, Markup | None]


def views(chart: Chart, tables: Tables, prefix: str) -> list[View]:
    """All views of a chart; names inside the drawings begin with ``prefix``, so that none clash on a page."""
    looked = looks(chart, tables)
    with mpl.rc_context(SCREEN):
        return [
            View(x, measure, panel, keys(rows, chart, looked), drawings)
            for number, (x, measure, panel) in enumerate(_choices(chart))
            for rows in [_rows(chart, measure, panel)]
            for drawings in [_drawings(rows, chart, tables, measure, x, looked, f"{prefix}-{number}")]
        ]


def _choices(chart: Chart) -> Iterator[tuple[str, str, str]]:
    panels = chart.panels if chart.kind == "shares" else [""]
    return product(chart.xs or [""], chart.measures or [""], panels)


def _rows(chart: Chart, measure: str, panel: str) -> list[Row]:
    return [
        row
        for row in chart.rows
        if (not measure or row["measure"] == measure) and (not panel or row["panel"] == panel)
    ]


def _drawings(
    rows: Sequence[Row], chart: Chart, tables: Tables, measure: str, x: str, looked: Looks, prefix: str
) -> dict[str, Markup | None]:
    drawn = {}
    for number, ((panel,), all_mine) in enumerate(grouped(rows, "panel").items()):
        mine = [row for row in all_mine if not x or np.isfinite(row[x])]
        name = f"{chart.title}, {panel}" if panel else chart.title
        drawn[str(panel)] = (
            draw(mine, chart, tables, measure, x, looked, f"{prefix}-{number}", name) if mine else None
        )
    return drawn


def draw(
    rows: Sequence[Row],
    chart: Chart,
    tables: Tables,
    measure: str,
    x: str,
    looked: Looks,
    prefix: str,
    name: str,
) -> Markup:
    """One panel as an SVG element with an accessible ``name``; ``data-at`` is where each row is in it."""
    count = len({row["series"] for row in rows}) if chart.kind == "clients" else len(rows)
    listed = chart.kind in ("intervals", "clients")
    height = 0.6 + (0.27 + 0.13 * deepest(rows)) * count if listed else 2.4
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for patch in (figure.patch, axes.patch):
        patch.set_visible(False)
    points = draw_panel(axes, rows, chart, tables, measure, x, looked)
    axes.grid(axis="y" if chart.kind == "lines" else "x", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    root = tidied(text.getvalue(), prefix)
    at = axes.transData.transform(points) * 72 / figure.dpi
    root.attrib |= {"role": "img", "aria-label": name, "data-at": _written(at, 72 * height)}
    ElementTree.SubElement(root, "circle", {"class": "spot", "r": "4"})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _written(at: Points, height: float) -> str:
    """Points in the drawing's own coordinates, which count from the top; nothing for what is missing."""
    return ";".join(f"{x:.1f},{height - y:.1f}" if np.isfinite(x + y) else "" for x, y in at)


def tidied(svg: str, prefix: str) -> ElementTree.Element:
    """matplotlib's SVG as part of a page: without namespaces, metadata, style sheet, fonts and needless digits."""
    root = ElementTree.fromstring(svg)
    for part in root.iter():
        part.tag = part.tag.rpartition("}")[2]
        part.text, part.tail = ((text or "").strip() or None for text in (part.text, part.tail))
        given = {name.rpartition("}")[2]: value for name, value in part.attrib.items()}
        part.attrib = _attributes(part.tag, given, prefix)
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    _flatten(root)
    return root


def _flatten(parent: ElementTree.Element) -> None:
    """Groups that say nothing make place for what is in them."""
    for child in parent:
        _flatten(child)
    parent[:] = [
        part
        for child in parent
        if child.tag not in ("metadata", "style")
        for part in (child if child.tag == "g" and not child.attrib else [child])
    ]


def _attributes(tag: str, given: dict[str, str], prefix: str) -> dict[str, str]:
    """An element's attributes; what is a part of the chart tells which, and of which series."""
    name = given.pop("id", "")
    if tag != "g" and name:
        given["id"] = f"{prefix}-{name}"
    elif part := re.fullmatch(r"([a-z-]+)(?:\.(\d+))?", name):
        given["data-part"] = part[1]
        given |= {"data-series": part[2]} if part[2] else {}
    if given.get("transform", "").startswith("rotate(-0 "):
        del given["transform"]
    return {key: _value(key, value, prefix) for key, value in given.items()}


def _value(key: str, value: str, prefix: str) -> str:
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}\b", lambda colour: ON_PAGE.get(colour[0], colour[0]), value)
        value = re.sub(r"font-family: [^;]*; ", "", value)
    if key in ("d", "x", "y", "width", "height", "transform", "viewBox"):
        value = re.sub(r"-?\d+\.\d+", lambda digits: f"{float(digits[0]):.1f}".removesuffix(".0"), value)
        value = " ".join(value.split())
    value = re.sub(r"url\(#", f"url(#{prefix}-", value)
    return f"#{prefix}-{value[1:]}" if key == "href" else value


def keys(rows: Sequence[Row], chart: Chart, looked: Looks) -> list[Key]:
    """A legend's entries, where the drawing does not name its series itself and there are several."""
    here = {row["series"] for row in rows}
    if chart.kind not in ("lines", "shares") or len(here) < 2:
        return []
    return [
        Key(
            number,
            series,
            str(ON_PAGE.get(look["color"], look["color"])),
            "" if isinstance(look["ls"], str) else " ".join(map(str, look["ls"][1])),
            outline("s" if chart.kind == "shares" else look["marker"]),
        )
        for number, (series, look) in enumerate(looked.items())
        if series in here
    ]


def outline(marker: Any) -> str:
    """A marker of matplotlib as the path of an SVG, about 7 wide.

    >>> outline("s")
    'M-3.5 3.5L3.5 3.5L3.5 -3.5L-3.5 -3.5Z'
    """
    made = MarkerStyle(marker)
    path = made.get_path().transformed(made.get_transform()).transformed(Affine2D().scale(7, -7))
    return "".join(
        CODES[int(code)] + (" ".join(f"{x:.3g}" for x in points) if code != 79 else "")
        for points, code in path.iter_segments()
    )
