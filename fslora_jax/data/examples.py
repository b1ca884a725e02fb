"""Records as examples: texts with a label, texts with a number, prompts with a completion."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, Real

from fslora_jax.data.records import Table, check_columns, listing, short
from fslora_jax.errors import UserError

T = TypeVar("T")


class Examples(NamedTuple):
    """Texts in one column or two, and what a model shall say to each.

    ``labels`` are indices into ``label_names``, or numbers to predict, then without names. A language model's
    two columns are prompt and completion; where one of several completions is right, ``options`` holds them
    all and the label says which. ``groups`` tells whose or of which task an example is, for partitions; it is
    empty where nobody asked.
    """

    texts: tuple[list[str], ...]
    labels: Real[np.ndarray, " n"]
    label_names: tuple[str, ...]
    options: tuple[tuple[str, ...], ...] = ()
    groups: tuple[str, ...] = ()


class Columns(NamedTuple):
    """Where a record holds its texts, its label and, for partitions, its group."""

    texts: tuple[str, ...]
    label: str
    group: str | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read."""
        return (*self.texts, self.label, *([self.group] if self.group else []))


class Prompted(NamedTuple):
    """One example of a language model: ``completion`` follows ``prompt`` without anything in between.

    ``options`` are the completions to choose from, named by ``names``; both are empty where any answer goes.
    """

    prompt: str
    completion: str
    options: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def labelled(table: Table, columns: Columns, label_names: Sequence[str] | None = None) -> Examples:
    """Texts with one of several labels.

    ``label_names`` fixes the order of the labels: give the training file's to its test file. Without it they
    are those that the data set declares, or those that occur, sorted, integers by value. A label may also be
    given by its number where the names themselves are no numbers.
    """
    first, texts, found, groups = _read(table, columns, _label)
    if len(set(found)) == 1:
        raise UserError(
            f"{table.source}: every label is {short(found[0])}; expected at least two distinct labels"
        )
    names = tuple(label_names or table.label_names.get(columns.label) or _sorted_names(set(found)))
    return Examples(texts, _label_numbers(first, found, names), names, groups=groups)


def measured(table: Table, columns: Columns) -> Examples:
    """Texts with a number each, such as a similarity."""
    _, texts, found, groups = _read(table, columns, _number)
    return Examples(texts, np.array(found, np.float32), (), groups=groups)


def prompted(
    table: Table,
    wanted: Sequence[str],
    render: Callable[[str, dict[str, Any]], Prompted],
    group: str | None = None,
) -> Examples:
    """What a language model shall complete; ``render(place, record)`` makes a record of ``wanted`` columns one."""
    found, groups = [], []
    for place, record in _placed(table, (*wanted, *([group] if group else []))):
        example = render(place, record)
        if group:
            groups.append(_label(place, group, record[group]))
        if not example.completion.strip():
            raise UserError(f"{place}: the answer is empty; remove the record or give it an answer")
        found.append(example)
    _check_some(table, found)
    names = _sorted_names({name for example in found for name in example.names}) or ("text",)
    labels = [names.index(e.names[e.options.index(e.completion)]) if e.options else 0 for e in found]
    options = tuple(e.options for e in found) if any(e.options for e in found) else ()
    texts = [e.prompt for e in found], [e.completion for e in found]
    return Examples(texts, np.array(labels, np.int32), names, options, tuple(groups))


def join(parts: dict[str, Examples]) -> Examples:
    """Several tasks' examples one after another, with the task's name as their group."""
    names = _sorted_names({name for part in parts.values() for name in part.label_names})
    labels = [
        np.array([names.index(part.label_names[i]) for i in part.labels], np.int32) for part in parts.values()
    ]
    columns = zip(*(part.texts for part in parts.values()), strict=True)
    texts = tuple(list(chain.from_iterable(column)) for column in columns)
    options = tuple(chain.from_iterable(part.options for part in parts.values()))
    groups = tuple(name for name, part in parts.items() for _ in part.labels)
    return Examples(texts, np.concatenate(labels), names, options, groups)


def take(examples: Examples, index: Int[np.ndarray, " m"]) -> Examples:
    """The examples at ``index``, in its order."""

    def chosen(values: Sequence[T]) -> list[T]:
        return [values[i] for i in index] if values else []

    return examples._replace(
        texts=tuple(chosen(column) for column in examples.texts),
        labels=examples.labels[index],
        options=tuple(chosen(examples.options)),
        groups=tuple(chosen(examples.groups)),
    )


def split_examples(examples: Examples, num_test: int, rng: np.random.Generator) -> tuple[Examples, Examples]:
    """Hold out ``num_test`` examples drawn uniformly: (train, test), each in the original order."""
    n = len(examples.labels)
    if not 0 < num_test < n:
        raise UserError(f"test_examples is {num_test}; expected 1 to {n - 1}, as the data has {n} examples")
    order = rng.permutation(n)
    return take(examples, np.sort(order[num_test:])), take(examples, np.sort(order[:num_test]))


def text_of(place: str, column: str, value: Any) -> str:
    """A text of a record; refuses what no tokenizer can take."""
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds {short(value)}; expected a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: column {column!r} has half a surrogate pair; correct it") from error
    return value


def _placed(table: Table, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, record in table.records:
        place = f"{table.source}, {where}"
        if not isinstance(record, dict):
            raise UserError(f"{place}: found {short(record)}; expected an object with the columns as keys")
        if not all(name in record for name in wanted):
            check_columns(place, wanted, record)
        yield place, record


def _read(
    table: Table, columns: Columns, answer: Callable[[str, str, Any], T]
) -> tuple[dict[T, str], tuple[list[str], ...], list[T], tuple[str, ...]]:
    if len(columns.texts) not in (1, 2):
        raise UserError(f"text_columns has {len(columns.texts)} names; expected one, or two for pairs")
    texts: tuple[list[str], ...] = tuple([] for _ in columns.texts)
    first, found, groups = {}, [], []
    for place, record in _placed(table, columns.all):
        for values, column in zip(texts, columns.texts, strict=True):
            values.append(text_of(place, column, record[column]))
        found.append(answer(place, columns.label, record[columns.label]))
        first.setdefault(found[-1], place)
        if columns.group:
            groups.append(_label(place, columns.group, record[columns.group]))
    _check_some(table, found)
    return first, texts, found, tuple(groups)


def _check_some(table: Table, found: Sequence[Any]) -> None:
    if not found:
        raise UserError(f"{table.source}: holds no examples; expected at least one row of data")


def _label_numbers(first: dict[str, str], found: list[str], names: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """``first`` tells where each label occurs first."""
    index = {name: i for i, name in enumerate(names)}
    if len(index) != len(names):
        raise UserError(f"label_names repeats a name ({listing(names)}); give each label once")
    if not any(name.lstrip("-").isdigit() for name in names):
        index |= {str(i): i for i in range(len(names))}
    for label, place in first.items():
        if label not in index:
            raise UserError(f"{place}: label {short(label)} is not among label_names ({listing(names)})")
    return np.array([index[label] for label in found], np.int32)


def _label(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str | int) or value == "":
        raise UserError(f"{place}: column {column!r} holds {short(value)}; expected a text or an integer")
    return value if isinstance(value, str) else json.dumps(value)


def _number(place: str, column: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place}: column {column!r} holds {short(value)}; expected a number")
    return number


def _sorted_names(found: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(sorted(found), key=int))  # sorted twice: "1" and "01" are equal by value
    except ValueError:
        return tuple(sorted(found))
