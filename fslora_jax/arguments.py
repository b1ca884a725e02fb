"""Command-line arguments: dataclasses read by tyro, and a config file whose every setting is an argument."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import BaseModel

from fslora_jax.config import Config, DataConfig, ModelConfig, load_config, make_config
from fslora_jax.errors import UserError
from fslora_jax.settings import suggest

Option = tuple[Any, Any]
"""An argument's described type, and its default as a dataclass field."""


def read_mapping(args: Sequence[str]) -> Any:
    """A mapping as in the config file, such as ``{momentum: 0.9}``."""
    try:
        return yaml.safe_load(args[0])
    except yaml.YAMLError as error:
        raise ValueError(f"{args[0]} is no YAML") from error


def plain(value: Any) -> Any:
    """A mapping with the sections in it as mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value


# tyro itself would take a mapping's present keys for all there are.
MAPPING = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="YAML",
    instance_from_str=read_mapping,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [yaml.safe_dump(plain(value), default_flow_style=True).strip()],
)


def mirrored_fields(
    default: BaseModel, short: Mapping[str, str] = {}, prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Names, described types and defaults of a config's settings, for plain dataclasses.

    ``short`` has further arguments of some, by their dotted names from ``prefix`` on.
    tyro reads types and help from these; the rules are checked once, by `make_config`, with one-line errors.
    """
    fields = []
    for name, info in type(default).model_fields.items():
        value = getattr(default, name)
        if isinstance(value, BaseModel):
            doc = {"__doc__": type(value).__doc__}
            section = dataclasses.make_dataclass(
                type(value).__name__, mirrored_fields(value, short, f"{prefix}{name}."), namespace=doc
            )
            fields.append((name, section, dataclasses.field(default_factory=section)))
        else:
            extra = (MAPPING,) if isinstance(value, dict) else ()
            # --SETTING VALUE also where it is True or False.
            aliases = [short[prefix + name]] if prefix + name in short else None
            described = tyro.conf.arg(help=info.description, aliases=aliases)
            marks = (described, tyro.conf.FlagConversionOff, *extra)
            described = Annotated[info.annotation, *marks]
            fields.append((name, described, dataclasses.field(default_factory=lambda value=value: value)))
    return fields


def parse(form: type, prog: str, description: str, argv: Sequence[str]) -> Any:
    """Reads arguments into ``form``; an unknown one is a one-line error with a suggestion."""
    values, unknown = tyro.cli(
        form,
        prog=prog,
        description=description,
        args=list(argv),
        return_unknown_args=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if unknown:
        name = unknown[0].lstrip("-").replace("-", "_")
        named = unknown[0].startswith("--")
        hint = suggest(name, list(option_names(form))) if named else f"; see {prog} --help"
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    return values


def option_names(form: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all arguments that ``form`` takes."""
    for field in dataclasses.fields(form):
        yield prefix + field.name
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from option_names(field.type, f"{prefix}{field.name}.")


def option(kind: Any, default: Any, help: str) -> Option:
    """An argument of a command beside the settings."""
    return Annotated[kind, tyro.conf.arg(help=help)], dataclasses.field(default_factory=lambda: default)


def parse_config(
    command: str, description: str, argv: Sequence[str], short: Mapping[str, str] = {}, **options: Option
) -> tuple[Config, Path, dict[str, Any]]:
    """Reads ``CONFIG.yaml [--OPTION VALUE] [--SETTING VALUE]``: the config, its path, the values of ``options``.

    ``short``: further arguments of some settings, such as ``{"data.task": "--task"}``.
    """
    given = bool(argv) and not argv[0].startswith("-")
    if not given and not {"-h", "--help"} & set(argv):
        usage = " ".join(f"[--{name.replace('_', '-')} VALUE]" for name in options)
        raise UserError(
            f"{command}: no config file; expected fslora {command} CONFIG.yaml {usage} [--SETTING VALUE]"
        )
    path = Path(argv[0]) if given else Path("CONFIG.yaml")
    placeholder = Config(model=ModelConfig(name="MODEL"), data=DataConfig(name="DATA"))
    defaults = load_config(path) if given else placeholder
    fields = [(name, *described) for name, described in options.items()] + mirrored_fields(defaults, short)
    form = dataclasses.make_dataclass("Arguments", fields)
    args = parse(form, f"fslora {command} {path}", description, argv[1:] if given else argv)
    values = dataclasses.asdict(args)
    chosen = {name: values.pop(name) for name in options}
    return make_config(values, "settings"), path, chosen
