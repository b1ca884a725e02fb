"""Tiny random models of every family, in transformers and here, and what is asked of both."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import examples
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from examples import LABELS, LENGTHS, PACKED, PADDED, TOKENS, types_of

from fslora_jax.models import Model, load_model
from fslora_jax.types import Batch, Local

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "pad_token_id": 1,
    "num_labels": 3,
}
DECODER_SIZES: dict[str, Any] = SIZES | {
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
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

# A new family is a new row of one of the next two: model_type -> the fields of its config, all those of an encoder, and
# those of a decoder that should not have their defaults.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES | {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "mpnet": SIZES,
    "distilbert": {"hidden_dim" if name == "intermediate_size" else name: n for name, n in SIZES.items()},
    "modernbert": SIZES
    | {
        "local_attention": 4,
        "global_attn_every_n_layers": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
}
DECODERS: dict[str, dict[str, Any]] = {
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
FAMILIES = ENCODERS | {family: DECODER_SIZES | fields for family, fields in DECODERS.items()}

KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "native": (transformers.AutoModelForSequenceClassification, {"pooling": "native"}),
    "mean": (transformers.AutoModelForTokenClassification, {"pooling": "mean"}),
    "causal": (transformers.AutoModelForCausalLM, {"task": "causal"}),
}
"""Kind of a head -> transformers' class, and what asks for it here."""

ROWS = [
    *((family, kind) for family in ("bert", "roberta") for kind in KINDS),
    *(("xlm-roberta", kind) for kind in ("native", "causal")),
    *((family, kind) for family in ("mpnet", "distilbert", "modernbert") for kind in ("native", "mean")),
    *((family, kind) for family in DECODERS for kind in ("native", "causal")),
    ("llama", "mean"),
]
ONE_EACH = [(family, "causal" if family in DECODERS else "native") for family in FAMILIES]
"""A row of each family: what lies below the head is the same in all of them."""

ROW_LENGTH = 12
LAYOUTS = ((PADDED, False), (PADDED, True), (PACKED, False))
"""Which examples share a row, and whether they are on its right."""


class Tiny(NamedTuple):
    """One model in both libraries; ``head`` is the checkpoint's, without a client axis."""

    family: str
    kind: str
    folder: Path
    hf: Any
    model: Model
    base: dict[str, Any]
    head: dict[str, Any]


def fields_of(family: str, kind: str) -> dict[str, Any]:
    """What a config of transformers is made from."""
    return FAMILIES[family] | ({"is_decoder": True} if kind == "causal" and family in ENCODERS else {})


def torch_model(family: str, kind: str) -> Any:
    """Random weights everywhere, also in biases and norms, whose initial values would hide a missing one."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields_of(family, kind))
    hf = KINDS[kind][0].from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for value in hf.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return hf


def make_tiny(family: str, kind: str, folder: Path) -> Tiny:
    hf = torch_model(family, kind)
    hf.save_pretrained(folder)
    model, base = load_model(folder, num_labels=SIZES["num_labels"], **KINDS[kind][1])
    return Tiny(family, kind, folder, hf, model, base, torch_head(hf, model.naming.head_modules))


def torch_head(hf: Any, modules: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The task head of a transformers model, as this package holds it."""
    head: dict[str, dict[str, Any]] = {}
    for name, value in hf.named_parameters():
        if name.startswith(modules):
            module, leaf = name.rsplit(".", 1)
            new = {"weight": "kernel", "bias": "bias"}[leaf]
            head.setdefault(module, {})[new] = jnp.asarray(value.detach().numpy().T)
    return head


@cache
def batches(family: str = "llama") -> Batch:
    """The same five examples for each client, laid out as in ``LAYOUTS``; two more examples are fillers."""
    made = [examples.make_batch(family, rows, shape=(5, ROW_LENGTH), left=left) for rows, left in LAYOUTS]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *made)


def by_example(logits: Any, batch: Batch) -> list[np.ndarray]:
    """One client's logits of each token, as those of each example."""
    return [np.asarray(logits)[np.asarray(batch.segments) == e + 1] for e in range(len(LENGTHS))]


def make_tier(model: Model, head: dict[str, Any], clients: int, k: int, scale: float) -> Local:
    """The same random factors and head for every client."""
    one = examples.make_tier(model, head, 1, k, seed=1)
    scales = jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), one.scale)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, clients, 0), one._replace(scale=scales, trains=scales))


def torch_outputs(hf: Any, tiny: Tiny) -> tuple[Any, list[np.ndarray]]:
    """The mean loss over what is asked, and the logits of each example, or of each of its tokens."""
    logits, mask = hf(**torch_inputs(tiny)).logits.double(), torch_inputs(tiny)["attention_mask"]
    if tiny.kind == "causal":
        own = [logits[e, :n] for e, n in enumerate(LENGTHS)]
        targets = torch.cat([torch.tensor(tokens[1:]) for tokens in TOKENS])
        loss = torch.nn.functional.cross_entropy(torch.cat([mine[:-1] for mine in own]), targets)
        return loss, [mine.detach().numpy() for mine in own]
    if tiny.kind == "mean":
        logits = (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)), list(logits.detach().numpy())


def torch_inputs(tiny: Tiny) -> dict[str, Any]:
    """Every example alone in its row, padded on the right."""
    mask, types = torch.zeros((2, len(LENGTHS), max(LENGTHS)), dtype=torch.long)
    ids = torch.full_like(mask, SIZES["pad_token_id"])
    for e, n in enumerate(LENGTHS):
        ids[e, :n], mask[e, :n] = torch.tensor(TOKENS[e]), 1
        types[e, :n] = torch.tensor(types_of(tiny.family, n))
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"token_type_ids": types} if tiny.family == "bert" else {})
