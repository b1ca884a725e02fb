"""The command line: ``fslora train``, ``fslora study`` and the others of `COMMANDS`."""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from pkgutil import resolve_name

import jax

from fslora_jax import hub
from fslora_jax.backend import leave_libtpu
from fslora_jax.errors import UserError, memory_told
from fslora_jax.preemption import EXIT_CODE, Preempted
from fslora_jax.processes import LOST_CODE, Lost

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

COMMANDS = {
    "train": "fslora_jax.train_command:train_command",
    "study": "fslora_jax.study.command:study_command",
    "report": "fslora_jax.report.command:report_command",
    "theory": "fslora_jax.theory.command:theory_command",
    "describe": "fslora_jax.describe:describe_command",
    "eval": "fslora_jax.eval_command:eval_command",
    "export": "fslora_jax.export_command:export_command",
    "plan": "fslora_jax.plan.command:plan_command",
    "methods": "fslora_jax.list_methods:methods_command",
    "bench": "fslora_jax.bench.command:bench_command",
    "scale": "fslora_jax.scale.command:scale_command",
}
"""Where each command is; only the one that runs is imported, for tables and statistics alone take a second."""


RESUMABLE = ("train", "study", "scale")
"""Commands that do not begin anew what they have saved."""


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
        command = resolve_name(COMMANDS[name])
        if argv is None:
            gc.freeze()  # what is imported stays; to look through it for garbage took a sixth of a short run
        with memory_told():
            command(rest)
    except UserError as error:
        print(f"fslora: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever reads what is printed has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
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
        more = "; the same command goes on from what is saved" if name in RESUMABLE else ""
        print(f"fslora: stopped{more}", file=sys.stderr)
        sys.exit(130)
