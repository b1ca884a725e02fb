"""Meshes and the rules that split base weights."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from fslora_jax.errors import UserError
from fslora_jax.models.families import build_model
from fslora_jax.sharding import AXES, RULES, base_spec, leaf_name, make_mesh

SIZES = {"clients": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("layers/linear/attention.self.query/kernel", (3, 8, 8), P(None, "fsdp", "tensor")),
        ("layers/linear/self_attn.k_proj/bias", (3, 8), P(None, "tensor")),
        ("layers/linear/attention.output.dense/kernel", (3, 8, 8), P(None, "tensor", "fsdp")),
        ("layers/linear/mlp.down_proj/kernel", (3, 16, 8), P(None, "tensor", "fsdp")),
        ("layers/linear/intermediate.dense/kernel", (3, 8, 16), P(None, "fsdp", "tensor")),
        ("layers/linear/output.dense/bias", (3, 8), P(None, None)),
        ("layers/norm/output.LayerNorm/scale", (3, 8), P(None, None)),
        ("embeddings/word_embeddings/embedding", (11, 8), P(None, "fsdp")),
        ("something/small", (3, 5), P()),
    ],
)
def test_rules(path, shape, spec):
    found = base_spec(SIZES, path, shape)
    assert tuple(found) + (None,) * (len(shape) - len(found)) == tuple(spec) + (None,) * (
        len(shape) - len(spec)
    )


def test_every_axis_of_a_rule_exists():
    assert all(axis is None or axis in AXES for _, spec in RULES for axis in spec)


@pytest.mark.parametrize(
    ("path", "shape", "said"),
    [
        (
            "layers/linear/output.dense/kernel",
            (3, 7, 8),
            r"mesh\.tensor: found 2.*output\.dense/kernel.*divisor of 7",
        ),
        (
            "layers/linear/mlp.up_proj/kernel",
            (3, 6, 8),
            r"mesh\.fsdp: found 4.*mlp\.up_proj/kernel.*divisor of 6",
        ),
        ("layers/linear/unknown/kernel", (1024, 1024), r"no rule splits layers/linear/unknown/kernel"),
    ],
)
def test_a_rule_that_does_not_apply_names_the_parameter(path, shape, said):
    with pytest.raises(UserError, match=said):
        base_spec(SIZES, path, shape)


def test_without_splitting_no_rule_is_needed():
    assert base_spec({"fsdp": 1, "tensor": 1}, "layers/linear/unknown/kernel", (1024, 1024)) == P()


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 2, 1), (1, 2, 1)])
def test_a_mesh_that_does_not_fit_the_devices(sizes):
    with pytest.raises(UserError, match=r"mesh: found clients .* there are 1 devices"):
        make_mesh(*sizes, jax.devices()[:1])


def test_one_device_needs_no_mesh():
    assert make_mesh(-1, 1, 1, jax.devices()[:1]) is None


ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "hidden_act": "gelu",
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    ("config", "pooling"), [(ROBERTA, "native"), (ROBERTA | {"model_type": "bert"}, "native")]
)
def test_the_rules_split_nearly_all_of_a_model(config, pooling):
    model = build_model(config, num_labels=2, pooling=pooling)
    whole = split = 0
    for path, leaf in jax.tree.leaves_with_path(jax.eval_shape(model.init_base, jax.random.key(0))):
        axes = set(base_spec({"fsdp": 4, "tensor": 4}, leaf_name(path), leaf.shape)) - {None}
        split, whole = (split + leaf.size, whole) if axes else (split, whole + leaf.size)
    assert whole < 0.02 * split
