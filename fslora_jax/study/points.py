"""What a study consists of: grids over settings, and the runs that they make up."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import AfterValidator, model_validator

from fslora_jax.config import Config, load_config, make_config
from fslora_jax.errors import UserError
from fslora_jax.settings import Section, checked

Settings = dict[str, Any]
"""Dotted names of settings, such as ``federation.num_rounds``, with their values."""
TRIALS = ".tuning"
"""What the grid of a grid's trials is called, behind its name."""
COLUMNS = (
    *("grid", "name", "n", "code", "loss", "round", "rounds", "up_MB", "down_MB"),
    *("seconds", "round_seconds", "compile_seconds"),
)
"""What tables and plans hold beside axes and a task's own metrics."""
Axes = dict[str, list[Any] | dict[str, Settings]]


def _not_empty(over: Axes) -> Axes:
    for axis, values in over.items():
        if not values:
            raise ValueError(f"{axis} has no values; name at least one, or leave the axis out")
    return over


class Tune(Section):
    """How a grid chooses some settings anew at each place on its axes, before the repetitions are run."""

    over: Annotated[Axes, AfterValidator(_not_empty)]
    """What there is to choose from, as the axes of a grid; all combinations are tried."""
    set: Settings = {"data.validation": 0.2}
    """Settings of the trials: what they are judged by must not be what the repetitions are judged by."""
    by: str | None = None
    """The metric, such as loss; by default the task's main one."""


class Grid(Section):
    """All combinations of some values."""

    set: Settings = {}
    """Settings that all its points share."""
    over: Annotated[Axes, AfterValidator(_not_empty)] = {}
    """Axes: the values of a setting, or named choices of several settings each."""
    tune: Tune | None = None
    """Settings to choose for each place on the axes by trials of their own, such as learning rates."""


class Study(Section):
    """A base config, and the grids of what differs from it."""

    config: str
    """The base config, relative to this file."""
    question: str = ""
    """What the study asks, in a sentence; the report begins with it."""
    set: Settings = {}
    """Settings of all points."""
    grids: dict[str, Grid]
    """Named grids; every one is run whole."""
    repeat: str = "seed"
    """The axis whose points are repetitions of each other: means and intervals are over it."""
    compare: str | None = None
    """The axis whose choices are compared with each other, also at equal uploaded bytes."""

    @model_validator(mode="after")
    def _names_axes(self) -> "Study":
        axes = list(dict.fromkeys(axis for grid in self.grids.values() for axis in grid.over))
        for field in ("repeat", "compare"):
            axis = getattr(self, field)
            if field in self.model_fields_set and axis is not None and axis not in axes:
                raise ValueError(f"{field}: found {axis}, expected an axis: {', '.join(axes) or 'none'}")
        for name, grid in self.grids.items():
            _check_names(name, grid.over | (grid.tune.over if grid.tune else {}))
        return self


def _check_names(grid: str, over: Axes) -> None:
    """Axes are columns beside the others, and grids and choices are folders."""
    for axis in over:
        if axis in COLUMNS:
            raise ValueError(
                f"grids.{grid}: the tables have a column {axis} already; call the axis differently"
            )
    for name in (grid, *(name for values in over.values() if isinstance(values, dict) for name in values)):
        if not re.fullmatch(r"[\w+-][\w.+ -]*", name) or name.endswith(TRIALS):
            raise ValueError(
                f"grids.{grid}: found the name {name!r}, which is to be a folder; expected letters, digits and "
                f"_.+-, no dot at first and no {TRIALS} at last"
            )


class Point(NamedTuple):
    """One run of a study: its grid, its place on each axis, its whole config, and its folder below the study's.

    ``choices`` are trials among which the point's remaining settings are still to be chosen, by the metric ``by``.
    """

    grid: str
    labels: dict[str, str]
    config: Config
    name: str
    choices: tuple["Choice", ...] = ()
    by: str | None = None


class Choice(NamedTuple):
    """A trial, what it is called on the axes of the choice, and the settings that it stands for."""

    trial: Point
    labels: dict[str, str]
    settings: Settings


def load_study(path: Path, changes: Settings) -> tuple[Study, list[Point]]:
    """Reads a study and makes its points; ``changes`` go over everything else and may name axes, as ``{task}``.

    Raises:
      UserError: the file, a setting or a value is wrong, or two points of a grid are the same.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected a YAML study") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is no YAML: {str(error).splitlines()[0]}") from None
    study = checked(Study, values, str(path))
    if not study.grids:
        raise UserError(f"{path}: grids: found none, expected at least one")
    base = load_config(path.parent / study.config).model_dump()
    points = [
        point
        for name, grid in study.grids.items()
        for point in _points_of(Place(name, base, study, changes, str(path)), grid)
    ]
    trials = {choice.trial.name: choice.trial for point in points for choice in point.choices}
    _check_different([*trials.values(), *points], path)
    return study, points


def with_trials(points: Sequence[Point]) -> list[Point]:
    """All runs in the order in which they can be made: before each point its trials, every one once."""
    runs = [run for point in points for run in (*(choice.trial for choice in point.choices), point)]
    return list({run.name: run for run in runs}.values())


class Place(NamedTuple):
    """A grid's name, the base config, the study, the changes of the command line, and the study's file."""

    grid: str
    base: dict[str, Any]
    study: Study
    changes: Settings
    source: str

    def point(self, grid: str, labels: dict[str, str], settings: Settings) -> Point:
        """The run at ``labels`` with these settings on the base."""
        said = f"{self.source}: grids.{self.grid}{''.join(f', {axis} {label}' for axis, label in labels.items())}"
        over = {field: _filled(value, labels, self.source) for field, value in self.changes.items()}
        config = make_config(nested(self.base, settings | over, said), said)
        return Point(grid, labels, config, f"{grid}/{'_'.join(labels.values()) or 'run'}")


def _points_of(place: Place, grid: Grid) -> Iterator[Point]:
    shared, repeat = place.study.set | grid.set, place.study.repeat
    trials: dict[tuple[str, ...], tuple[Choice, ...]] = {}
    for labels, settings in _combinations(grid.over):
        point = place.point(place.grid, labels, shared | settings)
        if grid.tune is not None:
            cell = {axis: label for axis, label in labels.items() if axis != repeat}
            known = tuple(cell.values())
            if known not in trials:
                trials[known] = tuple(_trials(place, grid.tune, cell, shared | settings))
            point = point._replace(choices=trials[known], by=grid.tune.by)
        yield point


def _trials(place: Place, tune: Tune, cell: dict[str, str], settings: Settings) -> Iterator[Choice]:
    """Of one place on the axes; they begin from the settings of its first repetition."""
    for labels, chosen in _combinations(tune.over):
        trial = place.point(place.grid + TRIALS, cell | labels, settings | tune.set | chosen)
        yield Choice(trial, labels, chosen)


def _combinations(axes: Axes) -> Iterator[tuple[dict[str, str], Settings]]:
    """The label on each axis, and all settings that come with them."""
    choices = [[(axis, *choice) for choice in _choices(axis, values)] for axis, values in axes.items()]
    for combination in itertools.product(*choices):
        settings: Settings = {}
        for _, _, chosen in combination:
            settings |= chosen
        yield {axis: label for axis, label, _ in combination}, settings


def _choices(axis: str, values: Sequence[Any] | Mapping[str, Settings]) -> Iterator[tuple[str, Settings]]:
    if isinstance(values, Mapping):
        yield from values.items()
    else:
        for value in values:
            yield _label(value), {axis: value}


def _label(value: Any) -> str:
    """A value as part of a folder's name.

    >>> _label([0.125, 0.25]), _label("a/b"), _label(1e-3)
    ('0.125-0.25', 'a-b', '0.001')
    """
    text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "none"


def _filled(value: Any, labels: Mapping[str, str], source: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return value.format_map(labels)
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{source}: --set {value}: expected names of axes in braces: {list(labels)}"
        ) from None


def nested(base: dict[str, Any], settings: Settings, source: str) -> dict[str, Any]:
    """A copy of nested settings with others in their places.

    >>> nested({"a": {"b": 1, "c": 2}}, {"a.b": 3}, "x")
    {'a': {'b': 3, 'c': 2}}
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
    for field, value in settings.items():
        *sections, leaf = field.split(".")
        place = result
        for section in sections:
            found = place.setdefault(section, {})
            if not isinstance(found, dict):
                raise UserError(f"{source}: {field}: {section} is a value, expected a section")
            place[section] = place = dict(found)
        place[leaf] = value
    return result


def _check_different(points: Sequence[Point], path: Path) -> None:
    names: dict[str, Point] = {}
    configs: dict[str, Point] = {}
    for point in points:
        said = (
            f"{point.grid} {point.config.model_dump_json()} {[choice.settings for choice in point.choices]}"
        )
        if point.name in names:
            raise UserError(
                f"{path}: two points are named {point.name}; name the choices of an axis differently"
            )
        if said in configs:
            raise UserError(
                f"{path}: {configs[said].name} and {point.name} have the same settings; drop one, or say what differs"
            )
        names[point.name] = configs[said] = point
