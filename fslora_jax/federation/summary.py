"""What a run says of its data before it begins, and of itself when it has ended."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fslora_jax import figures
from fslora_jax.config import Config
from fslora_jax.data.partition import describe, label_counts
from fslora_jax.federation.exports import write_global
from fslora_jax.federation.meter import client_traffic, head_values
from fslora_jax.federation.setup import Federation
from fslora_jax.log import read_records
from fslora_jax.methods import Server, traffic
from fslora_jax.rundir import write_atomically, write_summary


def write_results(
    config: Config, federation: Federation, server: Server, run_dir: Path, spent: dict[str, float]
) -> None:
    """Adapter, figures, and last the summary; ``spent`` are seconds that go into it."""
    write_global(config, federation, server, run_dir / "adapter")
    records = read_records(run_dir / "metrics.jsonl")
    figures.run_figures(records, run_dir / "figures")
    write_summary(run_dir, summarise(config, federation, records, run_dir) | spent)


def told_truncated(config: Config, federation: Federation) -> str:
    """How many texts lose their end, or of a prompt its beginning; nothing where all are whole."""
    task, longest = federation.task, config.data.max_length
    store, test = task.population.store, task.test
    cut = {"training": (store.truncated, len(store.lengths)), "held-out": (test.truncated, len(test.owner))}
    told = [f"{count} of {whole} {name} texts" for name, (count, whole) in cut.items() if count]
    return (
        f"{' and '.join(told)} are longer than data.max_length = {longest} tokens and are cut" if told else ""
    )


def draw_partition(federation: Federation, run_dir: Path) -> None:
    """Who holds what, as a picture and as numbers."""
    marks, names = federation.task.marks
    counts = label_counts(marks, federation.task.population.examples, len(names))
    write_atomically(run_dir / "partition.json", json.dumps(describe(counts, names), indent=1) + "\n")
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    figures.partition_figure(counts, names, folder / "partition.png")


def summarise(config: Config, federation: Federation, records: list[dict], run_dir: Path) -> dict[str, Any]:
    """What the run found, as the last table shows it."""
    evaluations = [r for r in records if "eval/loss" in r]
    clocks = read_records(run_dir / "timings.jsonl")
    seconds, waited = ([r.get(name, 0.0) for r in clocks] for name in ("seconds", "data_wait"))
    full = traffic(federation.spec, config.lora.r, head_values(federation))
    tiers = []
    ks, counts = np.unique(federation.task.population.ranks, return_counts=True)
    for k, clients in zip(ks.tolist(), counts.tolist(), strict=True):
        bytes_of = client_traffic(federation, k)
        tiers.append({"k": k, "clients": clients, "down_bytes": bytes_of.down, "up_bytes": bytes_of.up})
    return {
        "method": config.federation.method,
        "r": config.lora.r,
        "rounds": config.federation.num_rounds,
        "before": {k: v for k, v in evaluations[0].items() if k.startswith("eval/")},
        "after": {k: v for k, v in evaluations[-1].items() if k.startswith("eval/")},
        "tiers": tiers,
        "full_rank": {"down_bytes": full.down, "up_bytes": full.up},
        "down_bytes": records[-1]["traffic/down_bytes"],
        "up_bytes": records[-1]["traffic/up_bytes"],
        **{name: value for name, value in records[-1].items() if name.startswith("privacy/")},
        "median_round_seconds": float(np.median(seconds)),
        "truncated": {
            "train": federation.task.population.store.truncated,
            "held_out": federation.task.test.truncated,
        },
        "data_wait_share": sum(waited) / (sum(waited) + sum(seconds)),
        "simulated_seconds": records[-1].get("clock/simulated_seconds"),
        "adapter": "adapter",
    }
