"""Gradients that are written by hand: of attention, and of products with frozen kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import assert_close
from jax.sharding import Mesh

from fslora_jax.models.attention import LOW, attention
from fslora_jax.models.kernels import TURNED, frozen_logits, frozen_product, laid_out, narrowed

HEAD, LENGTH = 4, 9


def plain(q, k, v, bias, scale, cap):
    """Attention as it is defined, one query head after another, for autodiff."""
    split = [m.reshape(*m.shape[:-1], -1, HEAD) for m in (q, k, v)]
    per_key = split[0].shape[-2] // split[1].shape[-2]
    mixed = []
    for head in range(split[0].shape[-2]):
        ours, theirs, values = split[0][..., head, :], *(m[..., head // per_key, :] for m in split[1:])
        scores = scale * jnp.einsum("cbqd,cbkd->cbqk", ours, theirs)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        weights = jax.nn.softmax(scores + bias[:, :, head % bias.shape[2]])
        mixed.append(jnp.einsum("cbqk,cbkd->cbqd", weights, values))
    return jnp.concatenate(mixed, -1)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
def test_attention_and_its_gradient_are_those_of_the_definition(heads, cap, size):
    """Also of large scores, for a gradient is a difference between nearly equal values there."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(amount * rng.normal(size=(2, 3, LENGTH, h * HEAD)) + offset, jnp.float32)
        for h, amount, offset in zip(
            (heads[0], heads[1], heads[1]), (size, size, 0.1), (0, 0, 3), strict=True
        )
    )
    bias = jnp.where(rng.random((2, 3, 1, LENGTH, LENGTH)) < 0.3, LOW, 0.0).at[0, 0, 0, 2].set(LOW)
    towards = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def both(f):
        out, back = jax.vjp(f, q, k, v)
        return out, back(towards)

    got = both(lambda *x: attention(*x, bias, HEAD, scale=0.7, cap=cap))
    assert_close(got, both(lambda *x: plain(*x, bias, 0.7, cap)), 1e-4)


def test_what_is_no_number_in_a_score_stays_visible():
    q = jnp.ones((1, 1, 3, HEAD)).at[0, 0, 1, 0].set(jnp.nan)
    k = v = jnp.ones((1, 1, 3, HEAD))
    found = attention(q, k, v, jnp.zeros((1, 1, 1, 3, 3)), HEAD)
    assert jnp.isnan(found[0, 0, 1]).all()
    assert jnp.isfinite(found[0, 0, [0, 2]]).all()


def test_the_gradient_of_a_frozen_product_is_a_product_with_the_turned_kernel():
    rng = np.random.default_rng(0)
    x, kernel, towards = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 5), (5, 4), (2, 3, 4))
    )
    y, back = jax.vjp(frozen_product, x, kernel, kernel.T)
    np.testing.assert_array_equal(y, x @ kernel)
    to_x, *others = back(towards)
    np.testing.assert_allclose(to_x, towards @ kernel.T, rtol=1e-5)
    assert all((other == 0).all() for other in others)
    to_x, *_ = jax.vjp(frozen_product, x, kernel, jnp.zeros((4, 5)))[1](towards)
    assert (to_x == 0).all()  # nothing of it is a product with the kernel itself


def test_a_narrow_kernel_meets_narrow_factors_and_sums_stay_wide():
    """Of 4,096 terms a sum in bfloat16 would keep three digits; the gradient takes the turned kernel likewise."""
    rng = np.random.default_rng(0)
    x, kernel, towards = (rng.normal(size=s).astype(np.float32) for s in ((3, 4096), (4096, 5), (3, 5)))
    wide = narrowed({"layers": {"linear": {"m": {"kernel": jnp.asarray(kernel)}}}}, "bfloat16")
    narrow = wide["layers"]["linear"]["m"]["kernel"]
    assert narrow.dtype == jnp.bfloat16
    y, back = jax.vjp(frozen_product, jnp.asarray(x), narrow, narrow.T)
    exact = [np.asarray(jnp.asarray(m, jnp.bfloat16), np.float64) for m in (x, kernel, towards)]
    assert y.dtype == back(y)[0].dtype == jnp.float32
    np.testing.assert_allclose(y, exact[0] @ exact[1], atol=1e-3)
    np.testing.assert_allclose(back(jnp.asarray(towards))[0], exact[2] @ exact[1].T, atol=1e-4)
    assert 0.01 < np.abs(y - x @ kernel).max() < 2  # the factors did lose digits


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_logits_are_wide_and_their_gradient_has_narrow_factors(dtype, near):
    rng = np.random.default_rng(0)
    x, table, towards = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 64), (64, 50), (2, 3, 50)))
    logits, back = jax.vjp(frozen_logits, jnp.asarray(x, dtype), jnp.asarray(table, dtype))
    to_x, to_table = back(jnp.asarray(towards))
    assert (logits.dtype, to_x.dtype) == (jnp.float32, dtype)
    exact = [np.asarray(jnp.asarray(m, dtype), np.float64) for m in (x, table, towards)]
    np.testing.assert_allclose(logits, exact[0] @ exact[1], atol=1e-4)
    np.testing.assert_allclose(np.asarray(to_x, np.float64), exact[2] @ exact[1].T, atol=near * 8)
    assert (to_table == 0).all()
    (product,) = (
        e for e in jax.make_jaxpr(back)(jnp.asarray(towards)).eqns if e.primitive.name == "dot_general"
    )
    assert {factor.aval.dtype for factor in product.invars} == {jnp.dtype(dtype)}


def test_only_kernels_that_are_not_packed_are_narrowed():
    kernel, bias = jnp.ones((2, 3, 4)), jnp.ones((2, 4))
    linear = {
        "plain": {"kernel": kernel, "bias": bias},
        "packed": {"kernel": {"int8": kernel, "scale": bias}},
    }
    base = {"layers": {"linear": linear, "norm": bias}}
    found = narrowed(base, "bfloat16")["layers"]
    assert found["linear"]["plain"]["kernel"].dtype == jnp.bfloat16
    assert found["linear"]["plain"]["bias"] is bias
    assert found["linear"]["packed"] is linear["packed"]
    assert found["norm"] is bias
    assert narrowed(base, "same") is base


def test_kernels_are_turned_beside_themselves_unless_packed_or_shared_out(monkeypatch):
    kernel = jnp.arange(24.0).reshape(2, 3, 4)
    linear = {"plain": {"kernel": kernel}, "packed": {"kernel": {"int8": kernel, "scale": kernel[:, 0]}}}
    base = {"layers": {"linear": linear}, "embeddings": {}}
    turned = laid_out(base)
    assert turned["layers"]["linear"]["plain"]["kernel"] is kernel
    assert turned["layers"]["linear"]["packed"] is linear["packed"]
    assert {path: x.tolist() for path, x in turned["layers"][TURNED].items()} == {
        "plain": np.swapaxes(kernel, 1, 2).tolist()
    }
    devices = np.array(jax.devices()[:1] * 2)
    assert TURNED in laid_out(base, Mesh(devices.reshape(2, 1, 1), ("clients", "fsdp", "tensor")))["layers"]
    assert laid_out(base, Mesh(devices.reshape(1, 2, 1), ("clients", "fsdp", "tensor"))) is base
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert laid_out(base) is base


@pytest.mark.parametrize(
    ("dtype", "sizes", "room"),
    [("float32", (5, 512), (32, 0)), ("float32", (1024, 7), (0, 32)), ("bfloat16", (5, 1024), (0, 0))],
)
def test_rows_that_a_cpu_would_lose_have_room_between_them_and_products_are_the_same(dtype, sizes, room):
    i, o = sizes
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(2, *sizes)), dtype)
    layers = laid_out({"layers": {"linear": {"m": {"kernel": kernel}}}})["layers"]
    wide, turned = layers["linear"]["m"]["kernel"], layers[TURNED]["m"]
    assert (wide.shape, turned.shape) == ((2, i, o + room[0]), (2, o, i + room[1]))
    x, towards = (jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in sizes)
    y, back = jax.vjp(frozen_product, x, wide[1], turned[1])
    expected, back_of = jax.vjp(frozen_product, x, kernel[1], kernel[1].T)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(back(towards)[0], back_of(towards)[0], rtol=1e-6, atol=1e-5)
