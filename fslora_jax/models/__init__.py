"""Flax models with LoRA as a structural argument, and their Hugging Face weights."""

from fslora_jax.models.families import FAMILIES, build_model
from fslora_jax.models.frozen import HEAD, freeze_head
from fslora_jax.models.generate import NOTHING
from fslora_jax.models.model import Model, Naming, shifted
from fslora_jax.models.weights import class_tensors, load_model

__all__ = [
    "FAMILIES",
    "HEAD",
    "NOTHING",
    "Model",
    "Naming",
    "build_model",
    "class_tensors",
    "freeze_head",
    "load_model",
    "shifted",
]
