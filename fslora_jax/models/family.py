"""What one family of models is to the rest of the package."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp

from fslora_jax.models.fields import Fields
from fslora_jax.models.model import Model


class Options(NamedTuple):
    """What a user decides beyond ``config.json``; the fields are those of ``build_model``."""

    task: str
    num_labels: int
    pooling: str
    dtype: jnp.dtype
    lora_dropout: float
    attention: str
    remat: str


class Family(NamedTuple):
    """One ``model_type`` of Hugging Face: how its model is built, and where its tensors lie in a file.

    ``prefix`` is the base's path in a class with a task head, ``architecture`` the beginning of such a class's
    name; ``containers`` says where each top-level key of the base lies below the prefix; ``ignored`` are the
    beginnings of tensors that a checkpoint may hold for other tasks; ``tied`` are copies of other tensors where the
    config ties a language model's output, ``absent`` what equal
    layers have in the base and files never hold, all ones. ``build(family, fields, options)`` reads
    every field that it knows; ``build_model`` refuses the others.
    """

    build: Callable[[Any, Fields, Options], Model]
    prefix: str
    architecture: str
    containers: dict[str, str]
    ignored: tuple[str, ...]
    absent: tuple[str, ...] = ()
    tied: Mapping[str, str] = MappingProxyType({})
