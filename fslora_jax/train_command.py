"""``fslora train``: a run, from a config to an adapter."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fslora_jax.arguments import option, parse_config
from fslora_jax.display import TerminalDisplay, print_summary
from fslora_jax.errors import UserError
from fslora_jax.federation.loop import run
from fslora_jax.federation.setup import settle_devices
from fslora_jax.processes import join, leads, losing_others


def train_command(argv: Sequence[str]) -> None:
    """Train from a config file; on a run folder that exists, go on from its last checkpoint.

    Every setting of the file can be overridden, such as --federation.num-rounds 10. A run folder holds
    config.yaml, metrics.jsonl, checkpoints/, adapter/ (PEFT) and figures/.
    """
    run_dir = option(Path | None, None, "Run folder; by default a dated one under runs/.")
    distributed = option(bool, False, "One process of several: see README. They need one --run-dir.")
    config, path, args = parse_config(
        "train", train_command.__doc__ or "", argv, run_dir=run_dir, distributed=distributed
    )
    if args["distributed"]:
        if args["run_dir"] is None:
            raise UserError("--distributed: no --run-dir; expected a folder that all processes see")
        join()
    settle_devices(config)
    folder = args["run_dir"] or Path("runs") / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    with losing_others(), TerminalDisplay(Console(stderr=True, quiet=not leads())) as display:
        summary = run(config, folder, display)
    if leads():
        print_summary(summary, folder)
