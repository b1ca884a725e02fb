"""``fslora methods``: what can be run, what each method is, and the options of one."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import optax
import tyro
from rich.console import Console
from rich.table import Table

from fslora_jax.arguments import parse
from fslora_jax.errors import UserError
from fslora_jax.methods import METHODS, WRAPPERS, Method, Spec
from fslora_jax.methods.catalogue import Entry
from fslora_jax.methods.wrappers.rules import refusal
from fslora_jax.settings import options_of, suggest

TRAITS = {
    "linear": "its server needs only a sum, so noise or a channel may sit on it",
    "moves_base": "merges into the base: export gives the accumulated adapter, or the merged model",
    "remembers": "clients keep something between rounds",
    "full_rank": "every client trains all r components: federation.sketching_ratios [1.0]",
    "holds_all": "every client holds all r components and trains k",
    "own_step": "the server's step is its own: no server_optimizer",
    "sends_values": "clients send factors, not what changed in them",
    "sends_indices": "clients also send which components they drew",
    "sends_numbers": "clients send a number beside their factors",
    "personal": "parts of the adapter stay with each client",
}
"""What each field of `Traits` means for a user."""


@dataclasses.dataclass
class Methods:
    """List all federated methods and wrappers, or tell one's options."""

    name: tyro.conf.Positional[str | None] = None
    """A method or wrapper."""
    combinations: bool = False
    """Which wrapper goes around which method, and why not where it does not."""


def methods_command(argv: Sequence[str]) -> None:
    """Lists or tells."""
    args = parse(Methods, "fslora methods", Methods.__doc__ or "", argv)
    console = Console()
    if args.combinations:
        print_combinations(console)
        return
    if args.name is None:
        console.print(table("federation.method", METHODS))
        console.print(table("federation.wrappers", WRAPPERS))
        return
    known = METHODS | WRAPPERS
    if args.name not in known:
        raise UserError(f"methods: unknown {args.name!r}{suggest(args.name, list(known))}")
    tell(console, args.name, known[args.name])


def table(title: str, entries: dict[str, Entry]) -> Table:
    """A line each."""
    shown = Table(
        "name", "what it does", "arXiv", "what travels up", "exact in", title=title, title_justify="left"
    )
    for name, entry in entries.items():
        shown.add_row(name, entry.line, entry.paper, entry.travels, entry.exact)
    return shown


def tell(console: Console, name: str, entry: Entry) -> None:
    """What a method is, its options with their defaults, and what rules its use."""
    console.print(f"{name}: {entry.line} (arXiv {entry.paper})\n", style="bold")
    console.print(inspect.cleandoc(entry.make.__doc__ or ""), markup=False)
    console.print()
    for option, field in options_of(entry.make).model_fields.items():
        console.print(f"  {option}: {default_of(field)}", markup=False)
    if name in METHODS:
        traits = method_of(entry).traits
        for trait, meaning in TRAITS.items():
            if getattr(traits, trait):
                console.print(f"  - {meaning}", markup=False)


def default_of(field: Any) -> str:
    """A default as a config has it."""
    return str(list(field.default) if isinstance(field.default, tuple) else field.default)


def method_of(entry: Entry) -> Method:
    """A method with its default options, around no model; for what it declares."""
    return entry.make(Spec({}, 1, 1.0), optax.sgd(1.0))


def combinations() -> dict[str, dict[str, str | None]]:
    """Method -> wrapper -> why the two do not go together, with default options; None where they do."""
    methods = {name: method_of(entry) for name, entry in METHODS.items()}
    return {name: {w: refusal(w, method) for w in WRAPPERS} for name, method in methods.items()}


def print_combinations(console: Console) -> None:
    """A table of marks, and the reasons below it."""
    found = combinations()
    reasons = sorted({reason for row in found.values() for reason in row.values() if reason})
    marks = {None: "yes"} | {reason: f"no ({n})" for n, reason in enumerate(reasons, 1)}
    shown = Table(title="what goes around what", title_justify="left")
    shown.add_column("method", no_wrap=True)
    for wrapper in WRAPPERS:
        shown.add_column(wrapper)
    for name, row in found.items():
        shown.add_row(name, *(marks[reason] for reason in row.values()))
    console.print(shown)
    for reason in reasons:
        console.print(f"{marks[reason]}: {reason}", markup=False)
