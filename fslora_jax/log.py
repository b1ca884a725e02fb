"""What a run leaves behind as numbers: metrics.jsonl, timings.jsonl, and optional loggers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fslora_jax.errors import UserError, of_other_version

Record = dict[str, Any]


class Logger(Protocol):
    """Anything that takes one record a round."""

    def write(self, record: Record) -> None:
        """Logs the values of ``record["round"]``."""
        ...

    def close(self) -> None:
        """Writes out what is buffered."""
        ...


class JsonLines:
    """One JSON object a round, appended and flushed at once.

    ``metrics.jsonl`` holds only what config and seed determine, so two runs of one config have equal files; what
    the clock says goes to ``timings.jsonl``.
    """

    def __init__(self, path: Path, keep_rounds: int):
        """Opens ``path`` for appending, after dropping what is beyond ``keep_rounds`` rounds or torn by a kill."""
        kept = [r for r in read_records(path, "round") if r["round"] <= keep_rounds]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends a record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_records(path: Path, *needed: str) -> list[Record]:
    """All whole records of a JSON lines file; none where there is no file. A torn last line is not a record.

    Raises:
      UserError: another line is no record, or a record lacks what is ``needed``.
    """
    if not path.exists():
        return []
    records, lines = [], path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise UserError(
                f"{path}: line {number} of {len(lines)} is damaged; put back a copy of the file, or run this again "
                "in another folder"
            )
    for name in needed:
        if not all(name in record for record in records):
            raise of_other_version(path, name)
    return records


class _TensorBoard:
    def __init__(self, run_dir: Path, keep_rounds: int):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=keep_rounds + 1)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "round":
                self._writer.add_scalar(name, value, record["round"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, keep_rounds: int):
        del keep_rounds  # a resumed run keeps its id; W&B ignores steps that it has
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(project="fslora_jax", id=run_dir.name, dir=str(run_dir), resume="allow")

    def write(self, record: Record) -> None:
        self._run.log({k: v for k, v in record.items() if k != "round"}, step=record["round"])

    def close(self) -> None:
        self._run.finish()


_LOGGERS = {"tensorboard": ("tensorboardX", _TensorBoard), "wandb": ("wandb", _WandB)}


def open_loggers(names: Sequence[str], run_dir: Path, keep_rounds: int) -> list[Logger]:
    """metrics.jsonl and the optional loggers of a run.

    Raises:
      UserError: the package of an optional logger is not installed.
    """
    optional = [_open(name, run_dir, keep_rounds) for name in names]
    return [JsonLines(run_dir / "metrics.jsonl", keep_rounds), *optional]


def _open(name: str, run_dir: Path, keep_rounds: int) -> Logger:
    package, logger = _LOGGERS[name]
    try:
        return logger(run_dir, keep_rounds)
    except ModuleNotFoundError:
        raise UserError(
            f"loggers: {name} needs the package {package}; pip install 'fslora_jax[{name}]'"
        ) from None
