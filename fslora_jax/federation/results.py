"""What comes after training: evaluate a run or an adapter folder, export a run's adapters."""

from collections.abc import Sequence
from pathlib import Path

import jax

from fslora_jax import hub
from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config, make_config
from fslora_jax.errors import UserError
from fslora_jax.evaluate import make_evaluation
from fslora_jax.export import write_adapter
from fslora_jax.federation.client import train_client
from fslora_jax.federation.setup import Federation, initial_server, set_up
from fslora_jax.methods import Server
from fslora_jax.rundir import load_run_config


def load_round(run_dir: Path, round: int | None) -> tuple[Config, Federation, Server]:
    """A run as it was after a round, by default the newest that has a checkpoint.

    Raises:
      UserError: no run folder, or no checkpoint of that round.
    """
    config = load_run_config(run_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
    saved = checkpoints.rounds()
    wanted = saved[-1] if round is None and saved else round
    if wanted not in saved:
        raise UserError(f"{run_dir}: no checkpoint of round {wanted}; there are {saved or 'none yet'}")
    federation = set_up(config)
    server = checkpoints.restore(wanted, initial_server(config, federation))
    checkpoints.close()
    return config, federation, server


def export_round(run_dir: Path, out: Path, round: int | None = None) -> None:
    """The global adapter after a round, with ``S = I``."""
    config, federation, server = load_round(run_dir, round)
    write_global(config, federation, server, out)


def write_global(config: Config, federation: Federation, server: Server, out: Path) -> None:
    """The global adapter as a PEFT folder."""
    weights = jax.device_get(server.weights)
    write_adapter(
        out,
        weights.adapter,
        weights.head,
        naming=federation.task.model.naming,
        base_model=config.model.name,
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        use_rslora=config.lora.use_rslora,
        target_modules=config.lora.target_modules,
        label_names=federation.task.label_names,
    )


def export_client(run_dir: Path, out: Path, client: int, round: int | None = None) -> None:
    """One client's adapter at its own rank k, after its local steps of the round that follows.

    It trained at scale ``s r / k``; PEFT's plain scale is ``alpha / k``, so alpha is ``s r``.
    """
    config, federation, server = load_round(run_dir, round)
    local = jax.device_get(train_client(config, federation, server, client))
    write_adapter(
        out,
        local.weights.adapter,
        local.weights.head,
        naming=federation.task.model.naming,
        base_model=config.model.name,
        r=int(federation.task.population.ranks[client]),
        lora_alpha=federation.spec.scale * federation.spec.r,
        use_rslora=False,
        target_modules=config.lora.target_modules,
        label_names=federation.task.label_names,
    )
