"""Figures of a run as PNG files; the same numbers give the same bytes."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from fslora_jax.data.partition import LISTED
from fslora_jax.metrics import headline

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Eight colours that the colour-blind tell apart (Okabe and Ito 2008)."""


def partition_figure(
    counts: Int[np.ndarray, "clients labels"], label_names: Sequence[str], path: Path
) -> None:
    """Draw who holds what: a stacked bar per client, client 0 on top, a colour per label; of very many the first."""
    whole, num_labels = counts.shape
    counts = counts[:LISTED]
    num_clients = len(counts)
    who = "client" if whole == num_clients else f"client (the first {num_clients:,} of {whole:,})"
    left = np.cumsum(counts, axis=1) - counts
    few = num_labels <= len(OKABE_ITO)
    colours = OKABE_ITO[:num_labels] if few else colormaps["cividis"](np.linspace(0, 1, num_labels))
    names = [name.replace("$", r"\$") for name in label_names]  # a bare dollar sign starts mathematics
    columns = min(num_labels, max(1, 80 // (6 + max(map(len, names)))))
    # Up to 75 clients the height follows their number; beyond, bars get thinner.
    height = 1.2 + 0.16 * min(max(num_clients, 6), 75) + 0.2 * num_labels / columns
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.add_subplot()
    for label, colour in enumerate(colours):
        axes.barh(np.arange(num_clients), counts[:, label], left=left[:, label], color=colour, height=0.9)
    axes.set(xlabel="examples", ylabel=who, ylim=(num_clients - 0.5, -0.5))
    axes.margins(x=0.01)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=25, integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    patches = [Patch(color=colour) for colour in colours]
    figure.legend(patches, names, loc="outside upper center", ncols=columns, frameon=False)
    _save(figure, path)


def run_figures(records: Sequence[Mapping[str, float]], folder: Path) -> None:
    """Draw a run's main metric (such as ``accuracy.png``), ``loss.png``, ``traffic.png``; of a clock, ``clock.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = [r for r in records if "train/loss" in r]
    metric = headline(records)
    name = metric.removeprefix("eval/")
    evaluated = [r for r in records if metric in r]

    def column(rows: Sequence[Mapping[str, float]], name: str) -> list[float]:
        return [row.get(name, 0.0) for row in rows]

    figure, axes = _axes("rounds", f"{name} on held-out examples")
    axes.plot(column(evaluated, "round"), column(evaluated, metric), "o-", color=OKABE_ITO[0])
    _save(figure, folder / f"{name}.png")

    figure, axes = _axes("rounds", "loss")
    axes.plot(
        column(trained, "round"), column(trained, "train/loss"), color=OKABE_ITO[1], label="clients' training"
    )
    axes.plot(
        column(evaluated, "round"), column(evaluated, "eval/loss"), "o-", color=OKABE_ITO[0], label="held-out"
    )
    axes.legend(frameon=False)
    _save(figure, folder / "loss.png")

    if any("clock/simulated_seconds" in r for r in evaluated):
        figure, axes = _axes("simulated seconds", f"{name} on held-out examples")
        axes.plot(
            column(evaluated, "clock/simulated_seconds"), column(evaluated, metric), "o-", color=OKABE_ITO[4]
        )
        _save(figure, folder / "clock.png")

    figure, axes = _axes("sent so far (MB, all clients)", f"{name} on held-out examples")
    for way, colour in (("up", OKABE_ITO[2]), ("down", OKABE_ITO[3])):
        sent = np.array(column(evaluated, f"traffic/{way}_bytes")) / 1e6
        axes.plot(sent, column(evaluated, metric), "o-", color=colour, label=way)
    axes.legend(frameon=False)
    _save(figure, folder / "traffic.png")


def gradient_figure(
    points: Sequence[Mapping[str, Any]],
    rounds: Sequence[int],
    bounds: Mapping[str, Sequence[float]],
    path: Path,
) -> None:
    """Draw ``value``, ``low`` and ``high`` of a squared gradient by ``round``, and bounds on its mean so far."""
    figure, axes = _axes("rounds", r"$|\nabla f_S|^2$")
    for (name, curve), colour in zip(bounds.items(), OKABE_ITO[1:], strict=False):
        axes.plot(rounds, curve, color=colour, label=f"bound on the mean: {name}")
    value = np.array([p["value"] for p in points])
    ends = np.array([[p["value"] - p["low"], p["high"] - p["value"]] for p in points]).T
    at = [p["round"] for p in points]
    axes.errorbar(at, value, ends, fmt="o", capsize=3, color=OKABE_ITO[0], label="measured, 95 %")
    axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    _save(figure, path)


def growth_figure(growth: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw ``value``, ``low``, ``high`` and ``theory`` of an update's variance by ``local_steps``, a colour a name."""
    figure, axes = _axes("local steps", "variance of the local update")
    for name, colour in zip(dict.fromkeys(x["name"] for x in growth), OKABE_ITO, strict=False):
        mine = [x for x in growth if x["name"] == name]
        at = [x["local_steps"] for x in mine]
        low, high = ([x[end] for x in mine] for end in ("low", "high"))
        axes.fill_between(at, low, high, color=colour, alpha=0.2)
        axes.plot(at, [x["value"] for x in mine], "o-", color=colour, label=name.split()[-1])
        axes.plot(at, [x["theory"] for x in mine], ":", color=colour)
    longest = max(x["local_steps"] for x in growth)
    shown = [h for h in (1, 2, 5, 10, 20, 50, 100) if h <= longest]
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(shown, [str(h) for h in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, title="sketch (dotted: theory)")
    _save(figure, path)


def lines_figure(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, path: Path
) -> None:
    """Draw lines ``name -> (x, y)`` on logarithmic axes, where doubling is the same distance everywhere."""
    figure, axes = _axes(x, y)
    for (name, (xs, ys)), colour in zip(lines.items(), cycle(OKABE_ITO), strict=False):
        axes.plot(xs, ys, "o-", color=colour, label=name)
    axes.set(xscale="log", yscale="log" if all(min(ys) > 0 for _, ys in lines.values()) else "linear")
    at = sorted({x for xs, _ in lines.values() for x in xs})
    axes.set_xticks(at, [f"{x:,.0f}" if x < 1e5 else f"{x / 1e6:,.1f} M" for x in at])
    axes.set_xticks([], minor=True)
    axes.margins(y=0.2)
    if len(lines) > 1:
        axes.legend(frameon=False)
    _save(figure, path)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    """The same numbers give the same bytes: no version or date inside; whole or not there."""
    fresh = path.with_name(f".{path.name}")
    figure.savefig(fresh, dpi=150, format="png", metadata={"Software": None})
    fresh.replace(path)
