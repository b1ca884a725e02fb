"""Every field of a decoder's ``config.json`` counts: it changes what is computed as in transformers, or is refused,
or is without influence there as well."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from contract import DECODERS as ROWS
from contract import KINDS, TOKENS, make_tier, make_tiny

from fslora_jax.errors import UserError
from fslora_jax.models import build_model
from fslora_jax.models.decoders import DECODERS
from fslora_jax.models.fields import Fields
from fslora_jax.types import Batch

CHANGED = {
    "hidden_act": "relu",
    "hidden_activation": "relu",
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 1.5,
    "model_type": "llama4_text",
    "sliding_window": 2,
    "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "problem_type": "regression",
    "dtype": "bfloat16",
    "rms_norm_eps": 0.1,
    "eos_token_id": 7,
    "bos_token_id": 7,
    "pad_token_id": 7,
    "id2label": {"0": "only"},
    "label2id": {"only": 0},
}
REFUSED = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "is_encoder_decoder",
    "use_bidirectional_attention",
}
"""Fields whose change is an error, here or when the weights are read: they no longer fit."""

ALSO_REFUSED = {
    "gemma3_text": {"attn_logit_softcapping"},  # declared, but its layers never apply it
    "qwen2": {"use_sliding_window"},  # off, while layer_types still has sliding ones
    "qwen3": {"layer_types"},  # sliding ones, while use_sliding_window is off
}

BEFORE_AND_BESIDE = ("initializer_range", "max_position_embeddings")
"""Read for the weights that training starts from, and for the longest text; without influence on logits."""

TORCH_ONLY = ("model_type", "return_dict", "dtype")
"""The class says the first, the second is how torch's modules answer, and model.dtype says the third."""


def change(name, value):
    if name in CHANGED:
        return CHANGED[name]
    if name == "rope_parameters":
        kinds = [value] if "rope_theta" in value else [value["sliding_attention"], value["full_attention"]]
        new = [kind | {"rope_theta": 3.0 * kind["rope_theta"]} for kind in kinds]
        return (
            new[0] if len(new) == 1 else dict(zip(["sliding_attention", "full_attention"], new, strict=True))
        )
    if isinstance(value, bool) or value is None:
        return not value
    return value + 2 if isinstance(value, int) else 1.5 * value if isinstance(value, float) else "other"


def one_row(tokens):
    n, none = len(tokens), np.zeros((1, 1, 0), int)
    ones = np.ones((1, 1, n), int)
    return Batch(tokens[None, None], ones, np.arange(n)[None, None], 0 * ones, none[0], none[0] * 1.0, none)


def ours(config, base):
    """The logits, or None where the config or the weights are refused."""
    try:
        model = build_model(config, task="causal")
    except UserError:
        return None
    shapes = jax.tree.map(np.shape, jax.eval_shape(model.init_base, jax.random.key(0)))
    if shapes != jax.tree.map(np.shape, base):
        return None
    tier = make_tier(model, {}, clients=1, k=1, scale=0.0)
    tier = tier._replace(weights=tier.weights._replace(adapter={}))
    with jax.disable_jit():  # one small run for each change: to compile would cost more
        return np.asarray(model.apply(base, [tier], one_row(TOKENS[4]))[0, 0])


def theirs(family, config, weights):
    """The logits, or None where the config or the weights are refused."""
    fields = {name: value for name, value in config.items() if name not in TORCH_ONLY}
    try:
        made = transformers.AutoConfig.for_model(family, **fields)
        hf = KINDS["causal"][0].from_config(made, attn_implementation="eager")
        hf.float().load_state_dict(weights)
    except (ValueError, RuntimeError, TypeError, KeyError):
        return None
    with torch.no_grad():
        return hf.eval()(torch.tensor(TOKENS[4])[None]).logits[0].numpy()


@pytest.mark.parametrize("family", ROWS)
def test_each_field_counts_as_in_transformers(family, tmp_path):
    tiny = make_tiny(family, "causal", tmp_path)
    weights, plain = tiny.hf.state_dict(), json.loads((tmp_path / "config.json").read_text())
    declared = plain | tiny.hf.config.to_dict()
    read = DECODERS[family].build.keywords["read"]
    reference, original = read(Fields(plain)), ours(plain, tiny.base)
    np.testing.assert_allclose(original, theirs(family, plain, weights), atol=1e-4)
    refused, idle = set(), {}
    for name, value in declared.items():
        config = plain | {name: change(name, value)}
        if name in BEFORE_AND_BESIDE or reads_alike(read, config, reference):
            idle[name] = config[name]
        elif (got := ours(config, tiny.base)) is None:
            refused.add(name)
        else:
            assert np.abs(got - original).max() > 1e-3, name
            np.testing.assert_allclose(got, theirs(family, config, weights), atol=1e-4, err_msg=name)
    # All together: transformers, too, computes the same without regard to them.
    np.testing.assert_allclose(original, theirs(family, plain | idle, weights), atol=1e-4)
    assert refused == REFUSED & set(declared) | ALSO_REFUSED.get(family, set())


def reads_alike(read, config, reference):
    """Whether the change is lost when the config is read, so that the model is the same."""
    fields = Fields(config)
    try:
        same = read(fields) == reference and config["model_type"] in DECODERS
        fields.finish()
    except UserError:
        return False
    return same


def test_equal_configs_and_options_make_one_model(tiny_of):
    """So that JAX does not trace it anew for each run of a study; it keeps nothing of a dict that changes later."""
    config = json.loads((tiny_of("llama", "causal").folder / "config.json").read_text())
    model = build_model(config, task="causal")
    assert build_model(dict(config), task="causal", remat="frozen") is model
    assert build_model(config, task="causal", remat="none") is not model
    config["rms_norm_eps"] = 0.5
    assert build_model(config, task="causal") is not model
