"""Records of a local CSV, TSV, JSON, JSON-lines or parquet file, or of a data set of the Hugging Face hub."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from fslora_jax.errors import UserError

DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},
}
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV or TSV field; Python's own limit of 131,072 would refuse long texts."""

Record = tuple[str, Any]
"""Where a record stands in its file (``line 3``), and its values by column."""


class Table(NamedTuple):
    """Records in order, of ``source``, a file or a data set; ``label_names`` by column where it declares them."""

    source: str
    records: Iterable[Record]
    label_names: dict[str, tuple[str, ...]] = {}


def read_file(path: Path, wanted: Sequence[str], *, skip_short: bool = False) -> Table:
    """The records of a UTF-8 file; its suffix says how (.csv, .tsv, .json, .jsonl, .parquet).

    TSV knows no quotes (as GLUE's files). ``wanted`` columns that are all integers, ``"0"`` and ``"3"``, are
    positions in a CSV or TSV without a header. ``skip_short`` passes over rows that lack fields.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        return _read_dataset(str(path), "parquet", wanted, data_files=str(path), split="train")
    return Table(str(path), _records(path, wanted, skip_short))


def read_hub(name: str, split: str, wanted: Sequence[str]) -> Table:
    """The records of a split; ``name`` is ``owner/name``, ``owner/name:config``, or a local copy of such files."""
    repository, _, config = name.partition(":")
    return _read_dataset(f"data set {name}, split {split}", repository, wanted, config or None, split=split)


def check_columns(place: str, wanted: Sequence[str], columns: Iterable[str]) -> None:
    """Refuses a record, or a header, that does not have each of ``wanted`` once."""
    columns = list(columns)
    for name in wanted:
        if columns.count(name) != 1:
            count = columns.count(name) or "no"
            raise UserError(f"{place}: {count} columns named {name!r}; the columns are {listing(columns)}")


def short(value: Any) -> str:
    """A value as an error message shows it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def listing(values: Sequence[str]) -> str:
    """Several values as an error message shows them."""
    shown = ", ".join(map(short, values[:20]))
    return shown if len(values) <= 20 else f"{shown} and {len(values) - 20} more"


def _read_dataset(source: str, builder: str, wanted: Sequence[str], *args: Any, **options: Any) -> Table:
    import datasets

    try:
        data = cast(datasets.Dataset, datasets.load_dataset(builder, *args, **options))
    except Exception as error:  # the library lets through whatever the network, the cache or a file raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{source}: cannot load it ({reason}); check the name or give a file") from error
    check_columns(source, wanted, data.column_names)
    columns = cast(dict[str, list], data.select_columns(list(wanted)).to_dict())
    names = {}
    for column in wanted:
        feature = data.features[column]
        if isinstance(feature, datasets.ClassLabel):
            known = dict(enumerate(feature.names))
            names[column] = tuple(feature.names)
            columns[column] = [known.get(value, value) for value in columns[column]]
    rows = zip(*(columns[column] for column in wanted), strict=True)
    records = ((f"row {i}", dict(zip(wanted, row, strict=True))) for i, row in enumerate(rows))
    return Table(source, records, names)


def _records(path: Path, wanted: Sequence[str], skip_short: bool) -> Iterable[Record]:
    suffix = path.suffix.lower()
    if suffix in DIALECTS:
        csv.field_size_limit(LONGEST_FIELD)
        reader = csv.reader(io.StringIO(_read(path), newline=""), **DIALECTS[suffix])
        return _table(path, reader, wanted, skip_short)
    if suffix == ".jsonl":
        lines = enumerate(_read(path).split("\n"), start=1)
        return ((f"line {line}", _parse(path, content, line)) for line, content in lines if content.strip())
    if suffix == ".json":
        records = _parse(path, _read(path).rstrip() or "[]", 1)
        if not isinstance(records, list):
            raise UserError(f"{path}, line 1: found {short(records)}; expected a list of objects")
        return ((f"record {i}", record) for i, record in enumerate(records, start=1))
    raise UserError(
        f"{path}: unknown format {suffix!r}; expected a file named .csv, .tsv, .json, .jsonl or .parquet"
    )


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


def _table(path: Path, reader: Any, wanted: Sequence[str], skip_short: bool) -> Iterator[Record]:
    columns: list[str] = []
    headerless = all(name.isdigit() for name in wanted)
    for line, row in _rows(path, reader):
        if not columns:
            columns = [str(i) for i in range(len(row))] if headerless else row
            check_columns(f"{path}, line {line}", wanted, columns)
            if not headerless:
                continue
        if skip_short and len(row) < len(columns):
            continue
        if len(row) != len(columns):
            raise UserError(
                f"{path}, line {line}: found {len(row)} fields; expected {len(columns)}, as in the first row"
            )
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
    except RecursionError as error:
        raise UserError(f"{path}, line {line}: nested too deeply; expected flat objects") from error
