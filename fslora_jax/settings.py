"""What settings are: strict sections with described fields, whose mistakes are told in one line."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fslora_jax.errors import UserError

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True
    )


S = TypeVar("S", bound=Section)


def known_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings, those of inner sections included; ``*`` is any name that a user gives."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        inner, given = field.annotation, ""
        if get_origin(inner) is dict:
            inner, given = get_args(inner)[1], "*."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += known_fields(inner, f"{prefix}{name}.{given}")
    return names


def suggest(name: str, known: Sequence[str]) -> str:
    """``; did you mean ...?`` for a misspelt name, or all that there are.

    >>> suggest("num_rounds", ["seed", "federation.num_rounds"])
    '; did you mean federation.num_rounds?'
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"


def one_line(error: ValidationError, form: type[BaseModel]) -> str:
    """The first mistake of a pydantic error as ``field: found, expected``, and how many more there are."""
    # A misspelt name before what is missing for it.
    found = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    first, *rest = found
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown setting {field}{suggest(field, [named(name, first['loc']) for name in known_fields(form)])}"
    elif first["type"] == "missing":
        text = f"{field}: missing; add it to the config"
    elif first["type"] == "value_error":
        text = f"{field + '.' if field else ''}{first.get('ctx', {})['error']}"
    else:
        text = f"{field}: found {first['input']!r}; {first['msg'][0].lower() + first['msg'][1:]}"
    return text + (f" (and {len(rest)} more)" if rest else "")


def named(known: str, place: Sequence[int | str]) -> str:
    """A known setting with the names that a user gives, those of a ``place``.

    >>> named("devices.*.gflops", ("devices", "phone", "gflop"))
    'devices.phone.gflops'
    """
    parts = zip_longest(known.split("."), place)
    return ".".join(
        str(there if part == "*" and there is not None else part) for part, there in parts if part
    )


def checked(form: type[S], values: Any, source: str) -> S:
    """Checks nested values against a schema.

    Raises:
      UserError: one line with ``source``, the field, what was found and what was expected.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: found {type(values).__name__}, expected a mapping of settings")
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {one_line(error, form)}") from None


@cache  # to make a class takes pydantic a tenth of a second where many modules are loaded
def options_of(function: Callable[..., Any]) -> type[Section]:
    """The keyword-only arguments of a function as a schema, with their types, rules and defaults."""
    arguments = inspect.signature(function).parameters.values()
    fields: dict[str, Any] = {
        a.name: (a.annotation, a.default) for a in arguments if a.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return create_model(function.__name__, __base__=Section, **fields)
