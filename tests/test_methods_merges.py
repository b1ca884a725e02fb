"""Identities of the federated methods: methods that merge into the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meeting import SPEC, R, begin, make, meet

from fslora_jax.lora import Target
from fslora_jax.methods import Client, Spec
from fslora_jax.methods.parts import kernel_of
from fslora_jax.types import Pair, Trainable


@pytest.mark.parametrize("name", ["flora", "xgblora", "rac_lora"])
def test_after_a_merge_the_fresh_adapter_adds_nothing_and_the_rank_is_bounded(name):
    """Rank 1 over two rounds of two clients: at most 4 of 7, or 2 where the drawn factor is the same for all."""
    spec = SPEC._replace(r=1)
    method = make(name, spec)
    server = begin(method, spec)
    for seed in (1, 2):
        server = meet(method, server, (1, 1), shares=(0.4, 0.6), seed=seed).after
        for pair in server.weights.adapter.values():
            assert not np.asarray(kernel_of(pair)).any()
            assert np.asarray(pair.a if name != "rac_lora" else pair.b).any()
    bound = 2 if name == "rac_lora" else 4
    for delta in server.base_delta.values():
        sizes = np.linalg.svd(delta, compute_uv=False)
        assert ((sizes > 1e-5 * sizes.max()).sum(-1) <= bound).all() and sizes.max() > 0.1


def test_xgblora_boosts_exactly_the_layers_it_picked_and_each_as_often():
    spec = Spec({"q": Target(4, 4, 6)}, 1, 1.0)
    method = make("xgblora", spec, layers=0.5)
    picked = jax.vmap(lambda key: method.init(key, {}).memory["xgblora"])(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert (picked.sum(1) == 3).all()
    np.testing.assert_allclose(picked.mean(0), 0.5, atol=0.03)
    wide = Spec(SPEC.targets, R, SPEC.scale, scale_pattern=SPEC.scale_pattern)
    boost = make("xgblora", wide, layers=0.5)
    server = begin(boost, wide)
    after = meet(boost, server).after
    for m in wide.targets:
        moved_layers = np.asarray(after.base_delta[m]).any((1, 2))
        np.testing.assert_array_equal(moved_layers, np.asarray(server.memory["xgblora"]) > 0)
        assert moved_layers.sum() == 1


def sketch_of(key: jax.Array, spec: Spec) -> jax.Array:
    """``Q (N, o, r)`` that RAC-LoRA draws for module ``q``."""
    return jnp.swapaxes(make("rac_lora", spec).init(key, {}).weights.adapter["q"].b, 1, 2)


def test_rac_lora_draws_projectors_whose_mean_is_isotropic():
    spec = Spec({"q": Target(4, 6, 1)}, 2, 1.0)
    q = jax.vmap(lambda key: sketch_of(key, spec)[0])(jax.random.split(jax.random.key(0), 4000))
    h = q @ jnp.swapaxes(q, 1, 2)
    np.testing.assert_allclose(h @ h, h, atol=1e-5)
    np.testing.assert_allclose(jnp.trace(h, axis1=1, axis2=2), 2, atol=1e-5)
    np.testing.assert_allclose(h.mean(0), np.eye(6) * 2 / 6, atol=0.03)


@pytest.mark.parametrize("sketch", ["a", "b"])
def test_a_step_of_rac_lora_is_the_gradients_step_projected(sketch):
    spec = Spec({"q": Target(4, 6, 1)}, 2, 1.0)
    method = make("rac_lora", spec, sketch=sketch)
    server = method.init(jax.random.key(1), {})
    client = Client(*map(jnp.asarray, (0, 2, 1.0)))
    before = method.download(jax.random.key(0), server, client, 2)
    gradient = jax.random.normal(jax.random.key(2), (1, 4, 6))  # of a loss at the kernel, linear here

    def loss(pair: Pair) -> jax.Array:
        return (gradient * kernel_of(pair, before.scale["q"])).sum()

    pair, grads = before.weights.adapter["q"], jax.grad(loss)(before.weights.adapter["q"])
    stepped = Pair(
        *(x - 0.1 * g * rows[..., None] for x, g, rows in zip(pair, grads, before.trains["q"], strict=True))
    )
    after = before._replace(weights=Trainable({"q": stepped}, {}))
    payload, _ = method.upload(jax.random.key(0), server, before, after, client)
    combined = method.combine([jax.tree.map(lambda x: x[None], payload)], [jnp.ones(1)])
    moved_by = method.update(jax.random.key(3), server, combined).base_delta["q"][0]
    q = np.asarray(getattr(server.weights.adapter["q"], sketch))[0]
    projected = q.T @ q @ gradient[0] if sketch == "a" else gradient[0] @ q.T @ q
    np.testing.assert_allclose(moved_by, -0.1 * projected, atol=1e-6)


def test_a_chain_of_sketches_reaches_what_one_sketch_cannot():
    """On ``<W - W*, M (W - W*)> / 2`` with M = diag(10, 1, .., 1)."""
    spec, rng = Spec({"q": Target(4, 6, 1)}, 2, 1.0), np.random.default_rng(0)
    start, m = rng.normal(size=(6, 4)), np.diag([10.0, 1, 1, 1, 1, 1])
    keys = jax.random.split(jax.random.key(0), 400)
    sketches = np.asarray(jax.vmap(lambda key: sketch_of(key, spec)[0])(keys), np.float64)

    def loss_after(chain: bool) -> float:
        w = start
        for q in sketches if chain else sketches[:1].repeat(400, 0):
            w = w - 0.1 * q @ q.T @ m @ w
        return float((w * (m @ w)).sum() / 2)

    assert loss_after(True) < 1e-3 < 0.1 < loss_after(False)
