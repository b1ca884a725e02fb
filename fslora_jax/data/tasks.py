"""Labelled texts from a local CSV, TSV, JSON or JSON-lines file, or from the Hugging Face hub."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from fslora_jax.errors import UserError

DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}

Record = tuple[str, Any]
"""Where a record stands in its file (``line 3``), and its values by column."""


class Examples(NamedTuple):
    """One or two columns of texts, and each example's label as an index into ``label_names``."""

    texts: tuple[list[str], ...]
    labels: Int[np.ndarray, " n"]
    label_names: tuple[str, ...]


def load_file(
    path: Path, *, text_columns: Sequence[str], label_column: str, label_names: Sequence[str] | None = None
) -> Examples:
    """Read labelled texts from a UTF-8 file; its suffix says how (.csv, .tsv, .json, .jsonl).

    TSV knows no quotes (as GLUE's files). Columns that are all integers, ``"0"`` and ``"3"``, are positions
    in a CSV or TSV without a header. ``label_names`` fixes the order of the labels: give the training file's
    to its test file. Without it they are sorted, integers by value.
    """
    path = Path(path)
    records = _records(path, (*text_columns, label_column))
    return _examples(str(path), records, text_columns, label_column, label_names)


def load_hub(
    name: str,
    *,
    split: str,
    text_columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str] | None = None,
) -> Examples:
    """Read labelled texts from a data set of the hub; ``name`` is ``owner/name`` or ``owner/name:config``.

    The data set's own label names are used where it declares them.
    """
    import datasets

    source = f"data set {name}, split {split}"
    repository, _, config = name.partition(":")
    try:
        data = cast(datasets.Dataset, datasets.load_dataset(repository, config or None, split=split))
    except Exception as error:  # the library lets through whatever the network, the cache or a file raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{source}: cannot load it ({reason}); check the name or give a file") from error
    wanted = (*text_columns, label_column)
    _check_columns(source, wanted, data.column_names)
    columns = cast(dict[str, list], data.select_columns(list(wanted)).to_dict())
    feature = data.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        known = dict(enumerate(feature.names))
        columns[label_column] = [known.get(value, value) for value in columns[label_column]]
        label_names = label_names or feature.names
    rows = zip(*(columns[column] for column in wanted), strict=True)
    records = ((f"row {i}", dict(zip(wanted, row, strict=True))) for i, row in enumerate(rows))
    return _examples(source, records, text_columns, label_column, label_names)


def split_examples(examples: Examples, num_test: int, rng: np.random.Generator) -> tuple[Examples, Examples]:
    """Hold out ``num_test`` examples drawn uniformly: (train, test), each in the original order."""
    n = len(examples.labels)
    if not 0 < num_test < n:
        raise UserError(f"test_examples is {num_test}; expected 1 to {n - 1}, as the data has {n} examples")
    order = rng.permutation(n)
    return _take(examples, np.sort(order[num_test:])), _take(examples, np.sort(order[:num_test]))


def _take(examples: Examples, index: Int[np.ndarray, " m"]) -> Examples:
    texts = tuple([column[i] for i in index] for column in examples.texts)
    return examples._replace(texts=texts, labels=examples.labels[index])


def _examples(
    source: str,
    records: Iterable[Record],
    text_columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str] | None,
) -> Examples:
    if len(text_columns) not in (1, 2):
        raise UserError(f"text_columns has {len(text_columns)} names; expected one, or two for pairs")
    texts: tuple[list[str], ...] = tuple([] for _ in text_columns)
    places, found = [], []
    for where, record in records:
        place = f"{source}, {where}"
        if not isinstance(record, dict):
            raise UserError(f"{place}: found {_short(record)}; expected an object with the columns as keys")
        _check_columns(place, (*text_columns, label_column), record)
        for values, column in zip(texts, text_columns, strict=True):
            values.append(_text(place, column, record[column]))
        places.append(place)
        found.append(_label(place, label_column, record[label_column]))
    if not found:
        raise UserError(f"{source}: holds no examples; expected at least one row of data")
    if len(set(found)) == 1:
        raise UserError(f"{source}: every label is {_short(found[0])}; expected at least two distinct labels")
    names = tuple(label_names) if label_names is not None else _sorted_names(set(found))
    return Examples(texts, _label_numbers(places, found, names), names)


def _label_numbers(places: list[str], found: list[str], names: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    index = {name: i for i, name in enumerate(names)}
    if len(index) != len(names):
        raise UserError(f"label_names repeats a name ({_listing(names)}); give each label once")
    for place, label in zip(places, found, strict=True):
        if label not in index:
            raise UserError(f"{place}: label {_short(label)} is not among label_names ({_listing(names)})")
    return np.array([index[label] for label in found], np.int32)


def _text(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} holds {_short(value)}; expected a text")
    return value


def _label(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str | int) or value == "":
        raise UserError(f"{place}: column {column!r} holds {_short(value)}; expected a text or an integer")
    return value if isinstance(value, str) else json.dumps(value)


def _sorted_names(found: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(sorted(found), key=int))  # sorted twice: "1" and "01" are equal by value
    except ValueError:
        return tuple(sorted(found))


def _check_columns(place: str, wanted: Sequence[str], columns: Iterable[str]) -> None:
    columns = list(columns)
    for name in wanted:
        if columns.count(name) != 1:
            count = columns.count(name) or "no"
            raise UserError(f"{place}: {count} columns named {name!r}; the columns are {_listing(columns)}")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror}); give the path of a file") from error
    try:
        # Not utf-8-sig: its errors count bytes from behind the byte-order mark.
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 at byte {error.start}; convert it") from error


def _records(path: Path, wanted: Sequence[str]) -> Iterable[Record]:
    suffix = path.suffix.lower()
    if suffix in DIALECTS:
        return _table(path, csv.reader(io.StringIO(_read(path), newline=""), **DIALECTS[suffix]), wanted)
    if suffix == ".jsonl":
        lines = enumerate(_read(path).split("\n"), start=1)
        return ((f"line {line}", _parse(path, content, line)) for line, content in lines if content.strip())
    if suffix == ".json":
        records = _parse(path, _read(path).rstrip() or "[]", 1)
        if not isinstance(records, list):
            raise UserError(f"{path}, line 1: found {_short(records)}; expected a list of objects")
        return ((f"record {i}", record) for i, record in enumerate(records, start=1))
    raise UserError(f"{path}: unknown format {suffix!r}; expected a file named .csv, .tsv, .json or .jsonl")


def _table(path: Path, reader: Any, wanted: Sequence[str]) -> Iterator[Record]:
    columns: list[str] = []
    headerless = all(name.isdigit() for name in wanted)
    for line, row in _rows(path, reader):
        place = f"{path}, line {line}"
        if not columns:
            columns = [str(i) for i in range(len(row))] if headerless else row
            _check_columns(place, wanted, columns)
            if not headerless:
                continue
        if len(row) != len(columns):
            raise UserError(f"{place}: found {len(row)} fields; expected {len(columns)}, as in the first row")
        yield f"line {line}", dict(zip(columns, row, strict=True))


def _rows(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: malformed row ({error}); check its quotes") from error


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{place}: malformed JSON ({error.msg}); correct it") from error


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _listing(values: Sequence[str]) -> str:
    shown = ", ".join(map(_short, values[:20]))
    return shown if len(values) <= 20 else f"{shown} and {len(values) - 20} more"
