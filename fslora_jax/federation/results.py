"""What comes after training: open a run again, evaluate it or an adapter folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fslora_jax import hub
from fslora_jax.adapters.read import check_fits, read_adapter
from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config, DataConfig, MeshConfig
from fslora_jax.data.records import listing
from fslora_jax.data.tasks import TASKS
from fslora_jax.errors import UserError
from fslora_jax.evaluate import make_evaluation, measure
from fslora_jax.federation.examples import find_test, load_examples, model_task, outputs, tokenise_held_out
from fslora_jax.federation.memories import Memories
from fslora_jax.federation.setup import Federation, global_model, initial_server, open_memories, set_up
from fslora_jax.federation.written import measure_written
from fslora_jax.methods import Server, whole
from fslora_jax.models import load_model
from fslora_jax.rundir import CHECKPOINTS, load_run_config, own_start
from fslora_jax.types import Trainable

MODEL_OF: dict[str, dict[str, Any]] = {
    "SEQ_CLS": {"pooling": "native"},
    "TOKEN_CLS": {"pooling": "mean"},
    "CAUSAL_LM": {"task": "causal"},
}
"""PEFT's task type -> the options of the model that an export of this package stores under it."""


class Loaded(NamedTuple):
    """A run as it was after a round; ``memories`` is None where clients remember nothing."""

    config: Config
    federation: Federation
    server: Server
    memories: Memories | None


def load_round(run_dir: Path, round: int | None) -> Loaded:
    """A run as it was after a round, by default the newest that has a checkpoint.

    Raises:
      UserError: no run folder, or no checkpoint of that round.
    """
    config = own_start(run_dir, load_run_config(run_dir))
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    saved = checkpoints.rounds()
    if not saved:
        raise UserError(f"{run_dir}: no checkpoint yet; the first is after round {config.checkpoint_every}")
    if round is not None and round not in saved:
        raise UserError(f"{run_dir}: no checkpoint of round {round}; there are {saved}")
    federation = set_up(config.model_copy(update={"mesh": MeshConfig()}))  # on the devices that are here
    first = initial_server(config, federation)
    wanted, server = restored(checkpoints, first, round)
    memories = open_memories(config, federation, first, checkpoints.files(wanted), saved=True)
    checkpoints.close()
    return Loaded(config, federation, server, memories)


def restored(checkpoints: Checkpoints, first: Server, round: int | None) -> tuple[int, Server]:
    """The server after a round, or after the newest, which may be gone for a newer one while the run trains on.

    Raises:
      UserError: the checkpoint is damaged or of another configuration.
    """
    wanted = checkpoints.newest() if round is None else round
    assert wanted is not None
    try:
        return wanted, checkpoints.restore(wanted, first)
    except UserError:
        if round is not None or checkpoints.newest() == wanted:
            raise
        return restored(checkpoints, first, None)


def check_goes_on(run: Loaded, asked: str, instead: str) -> None:
    """Refuses what needs a round after the last one where the learning rate has come to 0, as no client would train.

    Raises:
      UserError: it has; ``asked`` says what for, ``instead`` what to do.
    """
    config, federation, server, _ = run
    if not np.any(federation.optimizer.schedule(int(server.round) * federation.feed.steps.local_steps)):
        raise UserError(
            f"{asked}: client_optimizer.schedule {config.client_optimizer.schedule} has come to a rate of 0 "
            f"after the last round, so no client would train; {instead}, or train with schedule: constant"
        )


def evaluate_run(run_dir: Path, data: DataConfig | None = None, new_tokens: int = 0) -> dict[str, float]:
    """Metrics of a run's newest global adapter, on its held-out examples or on others.

    With ``new_tokens`` also of the texts of at most so many tokens that it writes.
    """
    config, federation, server, _ = load_round(run_dir, None)
    task, folder = federation.task, hub.resolve_model(config.model.name)
    test, metrics, examples = task.test, task.metrics, None
    if data is not None:
        check_task(data, model_task(config.data))
        check_labels(data, task.label_names)
        metrics = TASKS[data.task].metrics
        data = data.model_copy(update={"label_names": task.label_names or None})
        examples = find_test(data, config.seed, folder)
        test = tokenise_held_out(folder, task.model, examples, data)
    base, weights = global_model(federation, server)
    score = make_evaluation(task.model.score, federation.spec)(base, weights, test.batches)
    values = measure(score, test, metrics)
    if new_tokens:
        examples = examples or load_examples(config.data, config.seed, folder)[1]
        held = whole(federation.spec, weights)
        values |= measure_written(folder, task.model, base, held, examples, data or config.data, new_tokens)
    return values


def check_task(data: DataConfig, model: str) -> None:
    """Refuses data for another kind of model, "sequence" or "causal"."""
    if model_task(data) != model:
        raise UserError(
            f"data.task is {data.task}, for a {model_task(data)} model, but this is a {model} one; say --task"
        )


def check_labels(data: DataConfig, names: Sequence[str]) -> None:
    """Refuses a task whose own labels are not those that the head tells apart, in its order.

    Raises:
      UserError: they are others; a head whose labels are but numbers may be for any.
    """
    own = TASKS[data.task].label_names
    if own and names and tuple(names) != own and not all(name.isdigit() for name in names):
        raise UserError(
            f"data.task: {data.task} has the labels {listing(own)}, but this head was trained on {listing(names)}; "
            "name data with those, under --task classification if need be"
        )


def evaluate_adapter(folder: Path, data: DataConfig, new_tokens: int = 0) -> dict[str, float]:
    """Metrics of a PEFT adapter folder on labelled texts; ``new_tokens`` as in `evaluate_run`."""
    saved = read_adapter(folder)
    check_task(data, MODEL_OF[saved.config.task_type].get("task", "sequence"))
    check_labels(data, saved.label_names)
    base_folder = hub.resolve_model(saved.config.base_model_name_or_path)
    labelled = data.model_copy(update={"label_names": saved.label_names or data.label_names})
    test = find_test(labelled, 0, base_folder)
    model, base = load_model(
        base_folder,
        num_labels=outputs(data, test),
        dtype="float32",
        **MODEL_OF[saved.config.task_type],
    )
    check_fits(saved, model)
    held, weights = tokenise_held_out(base_folder, model, test, data), Trainable(saved.adapter, saved.head)
    score = make_evaluation(model.score, saved.spec)(base, weights, held.batches)
    values = measure(score, held, TASKS[data.task].metrics)
    if new_tokens:
        mine = whole(saved.spec, weights)
        values |= measure_written(base_folder, model, base, mine, test, data, new_tokens)
    return values
