"""All model families, and the model of a ``config.json``."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fslora_jax.models.encoders import ENCODERS
from fslora_jax.models.family import Family, Options
from fslora_jax.models.fields import Fields, check_choice
from fslora_jax.models.model import Model

FAMILIES: dict[str, Family] = {**ENCODERS}
"""``model_type`` of Hugging Face -> what it is here."""


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
      dtype: of the base and of the forward pass, "float32", "bfloat16" or "float16".
      lora_dropout: rate on the input of each adapter, where ``apply`` is given keys.

    Raises:
      UserError: a field is missing or unknown, has the wrong type or a value that is not supported.
    """
    family = find_family(config)
    check_choice("model.pooling", pooling, ("mean", "native"))
    check_choice("model.dtype", dtype, ("float32", "bfloat16", "float16"))
    fields = Fields(config)
    model = family.build(family, fields, Options(num_labels, pooling, jnp.dtype(dtype), lora_dropout))
    fields.finish()
    return model._replace(model_type=config["model_type"])


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that ``model_type`` names.

    >>> find_family({"model_type": "roberta"}).prefix
    'roberta.'
    """
    return FAMILIES[Fields(config).choose("model_type", FAMILIES)]
