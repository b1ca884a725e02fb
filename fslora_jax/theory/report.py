"""What was measured as tidy records, as a table, and as figures, beside what the theorem says."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fslora_jax.config import Config
from fslora_jax.figures import gradient_figure, growth_figure
from fslora_jax.theory.bound import Problem, bound, departures, sufficient_rate
from fslora_jax.theory.estimate import Estimate
from fslora_jax.theory.growth import expected_growth

Values = Mapping[tuple[str, int], Estimate]
"""Estimates by name and round."""


def records(values: Values) -> list[dict[str, Any]]:
    """One for each name and round: ``name``, ``round``, ``value``, ``low``, ``high``; no interval is None."""
    return [{"name": name, "round": t} | numbers(estimate) for (name, t), estimate in values.items()]


def numbers(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as plain numbers."""
    return {k: None if math.isnan(x) else float(x) for k, x in estimate._asdict().items()}


def problem(config: Config, ranks: np.ndarray, values: Values) -> Problem:
    """The theorem's constants from what was measured: the largest over the points, which only samples the path.

    A loss is never negative, so ``f_S`` at the start is at least F0.
    """

    def all_of(name: str) -> list[float]:
        return [float(found.value) for (known, _), found in values.items() if known == name]

    return Problem(
        gap=float(values["f_S", 0].value),
        rate=config.client_optimizer.learning_rate,
        local_steps=config.federation.local_steps,
        clients=config.clients_per_round,
        smoothness=max(map(abs, all_of("eigenvalue f"))),
        inverse=config.lora.r / ranks,
        noise=max(0.0, *all_of("sigma_g^2")),
        sketch=max(0.0, *all_of("sigma_s^2")),
        spread=max(0.0, *all_of("sigma_h^2")),
    )


def mean_over_rounds(rounds: Sequence[int], values: Sequence[float]) -> float:
    """The mean of a quantity over the rounds from a few of them, by the trapezoidal rule.

    >>> mean_over_rounds([0, 2, 4], [4.0, 2.0, 2.0])
    2.5
    """
    return float(np.trapezoid(values, rounds)) / (rounds[-1] - rounds[0]) if len(rounds) > 1 else values[0]


def compared(config: Config, p: Problem, values: Values) -> dict[str, Any]:
    """The bound with its parts over the rounds up to the last point, beside the measured mean."""
    by_round = {t: float(found.value) for (name, t), found in values.items() if name == "grad_f_S^2"}
    rounds = max(max(by_round), 1)
    theorem, kept = bound(p, rounds), bound(p, rounds, redraw=False)
    return {
        "rounds": rounds,
        "measured_mean": mean_over_rounds([*by_round], [*by_round.values()]),
        "theorem": theorem._asdict() | {"total": theorem.total},
        "fixed_sketch": kept._asdict() | {"total": kept.total},
        "constants": p._asdict() | {"inverse": {"mean": p.inverse.mean(), "max": p.inverse.max()}},
        "sufficient_learning_rate": sufficient_rate(p),
        "departures": departures(config),
    }


def growth_records(growth: Mapping[str, Sequence[Estimate]]) -> list[dict[str, Any]]:
    """Variance of local updates by mode and step, with ``theory``: the variance of one step, times H or H^2."""
    one = float(growth["fixed"][0].value)
    return [
        {"name": f"update_variance {mode}", "local_steps": h}
        | numbers(estimate)
        | {"theory": one * expected_growth(h, redraw=mode == "redrawn")}
        for mode, found in growth.items()
        for h, estimate in enumerate(found, 1)
    ]


def draw(run_dir: Path, p: Problem, found: Mapping[str, Any]) -> list[Path]:
    """``figures/theory_gradient.png`` and ``figures/theory_growth.png``."""
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    points = [x for x in found["estimates"] if x["name"] == "grad_f_S^2"]
    rounds = range(1, found["bound"]["rounds"] + 1)
    curves = {
        "Theorem 4.4": [bound(p, t).total for t in rounds],
        "with a fixed sketch": [bound(p, t, redraw=False).total for t in rounds],
    }
    paths = [folder / "theory_gradient.png", folder / "theory_growth.png"]
    gradient_figure(points, rounds, curves, paths[0])
    growth_figure(found["growth"], paths[1])
    return paths


def show(found: Mapping[str, Any]) -> None:
    """Tables of estimates by round and of growth by step, and the bound."""
    console = Console()
    rounds = list(dict.fromkeys(x["round"] for x in found["estimates"]))
    table = Table(title="estimates with 95 % intervals", title_justify="left")
    table.add_column("round")
    for t in rounds:
        table.add_column(str(t), justify="right")
    for name in dict.fromkeys(x["name"] for x in found["estimates"]):
        table.add_row(name, *(_cell(x) for x in found["estimates"] if x["name"] == name))
    console.print(table)

    drawn, everybody = len(found["clients"]), found["population"]
    if drawn < everybody:
        console.print(
            f"from {drawn} of {everybody} clients; intervals are for all, of curvatures and below for those drawn",
            soft_wrap=True,
        )

    table = Table(title="variance of a local update by the sketch, in that of one step", title_justify="left")
    for name in ("local steps", "fixed", "H^2", "redrawn", "H"):
        table.add_column(name, justify="right")
    by_step: dict[int, list[str]] = {}
    one = found["growth"][0]["theory"] or 1.0
    for x in found["growth"]:
        by_step.setdefault(x["local_steps"], []).extend(
            (_cell({k: x[k] and x[k] / one for k in ("value", "low", "high")}), f"{x['theory'] / one:.0f}")
        )
    for h, cells in by_step.items():
        if h in (1, 2, 5, 10, 20, max(by_step)):
            table.add_row(str(h), *cells)
    console.print(table)

    b = found["bound"]
    for name in ("theorem", "fixed_sketch"):
        parts = " + ".join(f"{b[name][part]:.3g} ({part})" for part in ("start", "noise", "drift"))
        console.print(f"{name.replace('_', ' ')}: {parts} = {b[name]['total']:.3g}", soft_wrap=True)
    console.print(
        f"measured mean of |grad f_S|^2 over {b['rounds']} rounds: {b['measured_mean']:.3g}\n"
        f"learning rate {b['constants']['rate']:g}; the theorem is sure to hold up to "
        f"{b['sufficient_learning_rate']:.2g}",
        soft_wrap=True,
    )
    for departure in b["departures"]:
        console.print(f"beside the theorem's assumptions: {departure}", soft_wrap=True)


def _cell(x: Mapping[str, float | None]) -> str:
    value, low, high = x["value"], x["low"], x["high"]
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"
