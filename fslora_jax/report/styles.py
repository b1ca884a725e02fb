"""How a series looks: a colour that the colour-blind tell apart, a marker and a dash; no two of the first 28 agree."""

from typing import NamedTuple

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
"""Okabe and Ito's, but for yellow, which paper does not show; the page has lighter ones for its dark scheme."""
ZERO, RULE = "#666666", "#d5dae0"
"""The line at 0, and the page's rules behind a figure."""
MARKERS = "os^D*1x"
"""As matplotlib names them."""
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))
"""Lengths of dashes and gaps in points."""


class Style(NamedTuple):
    """Of one series; ``colour`` is a number into `COLOURS`."""

    colour: int
    marker: str
    dash: tuple[int, ...]


def style(number: int) -> Style:
    """The style of a chart's ``number``-th series."""
    return Style(number % len(COLOURS), MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)])
