"""A tiny Llama as a GGUF file, written by the format's own package."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quantize
from tokenizers import pre_tokenizers

NAME = "tiny.gguf"
WIDTH, HEADS, KV_HEADS, WIDE, LAYERS = 64, 4, 2, 128, 2
MERGES = ["h e", "l l", "he ll", "Ġ w", "o r", "Ġw or", "1 2", "Ġ 1"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", "<|start|>", "<user>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
METADATA = {
    "context_length": 128,
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "feed_forward_length": WIDE,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "rope.dimension_count": WIDTH // HEADS,
    "vocab_size": len(TOKENS),
}


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights in float32."""
    keys = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for n in range(LAYERS):
        shapes |= {
            f"blk.{n}.attn_norm": (WIDTH,),
            f"blk.{n}.ffn_norm": (WIDTH,),
            f"blk.{n}.attn_q": (WIDTH, WIDTH),
            f"blk.{n}.attn_k": (keys, WIDTH),
            f"blk.{n}.attn_v": (keys, WIDTH),
            f"blk.{n}.attn_output": (WIDTH, WIDTH),
            f"blk.{n}.ffn_gate": (WIDE, WIDTH),
            f"blk.{n}.ffn_up": (WIDE, WIDTH),
            f"blk.{n}.ffn_down": (WIDTH, WIDE),
        }
    return {
        f"{name}.weight": np.float32(0.1) * rng.normal(size=s).astype(np.float32)
        for name, s in shapes.items()
    }


def write(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    kinds: tuple[Type, ...] = (Type.Q4_1, Type.Q8_0, Type.F16, Type.F32),
    split: str = "smollm",
    bos: bool = False,
) -> Path:
    """Matrices take ``kinds`` in turn, vectors are float32; ``metadata`` changes what is said of ``llama``."""
    writer = GGUFWriter(path, architecture)
    for key, value in (METADATA | (metadata or {})).items():
        if value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 4] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(bos)
    made = tensors(np.random.default_rng(0)) | (extra or {})
    for n, (name, value) in enumerate(made.items()):
        kind = kinds[n % len(kinds)] if value.ndim > 1 else Type.F32
        writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
