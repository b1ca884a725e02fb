"""The answer in words and numbers, before any figure."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fslora_jax.report.collect import Run, Subject
from fslora_jax.report.names import number, told, words
from fslora_jax.report.statistics import Row, grouped
from fslora_jax.report.tables import ALL, Tables

LISTED = 6
"""Differences told one by one."""


def standing(runs: Sequence[Run]) -> str:
    """How far the runs are, in a sentence.

    >>> here = Path()
    >>> standing([Run("a", here, "g", {}), Run("b", here, "g", {}, trouble="torn")])
    '0 of 2 runs have finished; 1 has not begun, 1 cannot be read.'
    """
    count = Counter(run.state.partition(" ")[0] for run in runs)
    if count["finished"] == len(runs):
        return "The run has finished." if len(runs) == 1 else f"All {len(runs)} runs have finished."
    others = [
        (count["round"], "has begun", "have begun"),
        (count["not"], "has not begun", "have not begun"),
        (count["unreadable"], "cannot be read", "cannot be read"),
        (count["diverged"], "has diverged", "have diverged"),
    ]
    told = ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in others if n)
    if len(runs) == 1:
        return f"The run has not finished: it is at {runs[0].state}."
    return f"{count['finished']} of {len(runs)} runs have finished; {told}."


def answer(subject: Subject, t: Tables) -> list[str]:
    """Sentences: of each panel the best and the worst, or what a single run did; then differences."""
    if not t.means:
        return [*_so_far(t)] or ["Nothing has been measured yet."]
    return [*_finals(t), *_equal(t), *_differences(t), *_bound(subject.runs)]


def _finals(t: Tables) -> Iterator[str]:
    for (panel,), rows in grouped(t.means, "panel").items():
        metric, lower = rows[0]["metric"], rows[0]["metric"] == "loss"
        ordered = sorted(rows, key=lambda row: row["mean"], reverse=not lower)
        best, worst = ordered[0], ordered[-1]
        name = f"{panel}: {words(metric)}" if panel else words(metric).capitalize()
        start = "" if math.isnan(best["start"]) else f"; before training {number(best['start'])}"
        if len(rows) == 1:
            where = "" if best["series"] == ALL else f" with {best['series']}"
            yield f"{name} is {value(best)}{where}{start}."
        else:
            high, low = ("lowest", "highest") if lower else ("highest", "lowest")
            arms = [part[0] for part in grouped(ordered, "grid").values()] if "grid" in best else [best]
            told = "; ".join(f"{row['series']}: {value(row)}" for row in arms)
            each = f", the {high} of each grid: " if len(arms) > 1 else f" is {high} with "
            of = f"{low} of all" if len(arms) > 1 else low
            yield f"{name}{each}{told}; {of} with {worst['series']}: {value(worst)}{start}."


def _equal(t: Tables) -> Iterator[str]:
    """The best at equal uploaded bytes, for each budget."""
    for (panel,), rows in grouped(t.equal, "panel").items():
        lower = rows[0]["metric"] == "loss"
        best = {
            budget: min(part, key=lambda row: row["mean"] if lower else -row["mean"])
            for (budget,), part in grouped(rows, "up_MB").items()
            if len(part) > 1
        }
        told = [f"{row['series']} at {number(budget)} MB: {value(row)}" for budget, row in best.items()]
        if told:
            yield f"{panel}{': at' if panel else 'At'} equal uploaded bytes the best is {'; '.join(told)}."


def _differences(t: Tables) -> Iterator[str]:
    known = [row for row in t.differences if row["n"] > 1]
    clear = [row for row in known if row["low"] > 0 or row["high"] < 0]
    for row in sorted(clear, key=lambda row: (row["high"] - row["low"]) / abs(row["mean"]))[:LISTED]:
        where = ", ".join(filter(None, (row["panel"], row["where"])))
        yield (
            f"{told({row['axis']: row['choice']})} instead of {row['against']} changes {words(row['metric'])} by "
            f"{row['mean']:+.3f} ± {half(row):.3f}{f' ({where})' if where else ''}, over {row['n']} pairs."
        )
    if known:
        yield (
            f"Intervals that leave out 0: {len(clear)} of {len(known)} paired differences; "
            "by chance alone one in twenty would."
        )


def _so_far(t: Tables) -> Iterator[str]:
    """While nothing is finished: the last evaluation of each series."""
    for (panel, series, measure), rows in grouped(t.curves, "panel", "series", "measure").items():
        if measure == t.metrics[str(panel)]:
            name = ": ".join(filter(None, (str(panel), str(series) if series != ALL else "")))
            last = rows[-1]
            yield (
                f"{name}{', ' if name else ''}so far: {words(str(measure))} {number(last['mean'])} "
                f"after round {last['round']}."
            )


def _bound(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        bound = run.theory.get("bound", {})
        if {"rounds", "measured_mean", "theorem"} <= bound.keys():
            beside = "; ".join(bound.get("departures", []))
            yield (
                f"{run.name}: over {bound['rounds']} rounds the mean of the squared gradient is measured as "
                f"{bound['measured_mean']:.3g}; the theorem bounds it by {bound['theorem']['total']:,.3g}"
                f"{f' (beside its assumptions: {beside})' if beside else ''}."
            )


def facts(run: Run) -> dict[str, str]:
    """Of a single run: what it trains, and once it has finished what that took."""
    setting, s = run.settings.get, run.summary
    data = setting("data.name") or setting("data.task")
    found = {
        "model": Path(str(setting("model.name", ""))).name,
        "data": f"{setting('data.task', '')} {Path(str(data)).name}",
        "method": f"{setting('federation.method', '')}, r = {setting('lora.r', '')}",
        "clients": str(setting("federation.num_clients", "")),
        "rounds": str(setting("federation.num_rounds")),
    }
    if s is not None:
        of_full = [tier["up_bytes"] / s["full_rank"]["up_bytes"] for tier in s.get("tiers", [])]
        shares = dict.fromkeys(f"{share:.1%}" for share in (min(of_full), max(of_full))) if of_full else {}
        found |= {
            "uploaded by all clients": f"{s['up_bytes'] / 1e6:,.1f} MB",
            "a client's upload, of full rank": " to ".join(shares),
            "time of all rounds": f"{sum(clock.get('seconds', 0) for clock in run.clocks):,.0f} s",
            "compilation": f"{s['compile_seconds']:.1f} s",
            "simulated time": f"{s['simulated_seconds']:,.0f} s" if s.get("simulated_seconds") else "",
        }
    memory = max((clock.get("host_mb", 0) for clock in run.clocks), default=0)
    found["most host memory"] = f"{memory:,.0f} MB" if memory else ""
    return {name: text for name, text in found.items() if text.strip(" ,=r")}


def value(row: Row) -> str:
    """A mean with half its interval and the number of repetitions.

    >>> value({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}), value({"mean": 0.5, "n": 1})
    ('0.500 ± 0.100 (n = 3)', '0.500')
    """
    return number(row["mean"]) + (f" ± {half(row):.3f} (n = {row['n']})" if row["n"] > 1 else "")


def half(row: Row) -> float:
    """Half the width of an interval."""
    return (row["high"] - row["low"]) / 2
