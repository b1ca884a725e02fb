"""Means and paired differences over repetitions, with 95 % intervals (Student's t), of rows that are plain dicts."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fslora_jax.report.names import told
from fslora_jax.study.table import interval

Row = dict[str, Any]


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Hashable, ...], list[Row]]:
    """Rows by their values of some columns, in order of appearance.

    >>> {key: len(rows) for key, rows in grouped([{"a": 1}, {"a": 2}, {"a": 1}], "a").items()}
    {(1,): 2, (2,): 1}
    """
    groups: dict[tuple[Hashable, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def estimate(values: Sequence[float]) -> Row:
    """Mean of ``n`` values with ``sd`` and the ends of its 95 % interval; of one value these are NaN."""
    mean, deviation, half = interval(values)
    return {"n": len(values), "mean": mean, "sd": deviation, "low": mean - half, "high": mean + half}


def means(finals: Sequence[Row], axes: Sequence[str]) -> list[Row]:
    """A row for each series of each panel: the main metric over its repetitions, and mean costs."""
    return [
        {name: rows[0][name] for name in ("panel", "series", *axes, "metric")}
        | estimate([row["value"] for row in rows])
        | {name: sum(row[name] for row in rows) / len(rows) for name in ("start", "up_MB", "seconds")}
        for panel in grouped(finals, "panel").values()
        for rows in grouped(panel, "series").values()
    ]


def differences(finals: Sequence[Row], axes: Sequence[str], compared: Sequence[str]) -> list[Row]:
    """Each choice of a compared axis against its first, all else equal: paired over repetitions, with a 95 % interval.

    Pairs have the same repetition, so what a seed does to both is no part of the interval (Student's t of the
    differences). One pair has no interval.
    """
    found = []
    for axis in compared:
        others = [name for name in axes if name != axis]
        order = list(dict.fromkeys(row[axis] for row in finals if row.get(axis)))
        for rows in grouped(finals, "panel", *others).values():
            by_choice = {
                choice: {r["repetition"]: r["value"] for r in rows if r[axis] == choice} for choice in order
            }
            first, *rest = [choice for choice in order if by_choice[choice]] or [""]
            for choice in rest:
                both = [name for name in by_choice[choice] if name in by_choice[first]]
                if both:
                    found.append(
                        {"panel": rows[0]["panel"], "axis": axis, "choice": choice, "against": first}
                        | {
                            "where": told({name: rows[0][name] for name in others}),
                            "metric": rows[0]["metric"],
                        }
                        | estimate([by_choice[choice][name] - by_choice[first][name] for name in both])
                    )
    return found


def at_equal_bytes(
    finals: Sequence[Row],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    axes: Sequence[str],
    compare: str,
) -> list[Row]:
    """Finals with what each run had reached when it had uploaded what the cheapest choice of ``compare`` does in all.

    ``curves`` are MB uploaded and the main metric at a run's evaluations; between two of them the metric is
    interpolated.
    """
    rows = []
    for group in grouped(finals, "panel", *(axis for axis in axes if axis != compare)).values():
        budget = min(row["up_MB"] for row in group)
        rows += [
            row | {"up_MB": budget, "value": float(np.interp(budget, *curves[row["run"]]))} for row in group
        ]
    return rows
