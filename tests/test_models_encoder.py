"""Every field of an encoder's ``config.json`` counts; sizes of real models, and MiniLM's own weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from contract import ENCODERS
from examples import (
    CONFIG,
    LENGTHS,
    PACKED,
    PADDED,
    PADDED_BY_ONE,
    TOKENS,
    logits_of,
    make_batch,
    make_tier,
    types_of,
)

from fslora_jax.errors import UserError
from fslora_jax.models import build_model, load_model
from fslora_jax.models.fields import WITHOUT_INFLUENCE

UNUSED = {
    "distilbert": {"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"},
    "modernbert": {
        *(
            "embedding_dropout",
            "mlp_dropout",
            "decoder_bias",
            "tie_word_embeddings",
            "initializer_cutoff_factor",
        ),
        "global_attn_every_n_layers",  # layer_types is there, and says it as well
        *("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index"),
    },
}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_every_field_of_the_config_counts(model_type):
    """Changed, it is refused, or it changes the weights' shapes, or else the program."""
    config = transformers.AutoConfig.for_model(model_type, **ENCODERS[model_type]).to_dict()
    batch = make_batch(model_type, PADDED)

    def program(fields):
        model = build_model(fields, num_labels=3, pooling="native")
        base = jax.eval_shape(model.init_base, jax.random.key(0))
        tier = make_tier(model, model.init_head(jax.random.key(0)), clients=1, k=1, modules=[])
        return (
            jax.tree.map(jnp.shape, base),
            model.max_length,
        ), lambda: jax.jit(model.apply).lower(base, [tier], batch).as_text()

    def other(value):
        if isinstance(value, dict):
            return value | {"more": 1}
        return not value if isinstance(value, bool) else "silu" if isinstance(value, str) else 2 * value

    longest = build_model(config, num_labels=3, pooling="native").max_length
    assert longest == (20 if model_type in PADDED_BY_ONE else 22)
    before = program(config)
    text = before[1]()
    skipped = {*WITHOUT_INFLUENCE, *UNUSED.get(model_type, ()), "model_type"}
    fields = [name for name in config if name not in skipped]
    assert len(fields) > 8
    for name in fields:
        try:
            after = program(config | {name: other(config[name])})
        except UserError as error:
            assert str(error).startswith("config.json: ") and name in str(error)
            continue
        assert after[0] != before[0] or after[1]() != text, name


def test_roberta_base_head_has_the_papers_size():
    config = CONFIG | {"model_type": "roberta", "hidden_size": 768, "pad_token_id": 1}
    head = build_model(config, num_labels=2, pooling="native").init_head(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(head)) == 592_130


def test_minilm_equals_transformers(minilm):
    hf = transformers.BertModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    model, base = load_model(minilm, num_labels=384, pooling="mean")
    identity = {"classifier": {"kernel": jnp.eye(384), "bias": jnp.zeros(384)}}
    tier = make_tier(model, identity, clients=1, k=1, modules=[])
    pooled = logits_of(model, base, [tier], make_batch("bert", PACKED))[0]
    for e, tokens in enumerate(TOKENS):
        ids, types = torch.tensor(tokens)[None], torch.tensor(types_of("bert", LENGTHS[e]))[None]
        with torch.no_grad():
            states = hf(input_ids=ids, token_type_ids=types).last_hidden_state
        np.testing.assert_allclose(pooled[e], states[0].mean(0), atol=2e-5)
