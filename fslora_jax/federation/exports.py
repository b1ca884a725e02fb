"""A run's adapters as folders: the global one, merged or not, one client's, or all clients'."""

import json
from pathlib import Path

import jax

from fslora_jax import hub
from fslora_jax.adapters.files import fresh_folder
from fslora_jax.adapters.merge import write_merged
from fslora_jax.adapters.spec import adapter_config, client_config
from fslora_jax.adapters.write import write_adapter
from fslora_jax.config import Config
from fslora_jax.federation.client import train_clients
from fslora_jax.federation.results import load_round
from fslora_jax.federation.setup import Federation
from fslora_jax.federation.start import whole_head
from fslora_jax.methods import Server
from fslora_jax.types import Trainable

CLIENTS_FILE = "clients.json"
"""The list in a folder of all clients' adapters; it marks the folder as one that an export may replace."""


def write_global(config: Config, federation: Federation, server: Server, out: Path) -> None:
    """The global adapter, with ``S = I``, as a PEFT folder."""
    model = federation.task.model
    said = adapter_config(config.lora, federation.spec, model, config.model.name)
    weights = _complete(federation, server.weights)
    write_adapter(out, *weights, said, naming=model.naming, label_names=federation.task.label_names)


def export_round(run_dir: Path, out: Path, round: int | None = None) -> None:
    """The global adapter after a round."""
    write_global(*load_round(run_dir, round), out)


def export_client(run_dir: Path, out: Path, client: int, round: int | None = None) -> None:
    """One client's adapter at its own rank k, after its local steps of the round that follows."""
    _write_clients(*load_round(run_dir, round), {client: out})


def export_clients(run_dir: Path, out: Path, round: int | None = None) -> None:
    """Every client's adapter, each at its own rank, in folders ``client-0``, ``client-1`` ... and a list of them."""
    config, federation, server = load_round(run_dir, round)
    ranks = federation.task.population.ranks.tolist()
    with fresh_folder(out, CLIENTS_FILE, "export of all clients") as fresh:
        folders = {client: f"client-{client}" for client in range(len(ranks))}
        _write_clients(config, federation, server, {client: fresh / folders[client] for client in folders})
        listed = [{"client": c, "k": ranks[c], "folder": folder} for c, folder in folders.items()]
        (fresh / CLIENTS_FILE).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def export_merged(
    run_dir: Path, out: Path, round: int | None = None, shard_bytes: int = 4_000_000_000
) -> None:
    """The base model with the global adapter merged into it, as a folder that transformers loads."""
    config, federation, server = load_round(run_dir, round)
    write_merged(
        out,
        hub.resolve_model(config.model.name),
        federation.task.model,
        federation.spec,
        _complete(federation, server.weights),
        label_names=federation.task.label_names,
        shard_bytes=shard_bytes,
    )


def _write_clients(config: Config, federation: Federation, server: Server, folders: dict[int, Path]) -> None:
    model, spec = federation.task.model, federation.spec
    said = adapter_config(config.lora, spec, model, config.model.name)
    for client, local in train_clients(config, federation, server, list(folders)):
        k = int(federation.task.population.ranks[client])
        write_adapter(
            folders[client],
            *_complete(federation, local.weights),
            client_config(said, spec, model, k),
            naming=model.naming,
            label_names=federation.task.label_names,
        )


def _complete(federation: Federation, weights: Trainable) -> Trainable:
    """Weights on the host, with the head also where it is frozen."""
    return jax.device_get(weights._replace(head=whole_head(federation.task.base, weights)))
