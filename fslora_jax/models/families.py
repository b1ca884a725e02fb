"""The model families: what a row of this table says, plus ``config.json``, is all that sets them apart."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

import jax.numpy as jnp

from fslora_jax.errors import UserError
from fslora_jax.models.encoder import Options, encoder
from fslora_jax.models.layers import ACTIVATIONS, Config
from fslora_jax.models.model import Model, Naming


class Family(NamedTuple):
    """One ``model_type`` of Hugging Face.

    ``prefix`` is the encoder's path in a class with a task head; ``containers`` says where each top-level
    key of the base lies below it; ``ignored`` are the beginnings of tensors that a checkpoint may hold for
    other tasks. ``native_head`` and ``native_pooler`` describe the family's own classifier;
    ``after_padding`` says that position 0 is the row after ``pad_token_id``.
    """

    prefix: str
    architecture: str
    containers: dict[str, str]
    ignored: tuple[str, ...]
    native_head: tuple[str, ...]
    native_pooler: bool
    after_padding: bool


_CONTAINERS = {"embeddings": "embeddings.", "layers": "encoder.layer.{layer}.", "pooler": "pooler."}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

FAMILIES = {
    "bert": Family(
        prefix="bert.",
        architecture="Bert",
        containers=_CONTAINERS,
        ignored=("cls.", "classifier.", "qa_outputs.", "pooler.", *_BUFFERS),
        native_head=("classifier",),
        native_pooler=True,
        after_padding=False,
    ),
    "roberta": Family(
        prefix="roberta.",
        architecture="Roberta",
        containers=_CONTAINERS,
        ignored=("lm_head.", "classifier.", "qa_outputs.", "pooler.", *_BUFFERS),
        native_head=("classifier.dense", "classifier.out_proj"),
        native_pooler=False,
        after_padding=True,
    ),
}

_REQUIRED_IF_GIVEN = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def build_model(
    config: Mapping[str, Any],
    *,
    num_labels: int,
    pooling: str,
    dtype: str = "float32",
    lora_dropout: float = 0.0,
) -> Model:
    """The model of a ``config.json``, without weights.

    Args:
      config: the parsed ``config.json`` of Hugging Face.
      num_labels: outputs of the head.
      pooling: "mean" over an example's tokens, or "native", what the family's own sequence classifier does.
      dtype: of the base and of the forward pass, "float32" or "bfloat16".
      lora_dropout: rate on the input of each adapter, where ``apply`` is given keys.

    Raises:
      UserError: a field is missing, has the wrong type or a value that is not supported.
    """
    family = find_family(config)
    _check_choice("model.pooling", pooling, ("mean", "native"))
    _check_choice("model.dtype", dtype, ("float32", "bfloat16"))
    numbers = _read_config(config)
    native = pooling == "native"
    options = Options(
        num_labels=num_labels,
        pooling=pooling,
        pooler=native and family.native_pooler,
        head=family.native_head if native else ("classifier",),
        first_position=_read(config, "pad_token_id", int) + 1 if family.after_padding else 0,
        dtype=jnp.dtype(dtype),
        lora_dropout=lora_dropout,
    )
    # A linear head on a mean of tokens equals the mean of a token classifier's logits.
    task, suffix = ("SEQ_CLS", "Sequence") if native else ("TOKEN_CLS", "Token")
    architecture = f"{family.architecture}For{suffix}Classification"
    naming = Naming(family.prefix + family.containers["layers"], task, ("classifier",), architecture)
    return encoder(numbers, options, naming)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that ``model_type`` names.

    >>> find_family({"model_type": "roberta"}).prefix
    'roberta.'
    """
    model_type = _read(config, "model_type", str)
    _check_choice("config.json: model_type", model_type, tuple(FAMILIES))
    return FAMILIES[model_type]


def _read_config(config: Mapping[str, Any]) -> Config:
    for name, expected in _REQUIRED_IF_GIVEN.items():
        if config.get(name, expected) != expected:
            raise UserError(
                f"config.json: {name} is {config[name]!r}; expected {expected!r}; choose another model"
            )
    c = Config(**{name: _read(config, name, kind) for name, kind in get_type_hints(Config).items()})
    _check_choice("config.json: hidden_act", c.hidden_act, tuple(ACTIVATIONS))
    if c.hidden_size % c.num_attention_heads:
        raise UserError(
            f"config.json: hidden_size is {c.hidden_size}; "
            f"expected a multiple of num_attention_heads, {c.num_attention_heads}"
        )
    return c


def _read(config: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in config:
        raise UserError(
            f"config.json: {name} is missing; expected {kind.__name__}; take the file of the model"
        )
    value = config[name]
    kinds = (int, float) if kind is float else kind
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if good and kind is not str:
        good = math.isfinite(value) and (value > 0 or (name == "pad_token_id" and value == 0))
    if not good:
        raise UserError(f"config.json: {name} is {value!r}; expected a positive {kind.__name__}")
    return value


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{field} is {value!r}; expected one of {list(choices)}")
