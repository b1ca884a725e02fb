"""Attention, rematerialisation and pooling, with naive loops as oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fslora_jax.errors import UserError
from fslora_jax.models import attention, heads, layers, stack
from fslora_jax.types import Batch


def qkv(heads=4, groups=2, d=3, length=5):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(1, 2, length, n * d)), jnp.float32) for n in (heads, groups, groups))


def naive(q, k, v, seen, d, scale, cap):
    """Attention of one token of one head after another."""
    q, k, v = (np.asarray(m).reshape(*m.shape[:-1], -1, d) for m in (q, k, v))
    out = np.zeros(q.shape)
    for c, b, i, h in np.ndindex(q.shape[:4]):
        group = h // (q.shape[3] // k.shape[3])
        scores = k[c, b, :, group] @ q[c, b, i, h] * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.where(seen[b, i], np.exp(scores), 0)
        out[c, b, i, h] = weights @ v[c, b, :, group] / weights.sum()
    return out.reshape(*out.shape[:3], -1)


@pytest.mark.parametrize(("scale", "cap", "window"), [(None, None, None), (2.0, 0.7, 2)])
def test_attention_equals_a_naive_loop(scale, cap, window):
    segments = jnp.array([[[1, 1, 1, 1, 1], [0, 1, 1, 2, 2]]])
    positions = jnp.array([[[0, 1, 2, 3, 4], [0, 0, 1, 0, 1]]])
    q, k, v = qkv()
    bias = attention.attention_bias(segments, positions, window)
    got = attention.attention(q, k, v, bias, 3, scale=scale, cap=cap)
    distance = np.asarray(positions[0][:, :, None] - positions[0][:, None])
    seen = (np.asarray(segments[0])[:, :, None] == np.asarray(segments[0])[:, None]) & (distance >= 0)
    seen &= distance < (window or 99)
    want = naive(q, k, v, seen, 3, scale or 3**-0.5, cap)
    assert np.isfinite(got).all()
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=1e-5)


def test_a_bias_of_each_head_reaches_its_head():
    q, k, v = qkv()
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 4, 5, 5)), jnp.float32)
    together = attention.attention(q, k, v, bias, 3).reshape(1, 2, 5, 4, 3)
    for head in range(4):
        alone = attention.attention(q, k, v, bias[:, :, head : head + 1], 3).reshape(1, 2, 5, 4, 3)
        np.testing.assert_allclose(together[..., head, :], alone[..., head, :], atol=1e-6)


def test_cudnn_is_refused_where_it_cannot_be():
    q, k, v = qkv()
    bias = jnp.zeros((1, 2, 1, 5, 5))
    for cap, dtype in ((None, jnp.float32), (1.0, jnp.bfloat16)):
        with pytest.raises(
            UserError, match=r"^model\.attention is 'cudnn', which needs model\.dtype: bfloat16"
        ):
            attention.attention(
                *(m.astype(dtype) for m in (q, k, v)), bias, 3, cap=cap, implementation="cudnn"
            )


def test_remat_saves_memory_and_changes_no_gradient():
    def loss(w, policy):
        def step(x, w):
            return jnp.tanh(jnp.tanh(x @ w) @ w), None

        return jax.lax.scan(stack.REMAT[policy](step), jnp.ones((4, 8)), w)[0].sum()

    w = jax.random.normal(jax.random.key(0), (3, 8, 8))
    grads, dots = {}, {}
    for policy in stack.REMAT:
        grad = jax.jit(jax.grad(functools.partial(loss, policy=policy)))
        grads[policy] = grad(w)
        dots[policy] = str(jax.make_jaxpr(jax.grad(functools.partial(loss, policy=policy)))(w)).count(
            "dot_general"
        )
    for policy in stack.REMAT:
        np.testing.assert_allclose(grads[policy], grads["none"], rtol=1e-5)
    assert dots["none"] == dots["frozen"] < dots["full"]


@pytest.mark.parametrize(
    ("pooling", "wanted"), [("first", [1.0, 3.0]), ("last", [2.0, 5.0]), ("mean", [1.5, 4.0])]
)
def test_pooling_of_packed_rows(pooling, wanted):
    none = jnp.zeros((1, 1, 0), int)
    batch = Batch(
        tokens=none,
        segments=jnp.array([[[0, 1, 1, 2, 2, 2]]]),
        positions=jnp.array([[[0, 0, 1, 0, 1, 2]]]),
        types=none,
        labels=jnp.zeros((1, 3), int),
        weights=jnp.ones((1, 3)),
        places=none,
    )
    x = jnp.arange(6.0)[None, None, :, None]
    places = heads.places_of(batch, pooling)
    found = heads.pool(layers.taken(x, places), batch, places)
    np.testing.assert_allclose(found[0, :, 0], [*wanted, 0.0])
