"""Run folders and studies that nobody trained: the files of a run, with numbers that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

FIRST, SECOND = np.array([0.60, 0.71, 0.66]), np.array([0.64, 0.77, 0.68])
TIERS = [
    {"k": 2, "clients": 3, "down_bytes": 20, "up_bytes": 25},
    {"k": 4, "clients": 2, "down_bytes": 40, "up_bytes": 50},
]


def lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(
    folder: Path,
    accuracies: Sequence[float] = (0.5, 0.6, 0.7),
    rounds: int | None = None,
    settings: Mapping[str, Any] | None = None,
    megabytes: float = 1.0,
    **more: Mapping[int, float],
) -> Path:
    """A run that was evaluated after every round; with ``rounds`` beyond them it is not finished.

    ``more`` are other measures by round. Every round uploads ``megabytes``.
    """
    folder.mkdir(parents=True)
    done = len(accuracies) - 1
    config = {
        "federation": {"num_rounds": rounds or done, "num_clients": 5},
        "data": {"task": "text", "name": "x.csv"},
    }
    config["partition"] = {"name": "dirichlet", "dirichlet_alpha": 1.0}
    for name, value in (settings or {}).items():
        section, _, leaf = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[leaf] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    records = []
    for t, accuracy in enumerate(accuracies):
        record = {"round": t, "eval/loss": 1 - accuracy, "eval/accuracy": accuracy}
        record |= (
            {
                "train/loss": 1.0 / t,
                "traffic/up_bytes": int(t * megabytes * 1e6),
                "traffic/down_bytes": 10 * t,
            }
            if t
            else {}
        )
        records.append(record | {name: values[t] for name, values in more.items() if t in values})
    lines(folder / "metrics.jsonl", records)
    clocks = [
        {"round": t, "seconds": 2.0, "tokens_per_second": 50.0 + t, "host_mb": 90.0}
        for t in range(1, done + 1)
    ]
    lines(folder / "timings.jsonl", clocks)
    dealt = [{"bad": 3 * c, "good": 7} for c in range(5)]
    (folder / "partition.json").write_text(json.dumps({"clients": dealt}), encoding="utf-8")
    made = {"code": "abc", "python": "3.11", "versions": {"jax": "0.10"}}
    (folder / "made_by.json").write_text(json.dumps(made), encoding="utf-8")
    if rounds is None:
        ends = {"before": records[0], "after": records[-1]}
        summary = {
            name: {k: v for k, v in end.items() if k.startswith("eval/")} for name, end in ends.items()
        }
        summary |= {
            "rounds": done,
            "compile_seconds": 1.5,
            "median_round_seconds": 2.0,
            "tiers": TIERS,
            "full_rank": {"up_bytes": 100},
        }
        summary |= {"up_bytes": records[-1]["traffic/up_bytes"], "down_bytes": 10 * done}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def make_plan(out: Path, points: Sequence[Mapping[str, str]], **study: Any) -> Path:
    """A study's plan, before any of its points."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"study": {"question": "", "repeat": "seed", "compare": None} | study, "points": list(points)}
    (out / "study.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def make_study(out: Path, finals: Mapping[tuple[str, str, str], float], **study: Any) -> Path:
    """A finished study: final accuracies by grid, ratio and seed."""
    points = []
    for (grid, ratio, seed), accuracy in finals.items():
        name = f"{grid}/{ratio}_{seed}"
        points.append({"name": name, "grid": grid, "federation.ratio": ratio, "seed": seed})
        own = {"federation.ratio": float(ratio), "seed": int(seed)}
        make_run(out / name, (0.5, (0.5 + accuracy) / 2, accuracy), settings=own, megabytes=float(ratio))
    return make_plan(out, points, **study)


def two_ratios(out: Path) -> Path:
    """A study of two ratios in one grid with three seeds, `FIRST` and `SECOND`, and a second grid with one run."""
    finals = {("main", "0.5", str(s)): float(FIRST[s]) for s in range(3)}
    finals |= {("main", "1.0", str(s)): float(SECOND[s]) for s in range(3)}
    return make_study(out, finals | {("alone", "1.0", "0"): 0.55}, question="Which ratio?")
