"""What a person sees in the terminal: stages, a progress bar, the table at the end."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fslora_jax.metrics import headline

MB = 1e6


class TerminalDisplay:
    """Stages as lines, rounds as one progress bar on stderr."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._known = ""
        self._progress = Progress(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar = self._progress.add_task("rounds", total=None, values="", visible=False)

    def __enter__(self) -> "TerminalDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def stage(self, text: str) -> None:
        """One line for what happens now."""
        self._console.print(f"[dim]{text} ...[/dim]")

    def round(self, done: int, total: int, values: dict[str, float]) -> None:
        """Moves the bar on; loss, the last known main metric, traffic so far, speed."""
        self._progress.start()  # not before, or an error of the start would come with an empty bar
        metric = headline([values])
        if metric in values:
            self._known = f"{metric.removeprefix('eval/')} {values[metric]:.3f}  "
        sent = (values["traffic/up_bytes"] + values["traffic/down_bytes"]) / MB
        loss = f"loss {values['train/loss']:.3f}" if "train/loss" in values else "no client reported"
        text = f"{loss}  {self._known}{sent:.1f} MB  {values['clients_per_second']:.1f} clients/s"
        self._progress.update(self._bar, completed=done, total=total, values=text, visible=True)


def print_summary(summary: dict[str, Any], run_dir: Path) -> None:
    """Metrics before and after, bytes of each tier against full-rank federated LoRA, seconds, where the adapter is."""
    console = Console()
    before, after = summary["before"], summary["after"]
    results = Table(
        title=f"{summary['method']}, rank {summary['r']}, {summary['rounds']} rounds", title_justify="left"
    )
    results.add_column("held-out examples")
    for name in ("before", "after"):
        results.add_column(name, justify="right")
    for metric, value in after.items():
        earlier = f"{before[metric]:.4f}" if metric in before else ""
        results.add_row(metric.removeprefix("eval/"), earlier, f"{value:.4f}")
    console.print(results)

    full = summary["full_rank"]
    bytes_table = Table(title="MB of one client in one round", title_justify="left")
    for name in ("k", "clients", "down", "up", f"of rank {summary['r']} up"):
        bytes_table.add_column(name, justify="right")
    for tier in summary["tiers"]:
        bytes_table.add_row(
            str(tier["k"]),
            str(tier["clients"]),
            f"{tier['down_bytes'] / MB:.3f}",
            f"{tier['up_bytes'] / MB:.3f}",
            f"{tier['up_bytes'] / full['up_bytes']:.1%}",
        )
    full_name = f"{summary['r']} (federated LoRA)"
    bytes_table.add_row(
        full_name, "", f"{full['down_bytes'] / MB:.3f}", f"{full['up_bytes'] / MB:.3f}", "100.0%"
    )
    console.print(bytes_table)
    console.print(
        f"sent in all: {summary['up_bytes'] / MB:.1f} MB up, {summary['down_bytes'] / MB:.1f} MB down\n"
        f"loading {summary.get('load_seconds', 0):.1f} s, compilation {summary['compile_seconds']:.1f} s\n"
        f"a round {summary['median_round_seconds']:.2f} s (median), "
        f"of which {summary.get('data_wait_share', 0):.1%} waiting for data"
    )
    if seconds := summary.get("simulated_seconds"):
        console.print(f"on the clients' simulated devices: {seconds:.1f} s")
    console.print(f"run folder: {run_dir}\nPEFT adapter: {run_dir / summary['adapter']}", soft_wrap=True)
