"""``fslora export``: what a run has trained, for PEFT and transformers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from fslora_jax.arguments import parse
from fslora_jax.errors import UserError
from fslora_jax.federation.exports import export_client, export_clients, export_merged, export_round


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
