"""What a study consists of: grids over settings, and the runs that they make up."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import field_validator

from fslora_jax.config import Config, load_config, make_config
from fslora_jax.errors import UserError
from fslora_jax.settings import Section, checked

Settings = dict[str, Any]
"""Dotted names of settings, such as ``federation.num_rounds``, with their values."""


class Grid(Section):
    """All combinations of some values."""

    set: Settings = {}
    """Settings that all its points share."""
    over: dict[str, list[Any] | dict[str, Settings]] = {}
    """Axes: the values of a setting, or named choices of several settings each."""

    @field_validator("over")
    @classmethod
    def _not_empty(cls, over: dict[str, Any]) -> dict[str, Any]:
        for axis, values in over.items():
            if not values:
                raise ValueError(f"{axis} has no values; name at least one, or leave the axis out")
        return over


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


class Point(NamedTuple):
    """One run of a study: its grid, its place on each axis, and its whole config."""

    grid: str
    labels: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """Where its run folder is, below the study's."""
        return f"{self.grid}/{'_'.join(self.labels.values()) or 'run'}"


def load_study(path: Path, changes: Settings) -> tuple[Study, list[Point]]:
    """Reads a study and makes its points; ``changes`` go over everything else and may name axes, as ``{task}``.

    Raises:
      UserError: the file, a setting or a value is wrong, or two points are the same.
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
        for point in _points_of(name, grid, base, study.set, changes, str(path))
    ]
    _check_different(points, path)
    return study, points


def _points_of(
    name: str, grid: Grid, base: dict[str, Any], shared: Settings, changes: Settings, source: str
) -> Iterator[Point]:
    axes = [[(axis, *choice) for choice in _choices(axis, values)] for axis, values in grid.over.items()]
    for combination in itertools.product(*axes):
        labels = {axis: label for axis, label, _ in combination}
        settings: Settings = shared | grid.set
        for _, _, chosen in combination:
            settings |= chosen
        settings |= {field: _filled(value, labels, source) for field, value in changes.items()}
        said = f"{source}: grids.{name}{''.join(f', {axis} {label}' for axis, label in labels.items())}"
        yield Point(name, labels, make_config(nested(base, settings, said), said))


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
        said = point.config.model_dump_json()
        if point.name in names:
            raise UserError(
                f"{path}: two points are named {point.name}; name the choices of an axis differently"
            )
        if said in configs:
            raise UserError(
                f"{path}: {configs[said].name} and {point.name} have the same settings; drop one, or say what differs"
            )
        names[point.name] = configs[said] = point
