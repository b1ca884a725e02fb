"""What a run is worth to each of its clients: the global adapter, or its own, on examples that it held out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from fslora_jax import hub
from fslora_jax.data.examples import take
from fslora_jax.data.held_out import HeldOut, each_option, hold_out
from fslora_jax.errors import UserError
from fslora_jax.evaluate import Answers, gather, make_evaluation, measure_rows
from fslora_jax.federation.division import divide
from fslora_jax.federation.examples import load_examples, tokenise
from fslora_jax.federation.personal import score_own
from fslora_jax.federation.results import check_goes_on, load_round
from fslora_jax.federation.setup import global_model
from fslora_jax.rundir import write_atomically

CLIENTS = "clients.jsonl"


def evaluate_clients(run_dir: Path, personalised: bool = False) -> dict[str, float]:
    """How a run's newest global adapter does on each client's held-out examples: mean, worst decile and spread.

    ``clients.jsonl`` in the run folder gets a line for each client. With ``personalised`` also the adapter that each
    client holds after its local steps of the round that follows.

    Raises:
      UserError: the run's clients hold nothing out, or the learning rate of the round that follows is 0.
    """
    loaded = load_round(run_dir, None)
    config, federation, server, memories = loaded
    task, population, folder = (
        federation.task,
        federation.task.population,
        hub.resolve_model(config.model.name),
    )
    train = load_examples(config.data, config.seed, folder)[0]
    own = divide(config, train)[1]
    if not len(own.examples):
        raise UserError(
            f"partition.held_out: {config.partition.held_out:g} of each client's examples are none; train with more"
        )
    rows, owner, right = each_option(take(train, own.examples))
    clients, store = own.owners[owner], tokenise(folder, task.model, rows, config.data)
    length = config.data.row_length or config.data.max_length
    held = hold_out(store, rows, owner, right, length, config.data.packing)
    evaluation = make_evaluation(task.model.score, federation.spec)
    answers = gather(evaluation(*global_model(federation, server), held.batches), held.slots)
    records = by_client(answers, held, clients, task.metrics)
    if personalised:
        check_goes_on(loaded, "personalised", "evaluate without")
        answers = score_own(config, federation, server, memories, store, rows.labels, clients)
        for record, found in zip(records, by_client(answers, held, clients, task.metrics), strict=True):
            record |= {f"personalised/{name}": found[name] for name in found if name not in FACTS}
    for record in records:
        record["k"] = int(population.ranks[record["client"]])
        if config.partition.name == "natural":
            record["name"] = train.groups[own[record["client"]][0]]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(run_dir / CLIENTS, lines)
    return summary(records)


FACTS = ("client", "name", "k", "examples")
"""What a client's record holds beside metrics."""


def by_client(
    answers: Answers, held: HeldOut, clients: Int[np.ndarray, " rows"], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """A record for each client that has rows: its number, its examples, and what `measure_rows` finds of them."""
    records = []
    for client in np.unique(clients).tolist():
        mine = clients == client
        count = {"client": client, "examples": len(np.unique(held.owner[mine]))}
        records.append(count | measure_rows(answers, held, mine, metrics))
    return records


def summary(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over the clients, each counted once: mean, mean of the worst tenth (at least one), standard deviation.

    >>> summary([{"client": 0, "loss": 1.0}, {"client": 1, "loss": 3.0}])
    {'clients': 2, 'loss/mean': 2.0, 'loss/worst_decile': 3.0, 'loss/std': 1.0}
    """
    found: dict[str, float] = {"clients": len(records)}
    for name in {name: None for record in records for name in record if name not in FACTS}:
        values = np.sort([record[name] for record in records if name in record])
        if name.endswith("loss"):
            values = values[::-1]
        worst = values[: -(-len(values) // 10)]
        found |= {
            f"{name}/mean": values.mean(),
            f"{name}/worst_decile": worst.mean(),
            f"{name}/std": values.std(),
        }
    return {name: int(value) if name == "clients" else float(value) for name, value in found.items()}
