"""How settings, places, metrics and numbers are called on the page and on paper."""

import math
import re
from collections.abc import Mapping
from typing import Any

BARE = ("grid", "run", "method")
"""Axes whose labels tell enough without the axis's name."""


def short(axis: str) -> str:
    """A setting's name without its section, where that still tells what it is.

    >>> short("partition.dirichlet_alpha"), short("client_optimizer.name")
    ('dirichlet_alpha', 'client_optimizer.name')
    """
    last = axis.rpartition(".")[2]
    return axis if last in ("name", "learning_rate", "options") else last


def told(labels: Mapping[str, str]) -> str:
    """A place on axes in words; a grid is told by its name alone.

    >>> told({"grid": "alone", "federation.only_client": "8"})
    'alone, only_client 8'
    """
    named = {axis: label for axis, label in labels.items() if label}
    return ", ".join(label if short(a) in BARE else f"{short(a)} {label}" for a, label in named.items())


def words(metric: str) -> str:
    """A metric's name in words; a symbol's index stays.

    >>> words("eval/matthews_correlation"), words("sigma_g^2")
    ('matthews correlation', 'sigma_g^2')
    """
    return re.sub("_(?=[a-z]{2})", " ", metric.removeprefix("eval/"))


def number(x: Any) -> str:
    """Three or four digits; nothing for what is missing.

    >>> number(0.77714), number(1234567.0), number(float("nan"))
    ('0.777', '1,234,567', '')
    """
    if isinstance(x, str):
        return x
    if x is None or not math.isfinite(x):
        return ""
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"


def measure_label(measure: str) -> str:
    """What the page calls a measure."""
    known = {"main": "main metric", "train/loss": "training loss", "eval/loss": "held-out loss"}
    return known.get(measure, words(measure))
