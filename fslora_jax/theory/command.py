"""``fslora theory``: the convergence theorem of FSLoRA beside what a run measures."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fslora_jax.arguments import parse
from fslora_jax.errors import UserError
from fslora_jax.rundir import write_atomically
from fslora_jax.theory.measure import (
    HELD_OUT,
    Sizes,
    draw_sample,
    measure_growth,
    measure_moments,
    measure_smoothness,
    open_run,
)
from fslora_jax.theory.moments import FEWEST_CLIENTS
from fslora_jax.theory.report import compared, draw, growth_records, problem, records, show

RESULT = "theory.json"
GROWTH_CLIENTS = 4
"""Clients whose local updates are repeated; of ratios dealt out in turn these are four different ones."""


@dataclasses.dataclass
class Theory:
    """Measure what FSLoRA's convergence theorem (arXiv 2501.19389, Theorem 4.4) speaks of, at a run's checkpoints.

    Variances by sketch, minibatch and client, smoothness, f_S against f and the gradient of f_S, without bias and with
    95 % intervals, beside the bound; and the growth of a local update's variance with a fixed and a redrawn sketch.
    Variances, losses and gradients are those of all clients, as are their intervals; curvature and growth those of
    the clients drawn.
    Writes theory.json and two figures into the run folder.
    """

    run: tyro.conf.Positional[Path]
    """Run folder of a `fslora train` with fslora."""
    rounds: tuple[int, ...] | None = None
    """Rounds that have a checkpoint (`keep_checkpoints` says how many stay); by default all. The start is always in."""
    draws: int = 8
    """Sketches of each client."""
    batches: int = 2
    """Minibatches under each sketch."""
    clients: int = 20
    """At most so many clients, drawn at random."""
    lanczos: int = 6
    """Hessian products for a largest eigenvalue."""
    steps: int = 10
    """Local steps over which the variance of an update is followed."""
    rate: float | None = None
    """Learning rate of these steps; by default the run's. The law is one of small steps."""


def theory_command(argv: Sequence[str]) -> None:
    """Measures, writes and prints."""
    args = parse(Theory, "fslora theory", Theory.__doc__ or "", argv)
    fewest = {"draws": HELD_OUT + 1, "batches": 2, "clients": 1, "lanczos": 1, "steps": 1}
    for name, least in fewest.items():
        if getattr(args, name) < least:
            raise UserError(f"{name}: found {getattr(args, name)}, expected at least {least}")
    sizes = Sizes(*(getattr(args, name) for name in Sizes._fields))
    if args.rate is not None and args.rate <= 0:
        raise UserError(f"rate: found {args.rate:g}, expected more than 0")
    run = open_run(args.run, args.rounds)
    population = len(run.federation.task.population.ranks)
    if args.clients < min(FEWEST_CLIENTS, population):
        raise UserError(
            f"clients: found {args.clients} of {population}, expected at least {FEWEST_CLIENTS}, which tell how far "
            "clients are apart"
        )
    sample = draw_sample(run, sizes)
    count = len(sample.keys)
    rate = args.rate or run.config.client_optimizer.learning_rate
    few = jax.tree.map(lambda x: x[:GROWTH_CLIENTS], sample)
    total = len(run.points) * (count + 2) + 2 * len(few.keys)
    with progress(total) as told:
        values = measure_moments(run, sample, told)
        values |= measure_smoothness(run, sample, sizes.lanczos, told)
        growth = measure_growth(run, few, sizes.steps, rate, told)
    p = problem(run.config, run.federation.task.population.ranks, values)
    found = {
        "clients": [int(i) for i in sample.clients.id],
        "population": population,
        "draws": sizes.draws,
        "batches": sizes.batches,
        "growth_rate": rate,
        "estimates": records(values),
        "growth": growth_records(growth),
        "bound": compared(run.config, p, values),
    }
    write_atomically(args.run / RESULT, json.dumps(found, indent=1, default=float) + "\n")
    paths = draw(args.run, p, found)
    show(found)
    print(f"written: {', '.join(map(str, (args.run / RESULT, *paths)))}")


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; every call says what happens now, and that what was said before is done."""
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task, said = bar.add_task("", total=total), False

        def told(text: str) -> None:
            nonlocal said
            bar.update(task, advance=int(said), description=text)
            said = True

        yield told
        bar.update(task, completed=total)
