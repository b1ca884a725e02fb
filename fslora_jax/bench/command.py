"""``fslora bench``: the comparison as a command, a table and a JSON file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from fslora_jax.arguments import option, parse_config, suggest
from fslora_jax.bench.compare import compare
from fslora_jax.bench.engines import ENGINES
from fslora_jax.bench.limits import OURS, check_engine, default_engines
from fslora_jax.config import Config, make_config
from fslora_jax.errors import UserError
from fslora_jax.rundir import check_writable, write_atomically

DEVICES = ("cpu", "gpu", "tpu")

SHORT = {"model.name": "--model", "data.task": "--task"}


def bench_command(argv: Sequence[str]) -> None:
    """Time one round of a config side by side: this engine, its variants, and what else would run it.

    Engines: tiered (this package's default), masked (all clients at rank r), unchunked (the cohort at once),
    chunked (in cohort_chunks, or else a client at a time), loop (a Python loop over clients in JAX), drjax (DrJAX's
    map), torch (PyTorch and PEFT, one client after another, batches padded to their longest example) and torch-padded
    (padded to data.max_length). Every engine has a process of its own and they take turns, so that ratios hold on a
    machine whose speed varies; compilation is reported apart. MFU is of the data sheet's rate, where it is known.
    Needs the extra: pip install 'fslora_jax[bench]'.
    """
    config, _, args = parse_config(
        "bench",
        bench_command.__doc__ or "",
        argv,
        short=SHORT,
        engines=option(
            tuple[str, ...],
            (),
            "Engines; ratios are to the first. By default all that are installed and can do the config.",
        ),
        repeats=option(int, 3, "Timed repetitions of each engine, in turn."),
        clients=option(
            int | None,
            None,
            "Clients of the round: federation.clients_per_round, and num_clients where that is less.",
        ),
        json=option(
            Path | None,
            None,
            "Also write the whole record to this file, after each repetition anew: with ratios between all rows.",
        ),
        device=option(str | None, None, "Kind of device: cpu, gpu or tpu; by default JAX's choice."),
    )
    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(f"[dim]{text} ...[/dim]")

    if args["clients"] is not None:
        config = with_cohort(config, args["clients"])
    if args["repeats"] < 1:
        raise UserError(f"--repeats: found {args['repeats']}, expected at least 1")
    if args["device"] not in (None, *DEVICES):
        raise UserError(f"--device: unknown kind {args['device']!r}{suggest(args['device'], DEVICES)}")
    engines = chosen(args["engines"], config, tell)
    if args["json"] is not None:
        check_writable("--json", args["json"])
    records = compare(config, engines, repeats=args["repeats"], device=args["device"], tell=tell)
    record = {}
    for record in records:
        if args["json"] is not None:  # what was measured stays, whatever ends the rest
            whole = record | {"config": config.model_dump(mode="json")}
            write_atomically(args["json"], json.dumps(whole, indent=2) + "\n")
    print_table(record)


def with_cohort(config: Config, clients: int) -> Config:
    """The config with so many clients in a round, of a population that has at least as many, and no empty chunks."""
    values, f = config.model_dump(mode="json"), config.federation
    values["federation"] |= {
        "clients_per_round": clients,
        "num_clients": max(f.num_clients, clients),
        "cohort_chunks": max(min(f.cohort_chunks, clients), 1),
    }
    return make_config(values, "--clients")


def chosen(named: Sequence[str], config: Config, tell: Callable[[str], None]) -> list[str]:
    """The engines that were ``named``, each once, or all that can do the config.

    Raises:
      UserError: one that was named is unknown, is not installed, or cannot do the config.
    """
    for engine in named:
        if engine not in ENGINES:
            raise UserError(f"--engines: unknown engine {engine!r}{suggest(engine, list(ENGINES))}")
        check_engine(engine, config)
    able = list(dict.fromkeys(named))
    for engine in () if named else default_engines(config):
        try:
            check_engine(engine, config)
        except UserError as error:
            if engine in OURS:
                raise
            tell(f"without {error}")
        else:
            able.append(engine)
    return able


def print_table(record: dict[str, Any]) -> None:
    """Engines as rows, the first one first."""
    work, rows = record["work"], record["engines"]
    first = next(iter(rows))
    table = Table(
        title=f"one round: {work['clients']} clients, {work['examples']} examples, {work['tokens']} real tokens; "
        f"fill of our packed rows {record['fill']:.0%}",
        title_justify="left",
    )
    heads = ["seconds", "compile s", "tokens/s", "clients/s", "peak GB", "of best matmul", f"time / {first}"]
    promised = any(row["mfu"] is not None for row in rows.values())
    if promised:
        heads.append("MFU")
    table.add_column("engine")
    for head in heads:
        table.add_column(head, justify="right")
    for engine, row in rows.items():
        table.add_row(
            engine,
            three_digits(median(row["seconds"])),
            f"{row['compile_seconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['clients_per_second']:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['of_best_matmul']:.0%}",
            f"{row['time_over'][first]:.2f}",
            *(["" if row["mfu"] is None else f"{row['mfu']:.0%}"] if promised else []),
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
