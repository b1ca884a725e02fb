"""``fslora scale``: a curve point by point, with a table, a file of all numbers, and figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from fslora_jax.arguments import option, parse_config, suggest
from fslora_jax.bench.compare import machine
from fslora_jax.errors import UserError, of_other_version
from fslora_jax.figures import lines_figure
from fslora_jax.rundir import read_mapping, write_atomically
from fslora_jax.scale.curves import CURVES, Curve
from fslora_jax.scale.measure import measure

COLUMNS = {
    "seconds": 1,
    "feed_seconds": 1,
    "compile_seconds": 1,
    "peak_bytes": 1e6,
    "arguments": 1e6,
    "temporaries": 1e6,
    "exchanged": 1e6,
    "flops": 1e9,
}
"""Columns of the terminal's table, and what they are divided by."""


def scale_command(argv: Sequence[str]) -> None:
    """Measure how a round grows with one thing: fslora scale CURVE CONFIG.yaml --out FOLDER.

    Curves: cohort (so many clients at a time, more and more of them), rank (k, in the tiered and the masked layout),
    length (of the texts), devices (weak and strong, virtual CPU devices, also in two processes: what is exchanged, not
    speed), model (compiled from abstract arrays, nothing is run). Every point is the real round, in a process of its
    own, on made texts and random weights: of the model only config.json is read. Points that are in the
    folder are not measured again; --out gets a CSV, a JSON file with machine and config, and figures.
    """
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    if name not in CURVES and not {"-h", "--help"} & set(argv):
        hint = suggest(name, list(CURVES)) if name else f"; expected one of {', '.join(CURVES)}"
        raise UserError(f"scale: {f'unknown curve {name!r}' if name else 'no curve'}{hint}")
    config, _, args = parse_config(
        f"scale {name or 'CURVE'}",
        scale_command.__doc__ or "",
        argv[1:] if name else argv,
        out=option(Path, Path("runs/scale"), "Folder for CURVE.csv, CURVE.json and figures."),
        values=option(tuple[int, ...], (), "Points on the horizontal axis; by default the curve's own."),
        repeats=option(
            int, 3, "Timed rounds of each point at least, after one that is not counted; more if short."
        ),
    )
    if args["repeats"] < 1 or any(value < 1 for value in args["values"]):
        raise UserError(f"--repeats, --values: found {args['repeats']}, {args['values']}; expected 1 or more")
    curve, file, console = CURVES[name], args["out"] / f"{name}.json", Console(stderr=True)
    record = begun(file, {"curve": name, "config": config.model_dump(mode="json"), "machine": machine()})
    args["out"].mkdir(parents=True, exist_ok=True)
    points = [point for value in args["values"] or curve.values for point in curve.points(config, value)]
    done = {(found["line"], found["x"]) for found in record["points"]}
    for point in points:
        if (point.line, point.x) in done:
            continue
        console.print(f"[dim]{point.name} ...[/dim]")
        record["points"].append(measure(point, args["repeats"]))
        write_atomically(file, json.dumps(record, indent=1) + "\n")
    found = pd.DataFrame(record["points"]).sort_values(["line", curve.across])
    found.drop(columns=[c for c in found if c.startswith("all_")]).to_csv(
        file.with_suffix(".csv"), index=False
    )
    draw(found, curve, name, args["out"])
    show(found, curve)


def begun(file: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The record of a curve that was begun, or a ``fresh`` one.

    Raises:
      UserError: it is of another config.
    """
    if not file.exists():
        return fresh | {"points": []}
    old = read_mapping(file)
    for part in ("config", "points"):
        if part not in old:
            raise of_other_version(file, part)
    if old["config"] != fresh["config"]:
        raise UserError(f"{file}: holds points of another config; choose another --out, or delete the file")
    return old


def draw(found: pd.DataFrame, curve: Curve, name: str, folder: Path) -> None:
    """A figure for each column that the curve draws, with its lines."""
    for column, label in curve.drawn.items():
        lines = {
            str(line): (mine[curve.across].tolist(), mine[column].tolist())
            for line, mine in found.groupby("line", sort=False)
        }
        lines_figure(lines, curve.x, label, folder / f"{name}_{column}.png")


def show(found: pd.DataFrame, curve: Curve) -> None:
    """The table, and how flat each line is that shall be."""
    table = Table(title=f"by {curve.x}; bytes in MB, operations in GFLOP", title_justify="left")
    kept = {column: unit for column, unit in COLUMNS.items() if column in found}
    table.add_column("line", no_wrap=True)
    for head in (curve.x, "clients", *kept):
        table.add_column(head.replace("_", " "), justify="right")
    for _, row in found.iterrows():
        numbers = (f"{row[column] / unit:,.4g}" for column, unit in kept.items())
        table.add_row(str(row["line"]), f"{row[curve.across]:,}", f"{row['clients']:,}", *numbers)
    console = Console()
    console.width = max(console.width, 150)  # also where the output is a file
    console.print(table)
    for line, mine in found.groupby("line", sort=False):
        for column in curve.flat:
            ratio = mine[column].max() / mine[column].min()
            console.print(f"{line}: {column.replace('_', ' ')}, largest over smallest {ratio:.2f}")
