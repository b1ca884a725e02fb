"""A run's adapters as folders: the global one, merged or not, one client's, or all clients'."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fslora_jax import hub
from fslora_jax.adapters.files import fresh_folder
from fslora_jax.adapters.merge import write_merged
from fslora_jax.adapters.spec import adapter_config, client_config
from fslora_jax.adapters.write import write_adapter
from fslora_jax.config import Config, LoraConfig
from fslora_jax.errors import UserError
from fslora_jax.federation.client import train_clients
from fslora_jax.federation.method import is_tiered
from fslora_jax.federation.results import Loaded, check_goes_on, load_round
from fslora_jax.federation.setup import Federation
from fslora_jax.federation.start import whole_head
from fslora_jax.methods import Server, Spec
from fslora_jax.types import Adapter, Local, Pair, Trainable

CLIENTS_FILE = "clients.json"
"""The list in a folder of all clients' adapters; it marks the folder as one that an export may replace."""


def write_global(config: Config, federation: Federation, server: Server, out: Path) -> None:
    """The global adapter, with ``S = I``, as a PEFT folder; with what was merged into the base, if anything."""
    model = federation.task.model
    lora, spec, weights = accumulated(config, federation, server)
    said = adapter_config(lora, spec, model, config.model.name)
    write_adapter(out, *weights, said, naming=model.naming, label_names=federation.task.label_names)


def export_round(run_dir: Path, out: Path, round: int | None = None) -> None:
    """The global adapter after a round."""
    config, federation, server, _ = load_round(run_dir, round)
    write_global(config, federation, server, out)


def export_client(run_dir: Path, out: Path, client: int, round: int | None = None) -> None:
    """One client's adapter at its own rank k, after its local steps of the round that follows.

    Raises:
      UserError: there is no such client, or the learning rate of the round that follows is 0.
    """
    _write_clients(load_round(run_dir, round), {client: out})


def export_clients(run_dir: Path, out: Path, round: int | None = None) -> None:
    """Every client's adapter as in `export_client`, in folders ``client-0``, ``client-1`` ... and a list of them."""
    loaded = load_round(run_dir, round)
    ranks = loaded.federation.task.population.ranks.tolist()
    with fresh_folder(out, CLIENTS_FILE, "export of all clients") as fresh:
        folders = {client: f"client-{client}" for client in range(len(ranks))}
        _write_clients(loaded, {client: fresh / folders[client] for client in folders})
        listed = [{"client": c, "k": ranks[c], "folder": folder} for c, folder in folders.items()]
        (fresh / CLIENTS_FILE).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def export_merged(
    run_dir: Path, out: Path, round: int | None = None, shard_bytes: int = 4_000_000_000
) -> None:
    """The base model with the global adapter merged into it, as a folder that transformers loads."""
    config, federation, server, _ = load_round(run_dir, round)
    _, spec, weights = accumulated(config, federation, server)
    write_merged(
        out,
        hub.resolve_model(config.model.name),
        federation.task.model,
        spec,
        weights,
        label_names=federation.task.label_names,
        shard_bytes=shard_bytes,
    )


def accumulated(config: Config, federation: Federation, server: Server) -> tuple[LoraConfig, Spec, Trainable]:
    """The global adapter relative to the original base: itself, or the factors of all that was merged and of it.

    The latter have scale 1 and the largest numerical rank that any module needs.
    """
    weights = _complete(federation, federation.method.adapter(server))
    if not federation.method.traits.moves_base:
        return config.lora, federation.spec, weights
    scales, moved = federation.spec.scales(), jax.device_get(server.base_delta)
    factors = {
        m: np.linalg.svd(moved[m] + scales[m] * np.swapaxes(pair.a, 1, 2) @ pair.b, full_matrices=False)
        for m, pair in weights.adapter.items()
    }
    r = max(1, *(int((sizes > 1e-6 * sizes.max()).sum(-1).max()) for _, sizes, _ in factors.values()))
    adapter = {}
    for m, (u, sizes, vt) in factors.items():
        k, root = min(r, sizes.shape[-1]), np.sqrt(sizes)[..., None]
        pair = (np.swapaxes(u, 1, 2)[:, :k] * root[:, :k], vt[:, :k] * root[:, :k])
        adapter[m] = Pair(*(jnp.pad(x, ((0, 0), (0, r - k), (0, 0))) for x in pair))
    plain = {"r": r, "lora_alpha": float(r), "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    spec = Spec(federation.spec.targets, r, 1.0)
    return config.lora.model_copy(update=plain), spec, weights._replace(adapter=adapter)


def _write_clients(loaded: Loaded, folders: dict[int, Path]) -> None:
    config, federation, server, memories = loaded
    if federation.method.traits.moves_base:
        raise UserError(
            f"federation.method: {config.federation.method} changes the base, so a client's adapter does not fit the "
            "original one; export the global adapter, or the --merged model"
        )
    check_goes_on(loaded, "export", "take a --round before the last, or the global adapter")
    model, spec = federation.task.model, federation.spec
    said = adapter_config(config.lora, spec, model, config.model.name)
    ranks = federation.task.population.ranks if is_tiered(config, federation.method) else None
    for client, local in train_clients(config, federation, server, list(folders), memories):
        weights = Trainable(at_scale(spec, local), local.weights.head)
        write_adapter(
            folders[client],
            *_complete(federation, weights),
            client_config(said, spec, model, spec.r if ranks is None else int(ranks[client])),
            naming=model.naming,
            label_names=federation.task.label_names,
        )


def at_scale(spec: Spec, local: Local) -> Adapter:
    """A client's factors, each component at the scale ``s r/k`` of `client_config`; those of a sketch as they are."""
    adapter, full = {}, spec.ranks()
    for m, pair in local.weights.adapter.items():
        uniform = np.float32(spec.scales()[m]) * np.float32(full[m] / pair.a.shape[-2])
        gain = np.asarray(local.scale[m]) / uniform
        gain = np.where(np.isclose(gain, 1, rtol=1e-6, atol=0), np.float32(1), gain)
        adapter[m] = Pair(pair.a, pair.b * gain[..., None])
    return adapter


def _complete(federation: Federation, weights: Trainable) -> Trainable:
    """Weights on the host, with the head also where it is frozen."""
    return jax.device_get(weights._replace(head=whole_head(federation.task.base, weights)))
