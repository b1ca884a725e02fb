"""Runs that need no training, since a run of equal settings and code is finished: in the same study, or in another."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.provenance import code_fingerprint
from fslora_jax.rundir import (
    CONFIG,
    MADE_BY,
    SUMMARY,
    InUse,
    code_of,
    load_run_config,
    open_run,
    read_mapping,
    read_summary,
    settings_of,
    write_atomically,
)
from fslora_jax.study.points import Point
from fslora_jax.study.tuning import settled

COPIED_FROM = "copied_from"
"""In ``made_by.json`` of a run that was not trained in its place: the folder of the one that was."""
Finished = dict[str, Path]
"""Folders of finished runs by `settings_of` their configs."""


def finished_in(folders: Sequence[Path]) -> Finished:
    """All finished runs of this code anywhere below some folders.

    Raises:
      UserError: a folder does not exist, or a file of a run is damaged.
    """
    found: Finished = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"--reuse: {folder} is no folder; expected the --out of a study, or a folder of runs"
            )
        for path in sorted(folder.rglob(SUMMARY)):
            if (path.parent / CONFIG).exists() and code_of(path.parent) == code_fingerprint():
                found.setdefault(settings_of(load_run_config(path.parent)), path.parent)
    return found


def finished_points(out: Path, points: Sequence[Point]) -> Finished:
    """The points of a study that are finished."""
    found: Finished = {}
    for point in points:
        if read_summary(out / point.name) is None or code_of(out / point.name) != code_fingerprint():
            continue
        with suppress(UserError):  # what was tuned can no longer be told
            if ready := settled(out, point):
                found.setdefault(settings_of(ready.config), out / point.name)
    return found


def copied(out: Path, points: Sequence[Point], finished: Finished) -> Iterator[tuple[Point, Path]]:
    """Gives each of some points that a finished run answers, with that run, once it has copied it into its place.

    An adapter to start from is a folder whose content may change, so runs that have one are never copied.
    """
    for point in points:
        ready = None
        with suppress(UserError):  # its trials are not all there, or diverged
            ready = settled(out, point)
        if ready is None or ready.config.lora.init_from is not None:
            continue
        source = finished.get(settings_of(ready.config))
        if source is not None and source.resolve() != (out / point.name).resolve():
            with suppress(InUse):  # it is being trained elsewhere
                copy_run(source, out / point.name, ready.config)
                yield point, source


def copy_run(source: Path, run_dir: Path, config: Config) -> None:
    """A finished run's files into another run folder, the summary last; what was only begun there is replaced."""
    with open_run(run_dir, config):
        if read_summary(run_dir) is not None:  # another process was faster
            return
        for path in sorted(source.iterdir()):
            if path.name in (CONFIG, MADE_BY, SUMMARY) or path.name[0] == ".":
                continue
            if path.is_dir():
                shutil.rmtree(run_dir / path.name, ignore_errors=True)
                shutil.copytree(path, run_dir / path.name)
            else:
                write_atomically(run_dir / path.name, path.read_bytes())
        made_by = {COPIED_FROM: str(source.resolve())} | read_mapping(source / MADE_BY)
        write_atomically(run_dir / MADE_BY, json.dumps(made_by, indent=1) + "\n")
        write_atomically(run_dir / SUMMARY, (source / SUMMARY).read_bytes())
