"""The parts of a decoder apart, sizes of real models, and what next tokens are worth."""

import functools
import re
import shutil

import jax
import numpy as np
import pytest
import transformers
from contract import DECODER_SIZES, batches, make_tier, make_tiny
from safetensors.numpy import load_file, save_file

from fslora_jax import lora
from fslora_jax.errors import UserError
from fslora_jax.models import build_model, load_model, rope, scores
from fslora_jax.models.decoders import DECODERS
from fslora_jax.models.fields import Fields

LLAMA_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_llama_3b_has_the_papers_size():
    model = build_model(LLAMA_3B, task="causal", dtype="bfloat16")
    names = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert lora.rank_unit({p: t for p, t in model.modules.items() if p.split(".")[1] in names}) == 1_032_192
    abstract = jax.eval_shape(model.init_base, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 3_212_749_824


@functools.cache
def small():
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.3,
        "head_dim": 4,
    } | DECODER_SIZES
    model = build_model(config, task="causal")
    return model, jax.jit(model.init_base)(jax.random.key(0)), make_tier(model, {}, 3, 2, 1.0)


def test_score_in_pieces_equals_that_of_the_whole(monkeypatch):
    model, base, tier = small()

    def run():
        def loss(weights, batch):
            result = model.score(base, [tier._replace(weights=weights)], batch)
            return result.loss.sum(), result

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(tier.weights, batches()).compile()
        return compiled(tier.weights, batches()), compiled.as_text()

    whole, text = run()
    rows = batches().places.shape
    assert re.search(rf"f32\[{rows[0]},{rows[1]},{rows[2]},50\]", text)
    monkeypatch.setattr(scores, "PIECE_BYTES", 4 * 50 * rows[0] * rows[1] * 5)
    pieces, text = run()
    assert not re.search(rf"f32\[{rows[0]},{rows[1]},{rows[2]},50\]", text), "the logits of the whole cohort"
    for a, b in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_rotations_equal_transformers_for_long_texts():
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
        transformers.LlamaConfig(**{k: v for k, v in LLAMA_3B.items() if k != "model_type"})
    )
    c = DECODERS["llama"].build.keywords["read"](Fields(LLAMA_3B))
    got = rope.frequencies(c.layers[0].rope, c.head_dim)
    np.testing.assert_allclose(got, rotary.inv_freq.numpy(), rtol=1e-6)


def test_numbers_that_old_files_hold_beside_weights_are_passed_over(tmp_path):
    """Llama's first checkpoints carry the rotations' frequencies in every layer."""
    tiny = make_tiny("llama", "causal", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for layer in range(len(tiny.hf.model.layers)):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, path, {"format": "pt"})
    _, base = load_model(tmp_path, num_labels=0, task="causal")
    jax.tree.map(np.testing.assert_array_equal, base, tiny.base)


def test_a_tied_config_beside_another_output_matrix_is_refused(tmp_path):
    """A copy of the embeddings, as some files hold one, is fine; for a classifier it does not matter at all."""
    config = transformers.LlamaConfig(**DECODER_SIZES, head_dim=4, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.copy()}, tmp_path / "model.safetensors")
    load_model(tmp_path, task="causal")
    other = table.copy()
    other[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"lm_head.weight' is not a copy of 'model.embed_tokens.weight'.*false"
    ):
        load_model(tmp_path, task="causal")
    load_model(tmp_path, num_labels=2)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_so_is_an_encoders(tiny_of, tmp_path, leaf):
    tiny = tiny_of("roberta", "causal")
    tensors = load_file(tiny.folder / "model.safetensors")
    original = {"weight": "roberta.embeddings.word_embeddings.weight", "bias": "lm_head.bias"}[leaf]
    other = {f"lm_head.decoder.{leaf}": tensors[original] + 1}
    save_file(tensors | other, tmp_path / "model.safetensors")
    shutil.copy(tiny.folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=rf"lm_head.decoder.{leaf}' is not a copy of '{original}'"):
        load_model(tmp_path, task="causal")
