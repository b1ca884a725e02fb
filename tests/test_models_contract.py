"""What every model family promises, against transformers, torch and PEFT; one table, a few programs a row."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from contract import (
    LENGTHS,
    ROWS,
    Tiny,
    batches,
    by_example,
    make_tier,
    make_tiny,
    torch_outputs,
)

from fslora_jax import lora
from fslora_jax.models import load_model
from fslora_jax.types import Pair

K, ALPHA = 3, 6.0
CLIENTS = 3


@pytest.fixture(scope="module", params=ROWS, ids="-".join)
def tiny(request, tmp_path_factory) -> Tiny:
    return make_tiny(*request.param, tmp_path_factory.mktemp("-".join(request.param)))


@partial(jax.jit, static_argnames=("apply", "score"))
def outputs(apply, score, base, tier, batch):
    """Each client's gradients, mean loss and logits."""

    def loss(weights):
        scores = score(base, [tier._replace(weights=weights)], batch)
        losses = scores.loss.sum(-1) / scores.count.sum(-1)
        return losses.sum(), losses

    grads, losses = jax.grad(loss, has_aux=True)(tier.weights)
    return grads, losses, apply(base, [tier], batch)


def run(tiny):
    tier = make_tier(tiny.model, tiny.head, CLIENTS, K, lora.lora_scale(K, ALPHA, use_rslora=True))
    return tier, outputs(tiny.model.apply, tiny.model.score, tiny.base, tier, batches())


def with_peft(tiny, tier):
    """The torch model under PEFT with the tier's factors, and a way to name them."""
    config = peft.LoraConfig(
        r=K,
        lora_alpha=ALPHA,  # pyright: ignore[reportArgumentType]
        use_rslora=True,
        target_modules=list(tiny.model.modules),
        task_type=tiny.model.naming.task_type,
    )
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.hf), config).eval()
    values = dict(wrapped.named_parameters())

    def factors(path, layer):
        prefix = f"base_model.model.{tiny.model.naming.layer_prefix.format(layer=layer)}{path}.lora_"
        return values[f"{prefix}A.default.weight"], values[f"{prefix}B.default.weight"]

    for path, pair in tier.weights.adapter.items():
        for layer in range(pair.a.shape[1]):
            a, b = factors(path, layer)
            a.data = torch.tensor(np.asarray(pair.a[0, layer]))
            b.data = torch.tensor(np.asarray(pair.b[0, layer].T))
    return wrapped, values, factors


def assert_close(got, want, tolerance):
    """Relative to the largest value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-6)


def examples_of(tiny, logits, client):
    if tiny.task == "sequence":
        return list(np.asarray(logits[client])[: len(LENGTHS)])
    return by_example(logits[client], jax.tree.map(lambda leaf: leaf[client], batches()))


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # peft calls transformers' alias
def test_logits_losses_and_gradients_equal_torch_in_every_layout(tiny):
    tier, (grads, losses, logits) = run(tiny)
    wrapped, values, factors = with_peft(tiny, tier)
    assert type(tiny.hf).__name__ == tiny.model.naming.architecture
    loss, expected = torch_outputs(wrapped, tiny.task)
    loss.backward()
    assert logits.dtype == jnp.float32
    assert max(np.abs(e).max() for e in expected) > 0.3
    for client in range(CLIENTS):
        for got, want in zip(examples_of(tiny, logits, client), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4)
        np.testing.assert_allclose(losses[client], loss.item(), atol=1e-4)
        for path, pair in grads.adapter.items():
            for layer in range(pair.a.shape[1]):
                a, b = (leaf.grad.numpy() for leaf in factors(path, layer))
                assert np.abs(a).max() > 1e-5
                for got, want in zip(pair, Pair(a, b.T), strict=True):
                    assert_close(got[client, layer], want, 2e-4)
        for module, leaves in grads.head.items():
            want = values[f"base_model.model.{module}.modules_to_save.default.weight"].grad.numpy().T
            assert_close(leaves["kernel"][client], want, 2e-4)


@pytest.mark.parametrize("tiny", [row for row in ROWS if "causal" in row], indirect=True, ids="-".join)
def test_bfloat16_is_near_float32(tiny):
    model, base = load_model(tiny.folder, task=tiny.task, dtype="bfloat16")
    tier = make_tier(model, {}, CLIENTS, K, 1.0)
    half = jax.jit(model.apply)(base, [tier], batches())
    full = jax.jit(tiny.model.apply)(tiny.base, [tier], batches())
    seen = np.asarray(batches().segments) > 0
    assert half.dtype == jnp.float32
    assert 0 < np.linalg.norm((half - full)[seen]) / np.linalg.norm(full[seen]) < 2e-2


def test_base_shapes_and_modules(tiny):
    abstract = jax.eval_shape(tiny.model.init_base, jax.random.key(0))
    assert jax.tree.map(jnp.shape, tiny.base) == jax.tree.map(jnp.shape, abstract)
    assert sum(leaf.size for leaf in jax.tree.leaves((tiny.base, tiny.head))) == tiny.hf.num_parameters()
    found = {
        name.split(".", 3)[3]: (module.in_features, module.out_features, 3)
        for name, module in tiny.hf.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    assert {path: (t.i, t.o, t.layers) for path, t in tiny.model.modules.items()} == found
    head = jax.eval_shape(tiny.model.init_head, jax.random.key(0))
    assert jax.tree.map(jnp.shape, head) == jax.tree.map(jnp.shape, tiny.head)
