"""Tiny random models of every decoder family, in transformers and here, and what is asked of both."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fslora_jax.models import Model, load_model
from fslora_jax.types import Batch, Local, Pair, Trainable

SIZES = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {"head_dim": 4, "sliding_window": 3, "query_pre_attn_scalar": 5, "final_logit_softcapping": 3.0}

# A new family is a new row: model_type -> the fields of its config that should not have their defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 3, "head_dim": 6, "tie_word_embeddings": True},
    "qwen2": {
        "hidden_size": 16,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    },
    "qwen3": {"head_dim": 6, "attention_bias": True},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0},
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}
CLASSES = {
    "sequence": transformers.AutoModelForSequenceClassification,
    "causal": transformers.AutoModelForCausalLM,
}
ROWS = [(family, task) for family in FAMILIES for task in CLASSES]

LENGTHS = (7, 3, 5, 4, 10)
LABELS = (0, 2, 1, 1, 0)
LAYOUTS = ("right-padded", "left-padded", "packed")
PACKED = ([0, 1], [2, 3], [4])
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(3, 50, n) for n in LENGTHS]
ROW_LENGTH = 12


class Tiny(NamedTuple):
    """One model in both libraries; ``head`` is the checkpoint's, without a client axis."""

    family: str
    task: str
    folder: Path
    hf: Any
    model: Model
    base: dict[str, Any]
    head: dict[str, Any]


def torch_model(family: str, task: str, fields: dict[str, Any]) -> Any:
    """Random weights everywhere, also in biases and norms, whose initial values would hide a missing one."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | fields)
    hf = CLASSES[task].from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for value in hf.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return hf


def make_tiny(family: str, task: str, folder: Path) -> Tiny:
    hf = torch_model(family, task, FAMILIES[family])
    hf.save_pretrained(folder)
    model, base = load_model(folder, num_labels=SIZES["num_labels"], task=task)
    kernel = jnp.asarray(hf.score.weight.detach().numpy().T) if task == "sequence" else None
    return Tiny(
        family, task, folder, hf, model, base, {} if kernel is None else {"score": {"kernel": kernel}}
    )


@cache
def batches() -> Batch:
    """The same five examples for each client, laid out as in ``LAYOUTS``; two more examples are fillers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make_batch, LAYOUTS))


def make_batch(layout: str) -> Batch:
    rows = PACKED if layout == "packed" else [[e] for e in range(5)]
    tokens, segments, positions, types = np.zeros((4, 5, ROW_LENGTH), np.int32)
    places = np.full((5, ROW_LENGTH), -1, np.int32)
    for b, row in enumerate(rows):
        end = ROW_LENGTH if layout == "left-padded" else sum(LENGTHS[e] for e in row)
        start, asked = end - sum(LENGTHS[e] for e in row), 0
        for e in row:
            here = slice(start, start := start + LENGTHS[e])
            tokens[b, here], segments[b, here], positions[b, here] = TOKENS[e], e + 1, np.arange(LENGTHS[e])
            places[b, asked : (asked := asked + LENGTHS[e] - 1)] = np.arange(here.start, here.stop - 1)
    labels, weights = np.resize(LABELS, 7), (np.arange(7) < 5).astype(np.float32)
    return Batch(tokens, segments, positions, types, labels, weights, places)


def by_example(logits: Any, batch: Batch) -> list[np.ndarray]:
    """One client's logits of each token, as those of each example."""
    return [np.asarray(logits)[np.asarray(batch.segments) == e + 1] for e in range(len(LENGTHS))]


def make_tier(model: Model, head: dict[str, Any], clients: int, k: int, scale: float) -> Local:
    """The same random factors and head for every client."""
    rng = np.random.default_rng(1)

    def alike(leaf: Any) -> jax.Array:
        return jnp.stack([jnp.asarray(leaf, jnp.float32)] * clients)

    adapter = {
        p: Pair(*(alike(rng.normal(size=(t.layers, k, n), scale=0.2)) for n in (t.i, t.o)))
        for p, t in model.modules.items()
    }
    scales = {p: alike(np.full((t.layers, k), scale)) for p, t in model.modules.items()}
    return Local(Trainable(adapter, jax.tree.map(alike, head)), scales, scales, {})


def torch_outputs(hf: Any, task: str) -> tuple[Any, list[np.ndarray]]:
    """The mean loss over what is asked, and the logits of each example, or of each of its tokens."""
    mask = torch.tensor([[float(i < n) for i in range(max(LENGTHS))] for n in LENGTHS])
    ids = torch.zeros(mask.shape, dtype=torch.long)
    for e, tokens in enumerate(TOKENS):
        ids[e, : len(tokens)] = torch.tensor(tokens)
    logits = hf(input_ids=ids, attention_mask=mask).logits
    if task == "sequence":
        return torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)), list(logits.detach().numpy())
    own = [logits[e, :n] for e, n in enumerate(LENGTHS)]
    targets = torch.cat([torch.tensor(tokens[1:]) for tokens in TOKENS])
    loss = torch.nn.functional.cross_entropy(torch.cat([mine[:-1] for mine in own]), targets)
    return loss, [mine.detach().numpy() for mine in own]
