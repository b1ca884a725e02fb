"""A run folder: config.yaml, metrics.jsonl, timings.jsonl, checkpoints/, adapter/, figures/, summary.json.

``made_by.json`` says which code began it, on which data. A run that starts from an adapter keeps a copy in start/;
where clients remember something, that is in clients/.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fslora_jax.config import Config, dump_config, load_config
from fslora_jax.errors import UserError, of_other_version
from fslora_jax.provenance import provenance

CONFIG, METRICS, SUMMARY, MEMORIES = "config.yaml", "metrics.jsonl", "summary.json", "clients"
START, MADE_BY, CHECKPOINTS = "start", "made_by.json", "checkpoints"
FOUND = ("before", "after", "rounds", "up_bytes", "down_bytes", "compile_seconds", "median_round_seconds")
"""What others take from ``summary.json``."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a small file whole or not at all."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)


def check_writable(option: str, path: Path) -> None:
    """Makes the folder of a file that an option names and that will be written, perhaps much later.

    Raises:
      UserError: it cannot be, or the file is a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    except OSError as error:
        raise UserError(
            f"{option}: {path} cannot be written: {error.strerror}; choose another file"
        ) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping.

    Raises:
      UserError: it holds something else, or is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}; is it damaged?") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {type(values).__name__}, expected a mapping; is it damaged?")
    return values


def own_start(run_dir: Path, config: Config) -> Config:
    """The config with the run's own copy of the adapter that it starts from, once there is one."""
    if config.lora.init_from is None or not (run_dir / START).is_dir():
        return config
    lora = config.lora.model_copy(update={"init_from": str(run_dir / START)})
    return config.model_copy(update={"lora": lora})


def keep_start(run_dir: Path, config: Config) -> None:
    """Copies the adapter that a run starts from, so that the run folder is enough to go on, evaluate and export."""
    if config.lora.init_from is None or (run_dir / START).is_dir():
        return
    fresh = run_dir / f".{START}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for path in sorted(Path(config.lora.init_from).glob("adapter_*")):
        shutil.copyfile(path, fresh / path.name)
    fresh.rename(run_dir / START)


def keep_data(run_dir: Path, fingerprint: str) -> None:
    """Notes on which data a run trains, which must be the same when it goes on.

    Raises:
      UserError: they are others than it was begun with.
    """
    made_by = read_mapping(run_dir / MADE_BY) if (run_dir / MADE_BY).exists() else {}
    known = made_by.get("data", fingerprint)
    if known != fingerprint and has_begun(run_dir):
        raise UserError(
            f"{run_dir}: was begun with other data (fingerprint {known}, now {fingerprint}); put back what data.name "
            "and data.test_name held, or choose another --run-dir"
        )
    if made_by.get("data") != fingerprint:
        write_atomically(run_dir / MADE_BY, json.dumps(made_by | {"data": fingerprint}, indent=1) + "\n")


class InUse(UserError):
    """Another process is working in a run folder."""


@contextmanager
def open_run(run_dir: Path, config: Config) -> Iterator[None]:
    """Holds a run folder for this process: a new one, or one of the same config to go on with.

    Raises:
      UserError: the folder is in use, holds something else, or a run of another config.
    """
    known = run_dir / CONFIG
    if run_dir.exists() and not known.exists() and any(p.name[0] != "." for p in _entries(run_dir)):
        raise UserError(
            f"{run_dir}: not empty and no run folder (it has no {CONFIG}); choose another --run-dir"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise InUse(
            f"{run_dir}: another process is working in it; wait for it or choose another --run-dir"
        ) from None
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be made or written: {error.strerror}; choose another --run-dir"
        ) from None
    with lock:
        if known.exists() and has_begun(run_dir):
            _check_same(run_dir, config)
        else:
            write_atomically(known, dump_config(config))  # first: it makes this a run folder
            shutil.rmtree(run_dir / START, ignore_errors=True)  # perhaps of another config
            write_atomically(run_dir / MADE_BY, json.dumps(provenance(), indent=1) + "\n")
        yield


def has_begun(run_dir: Path) -> bool:
    """Whether there is anything of a training in a run folder: a record, or a checkpoint whose records are gone."""
    saved = (run_dir / CHECKPOINTS).glob("*")
    return (run_dir / METRICS).exists() or any(path.name.isdecimal() for path in saved)


def load_run_config(run_dir: Path) -> Config:
    """The resolved config of a run folder."""
    if not (run_dir / CONFIG).is_file():
        raise UserError(
            f"{run_dir}: no run folder, it has no {CONFIG}; expected the --run-dir of a `fslora train`"
        )
    return load_config(run_dir / CONFIG)


def code_of(run_dir: Path) -> str | None:
    """The fingerprint of the code that began a run; None where no run has begun, "unknown" of one that does not say."""
    if not (run_dir / METRICS).exists():
        return None
    path = run_dir / MADE_BY
    return read_mapping(path).get("code", "unknown") if path.exists() else "unknown"


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """What a finished run found, or None while it is not finished.

    Raises:
      UserError: the file is damaged, or another version's.
    """
    path = run_dir / SUMMARY
    if not path.exists():
        return None
    summary = read_mapping(path)
    for name in FOUND:
        if name not in summary:
            raise of_other_version(path, name)
    return summary


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Marks a run as finished; the last thing that a run writes."""
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=1) + "\n")


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; expected a folder for --run-dir")
    return list(folder.iterdir())


def _check_same(run_dir: Path, config: Config) -> None:
    old, new = (flat(yaml.safe_load(dump_config(c))) for c in (load_config(run_dir / CONFIG), config))
    names = (
        name for name in {**old, **new} if not name.startswith("mesh.")
    )  # a run may go on on other devices
    different = [name for name in names if old.get(name) != new.get(name)]
    if different:
        name = different[0]
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        raise UserError(
            f"{run_dir}: holds a run with {name} = {old.get(name)}, but this config has {new.get(name)}{more}; "
            "choose another --run-dir, or the same config to resume"
        )


def settings_of(config: Config, but: Collection[str] = ("mesh",)) -> str:
    """A config as a text to compare, ``but`` some fields and sections; without the devices, all that decides a run."""
    values = flat(config.model_dump(mode="json"))
    kept = {name: v for name, v in values.items() if name not in but and name.split(".")[0] not in but}
    return json.dumps(kept, sort_keys=True)


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names.

    >>> flat({"a": {"b": 1}, "c": {}})
    {'a.b': 1, 'c': {}}
    """
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values}
    return {k: v for name, value in values.items() for k, v in flat(value, f"{prefix}{name}.").items()}
