"""How a series looks: a colour that the colour-blind tell apart, a marker and a dash; no two of the first 28 agree."""

from typing import NamedTuple

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
"""Okabe and Ito's, but for yellow, which paper does not show; the page has lighter ones for its dark scheme."""
MARKERS = ("circle", "square", "triangle", "diamond", "star", "wye", "times")
"""As Observable Plot names them."""
OF_MATPLOTLIB: dict[str, str] = dict(zip(MARKERS, "os^D*1x", strict=True))
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
