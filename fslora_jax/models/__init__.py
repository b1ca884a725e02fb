"""Flax models with LoRA as a structural argument, and their Hugging Face weights."""

from fslora_jax.models.families import FAMILIES, build_model
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.weights import load_model

__all__ = ["FAMILIES", "Model", "Naming", "build_model", "load_model"]
