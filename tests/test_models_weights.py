"""Reading configs and checkpoints: what loads, and that every mistake is one line that names its cause."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from contract import SIZES
from safetensors.numpy import load_file, save_file

from fslora_jax.errors import UserError
from fslora_jax.models import build_model, load_model


def load(folder, pooling="native", **options):
    return load_model(folder, num_labels=3, pooling=pooling, **options)


def assert_same(base, other):
    assert jax.tree.structure(base) == jax.tree.structure(other)
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other), strict=True)
    )


@pytest.fixture(
    params=[(family, pooling) for family in ("bert", "roberta") for pooling in ("native", "mean")],
    ids="-".join,
)
def tiny(request, tiny_of):
    return tiny_of(*request.param)


@pytest.fixture
def edit(tiny, tmp_path):
    """A copy of the tiny checkpoint after ``config`` and ``tensors`` (both edited in place) had their say."""

    def write(config=lambda c: None, tensors=lambda t: None):
        fields = json.loads((tiny.folder / "config.json").read_text())
        weights = load_file(tiny.folder / "model.safetensors")
        config(fields)
        tensors(weights)
        (tmp_path / "config.json").write_text(json.dumps(fields))
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    return write


def error(folder, pooling="mean", **options):
    """The message of the one error that loading raises."""
    with pytest.raises(UserError) as caught:
        load(folder, pooling, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def rename(old, new):
    def change(tensors):
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def legacy_norms(tensors):
    rename("LayerNorm.weight", "LayerNorm.gamma")(tensors)
    rename("LayerNorm.bias", "LayerNorm.beta")(tensors)


OTHER_TASKS = {
    "bert": ["cls.predictions.bias", "bert.embeddings.position_ids", "qa_outputs.weight"],
    "roberta": ["lm_head.bias", "roberta.embeddings.position_ids", "roberta.pooler.dense.weight"],
}


def add_other_tasks(family):
    return lambda tensors: tensors.update({name: np.zeros(2, np.float32) for name in OTHER_TASKS[family]})


@pytest.mark.parametrize("change", ["no prefix", "legacy norms", "other tasks"])
def test_checkpoints_of_every_age_and_task_load_alike(tiny, edit, change):
    changes = {
        "no prefix": rename(f"{tiny.family}.", ""),
        "legacy norms": legacy_norms,
        "other tasks": add_other_tasks(tiny.family),
    }
    _, base = load(edit(tensors=changes[change]), tiny.kind)
    assert_same(base, tiny.base)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel", "RobertaForMaskedLM", "RobertaModel"])
def test_classes_of_transformers_load(name, tmp_path):
    config = getattr(transformers, name.partition("For")[0].removesuffix("Model") + "Config")
    getattr(transformers, name)(config(**SIZES)).save_pretrained(tmp_path)
    load(tmp_path, "mean")


def test_bfloat16_files_and_bases(tiny, tmp_path):
    copy.deepcopy(tiny.hf).to(torch.bfloat16).save_pretrained(tmp_path)
    _, base = load(tmp_path, tiny.kind, dtype="bfloat16")
    _, wide = load(tmp_path, tiny.kind)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    assert_same(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), wide)


def test_unknown_tensor(tiny, edit):
    added = f"{tiny.family}.encoder.layer.3.output.dense.bias"
    message = error(edit(tensors=lambda t: t.update({added: np.zeros(16, np.float32)})))
    assert f"unknown tensor '{added}' (1 in all)" in message and "model.safetensors" in message


def test_missing_tensor(tiny, edit):
    gone = f"{tiny.family}.encoder.layer.1.attention.self.key.bias"
    message = error(edit(tensors=lambda t: t.pop(gone)))
    assert "'encoder.layer.1.attention.self.key.bias' is missing (1 in all)" in message
    assert "take the checkpoint that config.json belongs to" in message


@pytest.mark.parametrize("tiny", [("bert", "native")], indirect=True, ids="-".join)
def test_missing_pooler_points_to_mean_pooling(tiny, edit):
    def no_pooler(tensors):
        for leaf in ("weight", "bias"):
            del tensors[f"bert.pooler.dense.{leaf}"]

    assert "set model.pooling: mean" in error(edit(tensors=no_pooler), "native")
    load(edit(tensors=no_pooler), "mean")


@pytest.mark.parametrize("twin", ["embeddings.LayerNorm.bias", "{family}.embeddings.LayerNorm.beta"])
def test_doubled_tensor(tiny, edit, twin):
    twin = twin.format(family=tiny.family)
    message = error(edit(tensors=lambda t: t.update({twin: np.zeros(16, np.float32)})))
    assert f"{twin!r}" in message and f"'{tiny.family}.embeddings.LayerNorm.bias'" in message
    assert "are the same tensor" in message


def test_wrong_shape_is_found_even_where_transposing_would_hide_it(tiny, edit):
    name = f"{tiny.family}.encoder.layer.0.intermediate.dense.weight"
    message = error(edit(tensors=lambda t: t.update({name: np.ascontiguousarray(t[name].T)})))
    assert f"{name!r} has shape (16, 24); expected (24, 16)" in message


def test_quantised_tensor(tiny, edit):
    name = f"{tiny.family}.encoder.layer.0.output.dense.weight"
    message = error(edit(tensors=lambda t: t.update({name: t[name].astype(np.int8)})))
    assert f"{name!r} holds I8; expected floats" in message


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_damaged_file(edit, keep):
    folder = edit()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path}: damaged safetensors file" in error(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_file(edit, file):
    folder = edit()
    (folder / file).unlink()
    assert f"{folder / file}: no such file" in error(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\n\n{,}"])
def test_config_that_is_no_object(edit, text):
    folder = edit()
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'}: " in error(folder)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model_type", "albert", "expected one of ['bert', 'roberta'"),
        ("model_type", 3, "expected"),
        ("hidden_act", "selu", "expected one of ['gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu', 'silu']"),
        ("position_embedding_type", "relative_key", "expected 'absolute'"),
        ("is_decoder", True, "expected False"),
        ("add_cross_attention", True, "expected False"),
        ("hidden_size", "16", "expected a positive int"),
        ("hidden_size", 15, "expected a multiple of num_attention_heads, 2"),
        ("num_hidden_layers", 0, "expected a positive int"),
        ("vocab_size", True, "expected a positive int"),
        ("layer_norm_eps", None, "expected a positive float"),
        ("layer_norm_eps", float("nan"), "expected a positive float"),
    ],
)
def test_config_value(edit, field, value, expected):
    message = error(edit(config=lambda c: c.update({field: value})))
    assert f"config.json: {field} is {value!r}; {expected}" in message


@pytest.mark.parametrize(
    "field", ["model_type", "vocab_size", "hidden_size", "intermediate_size", "layer_norm_eps", "hidden_act"]
)
def test_config_field_missing(edit, field):
    assert f"config.json: {field} is missing" in error(edit(config=lambda c: c.pop(field)))


@pytest.mark.parametrize("tiny", [("roberta", "mean")], indirect=True, ids="-".join)
def test_roberta_needs_its_padding_id(edit):
    assert "pad_token_id is missing" in error(edit(config=lambda c: c.pop("pad_token_id")))


@pytest.mark.parametrize(("option", "value"), [("pooling", "max"), ("dtype", "float64")])
def test_options(tiny, option, value):
    config = json.loads((tiny.folder / "config.json").read_text())
    options = {"num_labels": 2, "pooling": "mean"} | {option: value}
    with pytest.raises(UserError, match=rf"^model\.{option} is '{value}'; expected one of"):
        build_model(config, **options)


def test_more_layers_in_the_config_than_in_the_file(edit):
    message = error(edit(config=lambda c: c.update(num_hidden_layers=4)))
    assert "'encoder.layer.3." in message and "is missing (16 in all)" in message


def test_fewer_layers_in_the_config_than_in_the_file(edit):
    message = error(edit(config=lambda c: c.update(num_hidden_layers=2)))
    assert "unknown tensor" in message and ".encoder.layer.2." in message and "(16 in all)" in message


def test_field_that_nobody_reads(edit):
    message = error(edit(config=lambda c: c.update(rotary_dim=4)))
    assert "config.json: rotary_dim is 4, a field that" in message and "is not known to have" in message


def test_code_from_a_models_folder_is_never_run(edit):
    message = error(edit(config=lambda c: c.update(auto_map={"AutoModel": "modeling.Net"})))
    assert "config.json: auto_map asks for code from the model's folder, which is never run" in message
