"""What is in run folders and study folders, finished or not, read only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fslora_jax.errors import UserError, of_other_version
from fslora_jax.federation.fairness import CLIENTS
from fslora_jax.log import Record, read_records
from fslora_jax.rundir import CONFIG, MADE_BY, METRICS, flat, read_mapping, read_summary
from fslora_jax.study.points import TRIALS
from fslora_jax.study.table import STUDY, commands_of
from fslora_jax.study.tuning import DIVERGED

OTHERS = ("partition.json", "theory.json", MADE_BY)
"""What a run folder may hold beside."""
MANY = 4
"""Settings that differ, beyond which single runs are told apart by their names instead."""


class Run(NamedTuple):
    """One run: its place on the axes, its dotted settings, and what it has written so far."""

    name: str
    folder: Path
    grid: str
    labels: dict[str, str]
    settings: dict[str, Any] = {}
    records: list[Record] = []
    clocks: list[Record] = []
    clients: list[Record] = []
    partition: dict[str, Any] = {}
    theory: dict[str, Any] = {}
    made_by: dict[str, Any] = {}
    summary: dict[str, Any] | None = None
    trouble: str = ""

    @property
    def trial(self) -> bool:
        """Whether it only chose settings, on validation data; what it measured is not compared with the others."""
        return self.grid.endswith(TRIALS)

    @property
    def state(self) -> str:
        """``finished``, ``diverged``, ``unreadable``, ``round 3 of 10`` or ``not begun``."""
        if self.trouble:
            return "unreadable"
        if (self.folder / DIVERGED).exists():
            return "diverged"
        if self.summary is not None:
            return "finished"
        if not self.settings:
            return "not begun"
        done = self.records[-1]["round"] if self.records else 0
        return f"round {done} of {self.settings['federation.num_rounds']}"


class Subject(NamedTuple):
    """What a report is about; points that differ in ``repeat`` alone are repetitions of each other.

    Choices of the axis ``compare`` are also compared at equal uploaded bytes. ``commands`` ran the studies.
    """

    title: str
    kind: str
    question: str
    repeat: str
    compare: str
    runs: list[Run]
    commands: Sequence[str] = ()


def read_subject(folders: Sequence[Path]) -> Subject:
    """Reads studies and runs; a study's run that cannot be read is kept with the reason.

    Raises:
      UserError: a folder is no run and no study, or of an older version.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    studies = [folder for folder in folders if (folder / STUDY).is_file()]
    plain = [folder for folder in folders if folder not in studies]
    plans = [_read_plan(folder) for folder in studies]
    runs = [
        _study_run(folder, point, f"{folder.name}/" if len(folders) > 1 else "")
        for folder, plan in zip(studies, plans, strict=True)
        for point in plan["points"]
    ]
    runs += _placed([read_run(folder) for folder in plain])
    asked = [plan["study"].get("question") for plan in plans]
    first = plans[0]["study"] if plans else {}
    return Subject(
        ", ".join(folder.resolve().name for folder in folders),
        "comparison" if len(folders) > 1 else "study" if studies else "run",
        " ".join(filter(None, dict.fromkeys(asked))),
        first.get("repeat", "seed"),
        first.get("compare") or "",
        runs,
        list(dict.fromkeys(command for folder in studies for command in commands_of(folder))),
    )


def read_run(folder: Path, name: str = "", grid: str = "", labels: dict[str, str] | None = None) -> Run:
    """Reads one run folder.

    Raises:
      UserError: no run folder, or a file in it is none of this version's.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: no run folder (it has no {CONFIG}) and no study (it has no {STUDY}); "
            "expected the --run-dir of a `fslora train` or the --out of a `fslora study`"
        )
    settings = flat(read_mapping(folder / CONFIG))
    if "federation.num_rounds" not in settings:
        raise of_other_version(folder / CONFIG, "federation.num_rounds")
    partition, theory, made_by = (
        read_mapping(path) if path.exists() else {} for path in map(folder.joinpath, OTHERS)
    )
    for found, needed in ((theory.get("estimates", []), "round"), (theory.get("growth", []), "local_steps")):
        if not all({"name", "value", needed} <= row.keys() for row in found):
            raise of_other_version(folder / "theory.json", needed)
    return Run(
        name or folder.resolve().name,
        folder,
        grid,
        labels or {},
        settings,
        read_records(folder / METRICS, "round"),
        read_records(folder / "timings.jsonl", "round"),
        read_records(folder / CLIENTS, "client"),
        partition,
        theory,
        made_by,
        read_summary(folder),
    )


def _study_run(out: Path, point: dict[str, str], prefix: str) -> Run:
    folder = out / point["name"]
    labels = {axis: label for axis, label in point.items() if axis not in ("name", "grid")}
    place = (prefix + point["name"], folder, prefix + point["grid"], labels)
    if not (folder / CONFIG).is_file():
        return Run(*place)
    try:
        return read_run(folder, place[0], *place[2:])
    except UserError as error:
        return Run(*place, trouble=str(error))


def _placed(runs: list[Run]) -> list[Run]:
    """Runs that no study has placed: their axes are the settings in which they differ, or else their names."""
    if len(runs) < 2:
        return runs
    named = [run.name for run in runs]
    runs = [run if named.count(run.name) == 1 else run._replace(name=str(run.folder)) for run in runs]
    axes = different(runs)
    labels = [{axis: str(run.settings.get(axis, "")) for axis in axes} for run in runs]
    if len(axes) > MANY or len({tuple(label.values()) for label in labels}) < len(runs):
        labels = [{"run": run.name} for run in runs]
    return [run._replace(labels=label) for run, label in zip(runs, labels, strict=True)]


def different(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ, but for the devices."""
    names = dict.fromkeys(name for run in runs for name in run.settings if not name.startswith("mesh."))
    return [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]


def _read_plan(out: Path) -> dict[str, Any]:
    plan = read_mapping(out / STUDY)
    points = plan.get("points")
    if not isinstance(plan.get("study"), dict) or not isinstance(points, list):
        raise of_other_version(out / STUDY, "points" if "study" in plan else "study")
    if not all(isinstance(point, dict) and {"name", "grid"} <= point.keys() for point in points):
        raise of_other_version(out / STUDY, "points' name and grid")
    if not all(isinstance(text, str) for point in points for text in point.values()):
        raise UserError(f"{out / STUDY}: points: found a value that is no text; was it changed by hand?")
    return plan
