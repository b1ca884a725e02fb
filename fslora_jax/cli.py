"""The command line: ``fslora train``, ``fslora study`` and the others of `COMMANDS`."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro
from rich.console import Console

from fslora_jax import hub
from fslora_jax.arguments import option, parse, parse_config
from fslora_jax.backend import leave_libtpu
from fslora_jax.bench.command import bench_command
from fslora_jax.describe import describe_command
from fslora_jax.display import TerminalDisplay, print_summary
from fslora_jax.errors import UserError
from fslora_jax.eval_command import eval_command
from fslora_jax.federation.exports import export_client, export_clients, export_merged, export_round
from fslora_jax.federation.loop import run
from fslora_jax.federation.setup import settle_devices
from fslora_jax.list_methods import methods_command
from fslora_jax.plan.command import plan_command
from fslora_jax.preemption import EXIT_CODE, Preempted
from fslora_jax.processes import LOST_CODE, Lost, join, leads, losing_others
from fslora_jax.report.command import report_command
from fslora_jax.scale.command import scale_command
from fslora_jax.study.command import study_command
from fslora_jax.theory.command import theory_command

USAGE = """\
usage: fslora COMMAND ...

Federated Sketching LoRA: every client trains a random part of a shared LoRA adapter, and a whole
federated round is one compiled program.

commands:
  train CONFIG.yaml   train, or go on with a run folder that exists; any setting can be overridden
  study STUDY.yaml    a grid of runs, resumable, with tables over repetitions
  report FOLDER...    a run or a study as one page with figures, for a browser without network
  theory RUN          the convergence theorem beside what a run measures: variances, smoothness, gradients
  describe MODEL      what a model, its adapter and a cohort cost: sizes, bytes sent, memory; reads no weights
  eval FOLDER         evaluate a run folder or a PEFT adapter
  export RUN          write a PEFT adapter: the global one, one client's at its own rank, or all clients';
                      or a merged model
  plan CONFIG.yaml    what a round takes on a TPU slice, compiled without one
  methods [NAME]      all federated methods and wrappers, or the options of one; --combinations: what fits what
  bench CONFIG.yaml   time a round against other engines, a Python loop and PyTorch among them
  scale CURVE CONFIG  how time and memory grow with cohort, rank, length, devices or model

`fslora COMMAND --help` tells more.
"""


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


@dataclasses.dataclass
class Export:
    """Write a run's global adapter as a PEFT folder; or one client's, or all; or a merged model."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    out: Path
    """Folder to write."""
    client: int | None = None
    """This client's adapter: its sketch of the last state after its local steps, at its own rank."""
    all_clients: bool = False
    """Every client's adapter, each in a folder of its own under --out."""
    merged: bool = False
    """The whole base model with the global adapter merged into it, for transformers alone."""
    max_shard_gb: float = 4.0
    """Gigabytes of a merged model's largest weight file."""
    round: int | None = None
    """A round that has a checkpoint; by default the newest."""


def export_command(argv: Sequence[str]) -> None:
    """Writes an adapter folder."""
    args = parse(Export, "fslora export", Export.__doc__ or "", argv)
    chosen = [
        name for name in ("client", "all_clients", "merged") if getattr(args, name) not in (None, False)
    ]
    if len(chosen) > 1:
        raise UserError(
            f"export: found {' and '.join(chosen)}; expected one of them, or none for the global adapter"
        )
    if args.max_shard_gb <= 0:
        raise UserError(f"max_shard_gb: found {args.max_shard_gb:g}, expected more than 0")
    if args.client is not None:
        export_client(args.run, args.out, args.client, args.round)
    elif args.all_clients:
        export_clients(args.run, args.out, args.round)
    elif args.merged:
        export_merged(args.run, args.out, args.round, int(args.max_shard_gb * 1e9))
    else:
        export_round(args.run, args.out, args.round)
    print(
        f"{'model' if args.merged else 'PEFT adapters' if args.all_clients else 'PEFT adapter'}: {args.out}"
    )


COMMANDS = {
    "train": train_command,
    "study": study_command,
    "report": report_command,
    "theory": theory_command,
    "describe": describe_command,
    "eval": eval_command,
    "export": export_command,
    "plan": plan_command,
    "methods": methods_command,
    "bench": bench_command,
    "scale": scale_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line and exit code 2."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return
    leave_libtpu()
    jax.config.update("jax_compilation_cache_dir", str(hub.default_cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
        COMMANDS[name](rest)
    except UserError as error:
        print(f"fslora: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"fslora: error: {error.filename or 'files'}: {os.strerror(error.errno or 0)}", file=sys.stderr)
        sys.exit(2)
    except Preempted as stopped:
        print(f"fslora: {stopped}; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except Lost as lost:
        print(f"fslora: error: {lost}", file=sys.stderr, flush=True)
        os._exit(LOST_CODE)  # a usual exit would wait for the process that is not there
    except KeyboardInterrupt:
        print("fslora: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
