"""Packed kernels: values against loops, error bounds, bytes, and models that compute as with the restored values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from made_gguf import NAME, TOKENS, write
from test_models_smollm import PLAIN, batch_of

from fslora_jax import lora
from fslora_jax.errors import UserError
from fslora_jax.models import load_model
from fslora_jax.models.quantise import BLOCK, LEVELS, QUANTISATIONS, restore
from fslora_jax.types import Local, Trainable

FORMATS = list(QUANTISATIONS)
KERNEL = np.random.default_rng(0).normal(size=(2, 128, 5)).astype(np.float32)
KERNEL[1, :, 3] = 0.0

ONE_FAMILY = pytest.mark.parametrize("tiny", [("bert", "mean")], indirect=True, ids="-".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / NAME).parent


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder, task="causal")


def kernels(base):
    return {path: module["kernel"] for path, module in base["layers"]["linear"].items()}


def back(packed):
    return np.asarray(restore(packed, jnp.float32))


def loop_int8(column):
    """Every number rounded to a step of the column's own."""
    step = np.abs(column).max() / np.float32(127)
    return [step * np.round(value / step) if step else 0.0 for value in column]


def loop_nf4(column):
    """Every number replaced by the nearest level of its block."""
    for block in column.reshape(-1, BLOCK):
        most = np.abs(block).max()
        yield from (most * min(LEVELS, key=lambda level: abs(value - most * level)) for value in block)


@pytest.mark.parametrize(("name", "loop"), [("int8", loop_int8), ("nf4", loop_nf4)])
def test_values_are_those_of_a_loop(name, loop):
    found = back(QUANTISATIONS[name].pack(jnp.asarray(KERNEL)))
    columns = KERNEL.swapaxes(1, 2).reshape(-1, KERNEL.shape[1])
    expected = np.array([list(loop(column)) for column in columns]).reshape(2, 5, -1).swapaxes(1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_stay_within_half_a_step(name):
    """A step of int8 is 1/127 of a column's largest value; the widest of nf4 0.304 of a block's."""
    error = np.abs(back(QUANTISATIONS[name].pack(jnp.asarray(KERNEL))) - KERNEL)
    rows = {"int8": KERNEL.shape[1], "nf4": BLOCK}[name]
    largest = np.abs(KERNEL).reshape(2, -1, rows, 5).max(2)
    steps = {"int8": 1 / 127, "nf4": max(np.diff(LEVELS))}[name]
    assert (error.reshape(2, -1, rows, 5).max(2) <= largest * steps / 2 + 1e-6).all()
    assert error[1, :, 3].max() == 0


@pytest.mark.parametrize("name", FORMATS)
def test_packing_what_was_restored_changes_nothing(name):
    once = back(QUANTISATIONS[name].pack(jnp.asarray(KERNEL)))
    np.testing.assert_allclose(back(QUANTISATIONS[name].pack(jnp.asarray(once))), once, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_model_computes_with_the_restored_values(folder, plain, name):
    """Loss and adapter gradients of the packed base are those of a base that holds the restored kernels."""
    model, packed = load_model(folder, task="causal", quantization=name)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), packed) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(model.init_base, jax.random.key(0))
    )
    for path, kernel in kernels(plain[1]).items():
        expected = QUANTISATIONS[name].pack(kernel)
        jax.tree.map(np.testing.assert_array_equal, kernels(packed)[path], expected)
    batch = batch_of([[3, 40, 5, 60, 7], [8, 9, len(TOKENS) - 1]])
    adapter = lora.init_adapter(jax.random.key(1), model.modules, dict.fromkeys(model.modules, 2))
    adapter = jax.tree.map(lambda leaf: leaf[None] + 0.01, adapter)
    scale = {path: jnp.ones((1, 2, 2)) for path in adapter}

    def loss(model, base, adapter):
        held = Local(Trainable(adapter, {}), scale, scale, {})
        return model.score(base, [held], batch).loss.sum()

    def run(model, base):
        return jax.jit(jax.value_and_grad(lambda adapter: loss(model, base, adapter)))(adapter)

    (found, gradients), (expected, theirs) = run(model, packed), run(plain[0], restore(packed, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, theirs)


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.03), ("nf4", 0.35)])
def test_logits_stay_close(folder, plain, name, tolerance):
    batch = batch_of([[3, 40, 5, 60, 7]])
    model, base = load_model(folder, task="causal", quantization=name)
    expected, found = (np.asarray(m.apply(b, [PLAIN], batch)) for m, b in (plain, (model, base)))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < tolerance


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("nf4", 4)])
def test_bytes_are_those_of_codes_and_scales(folder, plain, name, bits):
    packed = load_model(folder, task="causal", dtype="bfloat16", quantization=name)[1]
    for path, kernel in kernels(plain[1]).items():
        scales = kernel.size // (kernel.shape[1] if name == "int8" else BLOCK)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(kernels(packed)[path]))
        assert size == kernel.size * bits // 8 + 4 * scales
    assert packed["embeddings"]["embed_tokens"]["embedding"].dtype == jnp.bfloat16


@ONE_FAMILY
def test_nf4_needs_whole_blocks(tiny):
    message = r"model\.quantization: found nf4.*attention\.self\.query has 16; choose int8"
    with pytest.raises(UserError, match=message):
        load_model(tiny.folder, num_labels=3, pooling="mean", quantization="nf4")


@ONE_FAMILY
def test_an_unknown_format_is_refused(tiny):
    with pytest.raises(UserError, match=r"model\.quantization is 'int4'; expected one of"):
        load_model(tiny.folder, num_labels=3, pooling="mean", quantization="int4")


def test_a_federated_run_on_a_packed_base(world):
    run = runs.train(world, world.folder / "packed", model__quantization="int8", federation__num_rounds=1)
    losses = [line["train/loss"] for line in runs.records(run) if "train/loss" in line]
    assert len(losses) == 1 and np.isfinite(losses).all()
