"""All model families, and the model of a ``config.json``."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from fslora_jax.models.attention import ATTENTIONS
from fslora_jax.models.decoders import DECODERS
from fslora_jax.models.encoders import ENCODERS
from fslora_jax.models.family import Family, Options
from fslora_jax.models.fields import Fields, check_choice
from fslora_jax.models.model import Model
from fslora_jax.models.modern import MODERN
from fslora_jax.models.quantise import QUANTISATIONS, quantise
from fslora_jax.models.stack import REMAT

FAMILIES: dict[str, Family] = {**ENCODERS, **MODERN, **DECODERS}
"""``model_type`` of Hugging Face -> what it is here."""

HEADS = ("num_attention_heads", "n_heads")
"""What ``config.json`` calls the number of attention heads."""


def build_model(
    config: Mapping[str, Any],
    *,
    num_labels: int = 0,
    pooling: str = "native",
    task: str = "sequence",
    dtype: str = "float32",
    lora_dropout: float = 0.0,
    attention: str = "auto",
    remat: str = "frozen",
    quantization: str = "none",
) -> Model:
    """The model of a ``config.json``, without weights; for equal arguments the same object.

    Args:
      config: the parsed ``config.json`` of Hugging Face.
      num_labels: outputs of the head; a language model has none.
      pooling: "mean" over an example's tokens, or "native", what the family's own sequence classifier does.
      task: "sequence", to classify examples, or "causal", to predict next tokens.
      dtype: of the base and of the forward pass, "float32", "bfloat16" or "float16".
      lora_dropout: rate on the input of each adapter, where ``apply`` is given keys.
      attention: "xla", "cudnn" (on a GPU, in bfloat16), or "auto", the faster one of the two that can be had.
      remat: what the backward pass computes anew: "none", all but the products with "frozen" weights, or "full".
      quantization: of the layers' frozen linear modules, "none", "int8" or "nf4".

    Raises:
      UserError: a field is missing or unknown, has the wrong type or a value that is not supported.
    """
    find_family(config)
    check_choice("model.pooling", pooling, ("mean", "native"))
    check_choice("model.task", task, ("sequence", "causal"))
    check_choice("model.dtype", dtype, ("float32", "bfloat16", "float16"))
    check_choice("model.attention", attention, ATTENTIONS)
    check_choice("model.remat", remat, REMAT)
    check_choice("model.quantization", quantization, ("none", *QUANTISATIONS))
    options = Options(task, num_labels, pooling, jnp.dtype(dtype), lora_dropout, attention, remat)
    return _built(json.dumps(config), jax.default_backend(), options, quantization)


@lru_cache(maxsize=32)  # the same functions for every run of a study, so that JAX does not trace them anew
def _built(config_json: str, _backend: str, options: Options, quantization: str) -> Model:
    """The backend counts, since a model's functions may ask for it when they are traced."""
    config = json.loads(config_json)
    family, fields = find_family(config), Fields(config)
    model = family.build(family, fields, options)
    fields.finish()
    heads = next((config[name] for name in HEADS if name in config), 1)
    model = model._replace(model_type=config["model_type"], heads=heads)
    return model if quantization == "none" else quantise(model, quantization)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that ``model_type`` names.

    >>> find_family({"model_type": "roberta"}).prefix
    'roberta.'
    """
    return FAMILIES[Fields(config).choose("model_type", FAMILIES)]
