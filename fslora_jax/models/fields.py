"""``config.json``, read strictly: a field is read, or has no influence here, or is refused."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from fslora_jax.errors import UserError

T = TypeVar("T")

REMOTE_CODE = "auto_map"

WITHOUT_INFLUENCE = (
    # Where it comes from, and how it is stored: the dtype is model.dtype's.
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "torchscript"),
    # Tokens, labels and problems are the data's.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    # Dropout of the base, which is frozen and runs as in evaluation.
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "classifier_dropout"),
    # How a program runs it, not what it computes.
    *("use_cache", "cache_implementation", "output_past"),
    *("gradient_checkpointing", "chunk_size_feed_forward"),
    *("output_attentions", "output_hidden_states", "return_dict", "initializer_range"),
)
"""Fields that any ``config.json`` may hold and that change nothing of what is computed here."""


class Fields:
    """The fields of one ``config.json``, or of an object in it; ``finish`` refuses those that nobody asked for.

    >>> fields = Fields({"hidden_size": 16, "use_cache": True, "head_dim": None})
    >>> fields.read("hidden_size", int), fields.read("head_dim", int, 8)
    (16, 8)
    >>> fields.finish()
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        if REMOTE_CODE in values:
            raise UserError(
                f"config.json: {REMOTE_CODE} asks for code from the model's folder, which is never run; "
                "choose a model that needs none"
            )
        self.values = values
        self.prefix = prefix
        self.asked = {"model_type", *WITHOUT_INFLUENCE}

    def read(self, name: str, kind: type[T], default: T | None = None, *, zero: bool = False) -> T:
        """The field's value: a bool, a word, an object, or a positive number (``zero`` admits 0).

        A field that is missing or null has the default.

        Raises:
          UserError: it is missing and has no default, or is of another kind.
        """
        self.asked.add(name)
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        self._check_there(name, kind.__name__)
        return checked(self.prefix + name, value, kind, zero)

    def optional(self, name: str, kind: type[T], *, there: bool = False) -> T | None:
        """As ``read``, but None where the field is null, or missing unless it must be ``there``."""
        self.asked.add(name)
        if there:
            self._check_there(name, f"{kind.__name__} or null")
        return None if self.values.get(name) is None else self.read(name, kind)

    def child(self, name: str) -> "Fields | None":
        """An object inside, to be read as strictly; None where it is missing or null."""
        values = self.optional(name, dict)
        return None if values is None else Fields(values, f"{self.prefix}{name}.")

    def choose(self, name: str, choices: Iterable[str], default: str | None = None) -> str:
        """A field that is one of several words."""
        value = self.read(name, str, default)
        check_choice(f"config.json: {self.prefix}{name}", value, choices)
        return value

    def require(self, **expected: Any) -> None:
        """Refuses a field that is there, not null and of another value."""
        for name, value in expected.items():
            self.asked.add(name)
            if self.values.get(name) not in (None, value):
                raise UserError(
                    f"config.json: {self.prefix}{name} is {self.values[name]!r}; expected {value!r}; "
                    "choose another model"
                )

    def fill(self, form: type[T], renamed: Mapping[str, str], given: Mapping[str, Any]) -> T:
        """A NamedTuple whose every attribute is a required field, perhaps ``renamed`` in the file, or ``given``."""
        kinds = {name: kind for name, kind in get_type_hints(form).items() if name not in given}
        return form(
            **given, **{name: self.read(renamed.get(name, name), kind) for name, kind in kinds.items()}
        )

    def ignore(self, *names: str) -> None:
        """Fields of this family that change nothing of what is computed here."""
        self.asked.update(names)

    def finish(self) -> None:
        """Refuses fields that were neither read nor are known to be without influence."""
        left = sorted(set(self.values) - self.asked)
        if left:
            raise UserError(
                f"config.json: {self.prefix}{left[0]} is {self.values[left[0]]!r}, a field that "
                "this kind of model is not known to have; choose another model"
            )

    def _check_there(self, name: str, kind: str) -> None:
        if name not in self.values:
            raise UserError(
                f"config.json: {self.prefix}{name} is missing; expected {kind}; take the file of the model"
            )


def checked(name: str, value: Any, kind: type, zero: bool = False) -> Any:
    """``value`` if it is of this kind; numbers are finite and positive."""
    kinds = (int, float) if kind is float else kind
    good = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if good and kind in (int, float):
        good = math.isfinite(value) and (value > 0 or (zero and value == 0))
    if not good:
        adjective = "positive " if kind in (int, float) else ""
        raise UserError(f"config.json: {name} is {value!r}; expected a {adjective}{kind.__name__}")
    return value


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a word that is none of the choices."""
    if value not in choices:
        raise UserError(f"{field} is {value!r}; expected one of {list(choices)}")
