"""Llama-type models in GGUF files, under the names and in the order of rows that Hugging Face has."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fslora_jax.errors import UserError
from fslora_jax.gguf import Gguf, Stored, read_gguf
from fslora_jax.tensors import Checkpoint, Slices, Tensor

FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Metadata below ``llama.`` -> field of ``config.json``."""

IMPLIED = ("vocab_size", "rope.dimension_count", "attention.value_length")
"""Metadata below ``llama.`` that repeats what tensors or other fields say."""

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a module -> Hugging Face's, inside a layer or outside."""


def open_gguf(path: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The fields of ``config.json`` that a file implies, and its tensors, not read yet.

    Raises:
      UserError: the file is damaged, of another architecture, or holds what Llama does not have.
    """
    gguf = read_gguf(path)
    config = read_config(gguf)
    tensors = [_tensor(name, stored, config) for name, stored in gguf.tensors.items()]
    return config, Checkpoint(path, {tensor.name: tensor for tensor in tensors})


def read_config(gguf: Gguf) -> dict[str, Any]:
    """``config.json`` from a file's metadata."""
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{gguf.path}: its architecture is {architecture!r}; only 'llama' is supported")
    said = {k.removeprefix("llama."): v for k, v in gguf.metadata.items() if k.startswith("llama.")}
    if unknown := sorted(set(said) - {*FIELDS, *IMPLIED}):
        raise UserError(
            f"{gguf.path}: llama.{unknown[0]} is {said[unknown[0]]!r}, which is not supported; "
            "take the safetensors model"
        )
    config = {field: said[key] for key, field in FIELDS.items() if key in said}
    if missing := [key for key, field in FIELDS.items() if field != "head_dim" and key not in said]:
        raise UserError(f"{gguf.path}: llama.{missing[0]} is missing; fetch the file again")
    head_dim = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if said.get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(
            f"{gguf.path}: llama.rope.dimension_count is {said['rope.dimension_count']}; "
            f"expected that of a head, {head_dim}"
        )
    if "token_embd.weight" not in gguf.tensors:
        raise UserError(f"{gguf.path}: tensor 'token_embd.weight' is missing; fetch the file again")
    return config | {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }


def _tensor(name: str, stored: Stored, config: dict[str, Any]) -> Tensor:
    """One tensor under Hugging Face's name; one that has none there keeps its own, to be refused later."""
    block, _, inside = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("", "", name)
    module, _, leaf = inside.rpartition(".")
    prefix = f"model.layers.{block}." if block else ""
    full = f"{prefix}{MODULES[module]}.{leaf}" if module in MODULES else name
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(module)
    fits = heads is not None and stored.shape[0] == config[heads] * config["head_dim"]
    order = half_rotation_rows(stored.shape[0], config[heads]) if heads and fits else None
    return Tensor(stored.path, full, stored.shape, stored.kind, partial(_read, stored, order))


def half_rotation_rows(rows: int, heads: int) -> np.ndarray:
    """Where GGUF keeps each row of queries or keys, which rotate in pairs (0, 1), (2, 3), ... there.

    Hugging Face rotates coordinate n with n + d/2.

    >>> half_rotation_rows(8, heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _read(stored: Stored, order: np.ndarray | None, index: Slices) -> np.ndarray:
    rows = index[0] if order is None else order[index[0]]
    return stored.read(rows)[:, *index[1:]]
