"""Checkpoints in files: shards, damaged indices, pickles, number formats."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import loading_peak
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fslora_jax import hub
from fslora_jax.errors import UserError
from fslora_jax.models import load_model
from fslora_jax.tensors import INDEX, WHOLE, open_checkpoint

ONE_FAMILY = pytest.mark.parametrize("tiny", [("bert", "native")], indirect=True, ids="-".join)


def load(folder, pooling, **options):
    return load_model(folder, num_labels=3, pooling=pooling, **options)[1]


def assert_same(base, other):
    assert jax.tree.structure(base) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def sharded(tiny, tmp_path):
    """The tiny checkpoint as transformers writes it in shards."""
    tiny.hf.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


@pytest.fixture
def edit_index(tmp_path):
    """Two tensors in two shards; ``change`` edits the index in place."""

    def write(change):
        shards = {f"model-0000{n}-of-00002.safetensors": name for n, name in enumerate("ab", 1)}
        for file, name in shards.items():
            save_file({name: np.ones((2, 3), np.float32)}, tmp_path / file)
        index = {"metadata": {}, "weight_map": {name: file for file, name in shards.items()}}
        change(index)
        (tmp_path / INDEX).write_text(json.dumps(index))
        return tmp_path

    return write


@ONE_FAMILY
def test_shards_load_as_one_file(tiny, sharded):
    assert_same(load(sharded, tiny.kind), tiny.base)


def test_slices_are_read_as_numpy_slices(edit_index):
    folder = edit_index(lambda index: None)
    save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "model-00001-of-00002.safetensors"
    )
    tensor = open_checkpoint(folder).tensors["a"]
    assert (tensor.shape, tensor.kind) == ((2, 3), "F32")
    np.testing.assert_array_equal(tensor.read((slice(1, 2), slice(1, 3))), [[4, 5]])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda i: i["weight_map"].update(a="model-00003-of-00002.safetensors"), "00003.* missing"),
        (lambda i: i["weight_map"].update(c="model-00001-of-00002.safetensors"), "'c' is missing"),
        (lambda i: i["weight_map"].update(b="model-00001-of-00002.safetensors"), "'b' is missing"),
        (lambda i: i["weight_map"].update(a="../model-00001-of-00002.safetensors"), "same folder"),
        (lambda i: i["weight_map"].update(a="/etc/model.safetensors"), "same folder"),
        (lambda i: i["weight_map"].update(a="..\\model.safetensors"), "same folder"),
        (lambda i: i["weight_map"].update(a="model.bin"), "same folder"),
        (lambda i: i["weight_map"].update(a=1), "no valid weight_map"),
        (lambda i: i.pop("weight_map"), "no valid weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(edit_index, change, expected):
    folder = edit_index(change)
    (folder / "model-00003-of-00002.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match=expected) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_in_two_shards_is_refused(edit_index):
    folder = edit_index(lambda index: None)
    both = {name: np.ones((2, 3), np.float32) for name in "ab"}
    save_file(both, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match=r"00002-of-00002.*tensor 'a' \(1 in all\) is not what"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for refuse in (lambda: open_checkpoint(tmp_path), lambda: hub.resolve_model(str(tmp_path))):
        with pytest.raises(UserError, match=rf"{name}: pickled .* safe_serialization=True"):
            refuse()


@ONE_FAMILY
def test_pickles_beside_safetensors_are_left_alone(tiny, tmp_path):
    tiny.hf.save_pretrained(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04.")
    assert_same(load(tmp_path, tiny.kind), tiny.base)


@ONE_FAMILY
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_is_read_into_every_other(tiny, tmp_path, stored, dtype):
    tensors = {k: v.astype(jnp.dtype(stored)) for k, v in load_file(tiny.folder / WHOLE).items()}
    save_file(tensors, tmp_path / WHOLE)
    (tmp_path / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    expected = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype(dtype), tiny.base)
    assert_same(load(tmp_path, tiny.kind, dtype=dtype), expected)


@ONE_FAMILY
@pytest.mark.parametrize("value", [1e5, np.nan])
def test_values_that_the_dtype_cannot_hold_are_told(tiny, tmp_path, value):
    tensors = load_file(tiny.folder / WHOLE)
    name = "bert.encoder.layer.1.output.dense.bias"
    tensors[name][3] = value
    save_file(tensors, tmp_path / WHOLE)
    (tmp_path / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=rf"{name}' holds values that are not finite in float16"):
        load(tmp_path, tiny.kind, dtype="float16")


def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    loading_peak.make(tmp_path, 150)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    command = [sys.executable, loading_peak.__file__, str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["model_mb"] > 100
    assert 1 <= found["ratio"] < 1.3
