"""``fslora bench``: the comparison as a command, a table and a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from fslora_jax.arguments import option, parse_config, suggest
from fslora_jax.bench.compare import compare
from fslora_jax.bench.engines import ENGINES
from fslora_jax.errors import UserError
from fslora_jax.rundir import write_atomically

DEFAULT = ("tiered", "loop", "torch", "torch-padded")


def bench_command(argv: Sequence[str]) -> None:
    """Time one round of a config side by side: this engine, its variants, and what else would run it.

    Engines: tiered (this package's default), masked (all clients at rank r), unchunked (the cohort at once),
    loop (a Python loop over clients in JAX), drjax (DrJAX's map), torch (PyTorch and PEFT, one client after
    another, batches padded to their longest example) and torch-padded (padded to data.max_length). Every engine
    has a process of its own and they take turns, so that ratios hold on a machine whose speed varies;
    compilation is reported apart.
    Needs the extra: pip install 'fslora_jax[bench]'.
    """
    config, _, args = parse_config(
        "bench",
        bench_command.__doc__ or "",
        argv,
        engines=option(tuple[str, ...], DEFAULT, "Engines; ratios are to the first."),
        repeats=option(int, 3, "Timed repetitions of each engine, in turn."),
        json=option(
            Path | None,
            None,
            "Also write the whole record to this file, after each repetition anew: with ratios between all rows.",
        ),
        device=option(Literal["cpu", "gpu", "tpu"] | None, None, "Kind of device; by default JAX's choice."),
    )
    for engine in args["engines"]:
        if engine not in ENGINES:
            raise UserError(f"--engines: unknown engine {engine!r}{suggest(engine, list(ENGINES))}")
    if args["repeats"] < 1:
        raise UserError(f"--repeats: found {args['repeats']}, expected at least 1")
    if args["json"] is not None:
        args["json"].parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    records = compare(
        config,
        list(dict.fromkeys(args["engines"])),
        repeats=args["repeats"],
        device=args["device"],
        tell=lambda text: console.print(f"[dim]{text} ...[/dim]"),
    )
    record = {}
    for record in records:
        if args["json"] is not None:  # what was measured stays, whatever ends the rest
            whole = record | {"config": config.model_dump(mode="json")}
            write_atomically(args["json"], json.dumps(whole, indent=2) + "\n")
    print_table(record)


def print_table(record: dict[str, Any]) -> None:
    """Engines as rows, the first one first."""
    work, rows = record["work"], record["engines"]
    first = next(iter(rows))
    table = Table(
        title=f"one round: {work['clients']} clients, {work['examples']} examples, {work['tokens']} real tokens; "
        f"fill of our packed rows {record['fill']:.0%}",
        title_justify="left",
    )
    heads = ("seconds", "compile s", "tokens/s", "clients/s", "peak GB", "of best matmul", f"time / {first}")
    table.add_column("engine")
    for head in heads:
        table.add_column(head, justify="right")
    for engine, row in rows.items():
        table.add_row(
            engine,
            three_digits(sorted(row["seconds"])[len(row["seconds"]) // 2]),
            f"{row['compile_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['clients_per_second']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['of_best_matmul']:.0%}",
            f"{row['time_over'][first]:.2f}",
        )
    rate = record["best_matmul_flops_per_second"] / 1e9
    console = Console()
    console.width = max(console.width, 100)  # also where the output is a file
    console.print(table)
    console.print(f"best matrix product of this machine in the same minutes: {rate:,.0f} GFLOP/s")


def three_digits(seconds: float) -> str:
    """A time, short enough for a table.

    >>> three_digits(0.011748), three_digits(18.2112), three_digits(1234.5)
    ('0.0117', '18.2', '1234')
    """
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"
