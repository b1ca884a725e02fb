"""``fslora eval``: what an adapter is worth, on any data of its task."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import tyro

from fslora_jax.arguments import parse
from fslora_jax.data_config import DataConfig, TaskName
from fslora_jax.errors import UserError
from fslora_jax.federation.fairness import evaluate_clients
from fslora_jax.federation.results import evaluate_adapter, evaluate_run
from fslora_jax.rundir import CONFIG, load_run_config
from fslora_jax.settings import checked


@dataclasses.dataclass
class Evaluate:
    """Evaluate the newest global adapter of a run, or a PEFT adapter folder; prints one JSON object."""

    folder: tyro.conf.Positional[Path]
    """Run folder, or folder with adapter_config.json."""
    data: str | None = None
    """File, folder or data set; by default the held-out examples of the run."""
    task: TaskName | None = None
    """What the data is, as in `data.task` of a config; a GLUE task finds its own data. By default as in the run."""
    split: str | None = None
    """Split of a hub data set; by default the task's held-out one, or test."""
    parts: tuple[str, ...] | None = None
    """Folders below the data, each a task, such as ARC-Easy and boolq."""
    text_columns: tuple[str, ...] | None = None
    """Columns of the data with the text; by default the run's, or text."""
    label_column: str | None = None
    """Column of the data with the label; by default the run's, or label."""
    max_length: int | None = None
    """Longer texts of the data are truncated to this many tokens; by default the run's, or 128."""
    max_test_examples: int | None = None
    """At most so many examples of the data, drawn at random; by default the run's, or all."""
    generate: bool = False
    """Questions with options: judge a language model also by the answers that it writes, greedily."""
    new_tokens: int = 32
    """The most tokens of such an answer."""
    per_client: bool = False
    """A run's adapter on what each client held out (`partition.held_out`): mean, worst decile and spread, and a line
    for each client in the run's clients.jsonl."""
    personalised: bool = False
    """With --per-client, also each client's own adapter, after its local steps of the round that follows."""


OF_DATA = ("split", "parts", "text_columns", "label_column", "max_length", "max_test_examples")


def eval_command(argv: Sequence[str]) -> None:
    """Evaluates and prints."""
    args = parse(Evaluate, "fslora eval", Evaluate.__doc__ or "", argv)
    if args.new_tokens < 1:
        raise UserError(f"new_tokens: found {args.new_tokens}, expected at least 1")
    data, new_tokens = data_of(args), args.new_tokens if args.generate else 0
    if args.per_client or args.personalised:
        if not args.per_client:
            raise UserError("--personalised: given without --per-client, to which it adds; say both")
        if data is not None or args.generate:
            raise UserError("--per-client: expected a run folder, and nothing beside it but --personalised")
        metrics = evaluate_clients(args.folder, args.personalised)
    elif (args.folder / CONFIG).is_file():
        metrics = evaluate_run(args.folder, data, new_tokens)
    elif data is not None:
        metrics = evaluate_adapter(args.folder, data, new_tokens)
    else:
        raise UserError(
            f"{args.folder}: no run folder; for an adapter folder say --data FILE_OR_NAME or --task as well"
        )
    print(json.dumps(metrics))


def data_of(args: Evaluate) -> DataConfig | None:
    """The data that the arguments name, read as the run's where they do not say how; None where they name none."""
    given = {name: getattr(args, name) for name in OF_DATA if getattr(args, name) is not None}
    if args.data is None and args.task is None:
        if given:
            raise UserError(f"{min(given)}: given without data; say --data FILE_OR_NAME or --task as well")
        return None
    is_run = (args.folder / CONFIG).is_file()
    defaults = load_run_config(args.folder).data.model_dump() if is_run else {}
    place = {"name": args.data, "parts": (), "split": None, "test_split": None, "row_length": None}
    given["test_split"] = given.pop("split", None)
    task = {} if args.task is None else {"task": args.task}
    return checked(DataConfig, defaults | place | task | given, "arguments")
