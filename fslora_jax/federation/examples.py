"""From a data config to examples and tokens: where they lie, what is held out, how a task reads them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from fslora_jax import hub
from fslora_jax.config import DataConfig
from fslora_jax.data.chat import chat_prompts
from fslora_jax.data.examples import Columns, Examples, join, labelled, measured, prompted, split_examples
from fslora_jax.data.held_out import HeldOut, each_option, hold_out
from fslora_jax.data.records import Table, read_file, read_hub
from fslora_jax.data.stored import stored
from fslora_jax.data.tasks import TASKS, TaskType
from fslora_jax.data.tokens import TokenStore, encode, encode_prompts, end_token, load_tokenizer
from fslora_jax.errors import UserError
from fslora_jax.models import Model
from fslora_jax.random import Purpose, host_rng


class Source(NamedTuple):
    """A file (``path``), or a split of a hub data set (``name``); ``original`` says that the columns are the files'."""

    path: Path | None
    name: str
    split: str
    original: bool


def load_examples(data: DataConfig, seed: int, model: Path) -> tuple[Examples, Examples]:
    """Training and held-out examples with the same labels; ``model`` is the model's folder, for its chat template."""
    train = find_examples(data, model)
    if data.validation:
        return split_examples(
            train, max(1, round(data.validation * len(train.labels))), host_rng(seed, Purpose.VALIDATION)
        )
    if data.test_name is None and not has_held_out(data):
        return split_examples(train, data.test_examples, host_rng(seed, Purpose.SPLIT))
    names = data.label_names or train.label_names or None
    where = data.model_copy(update={"name": data.test_name or data.name, "label_names": names})
    return train, find_test(where, seed, model)


def find_test(data: DataConfig, seed: int, model: Path) -> Examples:
    """The held-out examples of ``data``, at most ``max_test_examples``."""
    test = find_examples(data, model, held_out=True)
    if data.max_test_examples and data.max_test_examples < len(test.labels):
        test = split_examples(test, data.max_test_examples, host_rng(seed, Purpose.SPLIT))[1]
    return test


def find_examples(data: DataConfig, model: Path, *, held_out: bool = False) -> Examples:
    """The examples of ``data``, to train on or held out: of a local file or folder, the hub, or a packaged copy."""
    name = place_of(data)
    if not data.parts:
        return read_source(data, find_source(data, name, held_out), model, held_out)
    parts = {
        part: read_source(data, find_source(data, f"{name}/{part}", held_out), model, held_out)
        for part in data.parts
    }
    return join(parts)


def place_of(data: DataConfig) -> str:
    """The ``name`` of the data, or else its task's home."""
    home = TASKS[data.task].home
    if data.name is None and home is None:
        raise UserError("data.name: missing; expected a file, a folder or a Hugging Face data set id")
    return data.name or (home.hub if home else "")


def has_held_out(data: DataConfig) -> bool:
    """Whether the place of the training data has held-out examples as well."""
    task, folder = TASKS[data.task], Path(place_of(data)).expanduser()
    if folder.is_dir():
        return task.files is not None
    return data.test_split is not None or (task.home is not None and not folder.is_file())


def find_source(data: DataConfig, name: str, held_out: bool) -> Source:
    """The file or the split that ``name`` stands for."""
    task, path = TASKS[data.task], Path(name).expanduser()
    splits = task.home.splits if task.home else ("train", "test")
    split = ((data.test_split or data.split) if held_out else data.split) or splits[held_out]
    if path.is_dir():
        file = path / task.files[held_out] if task.files else None
        if file is not None and (file.is_file() or task.home is None):
            return Source(file, name, split, original=True)
        config = task.home.hub.partition(":")[2] if task.home else ""
        return Source(None, f"{name}:{config}", split, original=False)
    found = hub.resolve_dataset(name)
    original = found.path is not None and found.path.suffix.lower() == ".tsv"
    return Source(found.path, name, split, original)


def read_source(data: DataConfig, source: Source, model: Path, held_out: bool) -> Examples:
    """The examples of a source, as the task reads its records."""
    task = TASKS[data.task]
    group = None if held_out else data.client_column
    if task.kind == "causal":
        columns = (*task.columns, *([group] if group else []))
        render = task.render or chat_prompts(model)
        return prompted(open_table(source, columns, task), task.columns, render, group)
    columns = columns_of(data, task, source)._replace(group=group)
    table = open_table(source, columns.all, task)
    if task.kind == "regression":
        return measured(table, columns)
    return labelled(table, columns, data.label_names or task.label_names)


def columns_of(data: DataConfig, task: TaskType, source: Source) -> Columns:
    """The columns of a classification: the task's own, else the config's."""
    if task.home is None:
        return Columns(data.text_columns, data.label_column)
    return task.home.original if source.original else task.home.columns


def open_table(source: Source, columns: Sequence[str], task: TaskType) -> Table:
    """The records of a source."""
    if source.path is None:
        return read_hub(source.name, source.split, columns)
    return read_file(source.path, columns, skip_short=task.home is not None and task.home.skip_short)


def model_task(data: DataConfig) -> str:
    """What the model does, in the words of ``models.build_model``."""
    return "causal" if TASKS[data.task].kind == "causal" else "sequence"


def outputs(data: DataConfig, examples: Examples) -> int:
    """How many outputs a model's head has: one for each label, or one number."""
    return 1 if TASKS[data.task].kind == "regression" else len(examples.label_names)


def check_length(length: int, model: Model, name: str) -> None:
    """Refuses texts of more tokens than the model has positions.

    Raises:
      UserError: they are.
    """
    if length > model.max_length:
        raise UserError(
            f"data.max_length: found {length}, but the model in {name} takes at most {model.max_length} tokens; "
            "choose at most that many"
        )


def tokenise(folder: Path, model: Model, examples: Examples, data: DataConfig) -> TokenStore:
    """Texts as the model's tokens.

    Raises:
      UserError: ``max_length`` is more than the model's positions, or the tokenizer is of another model.
    """
    check_length(data.max_length, model, folder.name)
    task, tokenizer = TASKS[data.task], load_tokenizer(folder)
    causal, end = task.kind == "causal", None
    if causal and task.render:
        end = end_token(folder, tokenizer)

    def make() -> TokenStore:
        if not causal:
            return encode(tokenizer, examples.texts, data.max_length, model.vocab_size)
        prompts, completions = examples.texts
        return encode_prompts(
            tokenizer,
            (prompts, completions),
            data.max_length,
            model.vocab_size,
            end=end,
            learn_all=data.learn == "all",
        )

    settings = tokenizer.to_str(), data.max_length, model.vocab_size, causal, end, data.learn
    return stored(examples.texts, settings, make)


def tokenise_held_out(
    folder: Path, model: Model, test: Examples, data: DataConfig, groups: int = 1
) -> HeldOut:
    """Held-out examples, with all their options, as batches that so many ``groups`` of devices can share."""
    rows, owner, right = each_option(test)
    store = tokenise(folder, model, rows, data)
    return hold_out(store, rows, owner, right, data.row_length or data.max_length, data.packing, groups)


def tokenise_prompts(
    folder: Path, model: Model, test: Examples, data: DataConfig, count: int
) -> tuple[list[Int32[np.ndarray, " n"]], int]:
    """Each example's prompt alone, with room for ``count`` tokens, and the token that ends a text.

    A prompt too long loses its beginning, as in training.
    """
    tokenizer, room = load_tokenizer(folder), min(data.max_length, model.max_length - count)
    end, prompts = end_token(folder, tokenizer), test.texts[0]
    if room < 1:
        raise UserError(f"new tokens: found {count}; expected fewer than the model's {model.max_length}")
    store = encode_prompts(tokenizer, (prompts, [""] * len(prompts)), room + 1, model.vocab_size, end=end)
    return [store.tokens[a : b - 1] for a, b in pairwise(store.offsets)], end
