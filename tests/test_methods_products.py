"""Identities of the federated methods: what a method makes of the average of products, and of ranks that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meeting import EXACT, MIXED, SHARES, SPEC, R, begin, error, make, means, meet, total

from fslora_jax.methods import METHODS, Client, Server
from fslora_jax.methods.hetlora import product_norm
from fslora_jax.methods.parts import factorised, kernel_of
from fslora_jax.types import Pair, Trainable


def test_fedit_misses_the_ideal_average_by_the_cross_covariance():
    method = make("fedit")
    met = meet(method, begin(method))
    for m, missed in error(method, met).items():
        a, b = means(met, m)
        cross = sum(
            w * np.einsum("nki,nko->nio", h.weights.adapter[m].a - a, h.weights.adapter[m].b - b)
            for w, h in zip(SHARES, met.held, strict=True)
        )
        np.testing.assert_allclose(missed, SPEC.scales()[m] * cross, atol=1e-5)
        assert np.abs(missed).max() > 0.1


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_have_no_error(name):
    """Over two rounds, so that RoLoRA trains both factors, and what was merged is there in the second."""
    method = make(name)
    server = begin(method)
    for seed in (1, 2):
        before = {m: np.asarray(x) for m, x in server.base_delta.items()}
        met = meet(method, server, seed=seed)
        for m, missed in error(method, met).items():
            np.testing.assert_allclose(missed + before.get(m, 0.0), 0, atol=1e-5)
            assert np.abs(met.ideal[m]).max() > 0.1
        server = met.after


def test_ffa_lora_never_moves_a_and_rolora_moves_one_factor_at_a_time():
    ffa, rolora = make("ffa_lora"), make("rolora")
    server = begin(ffa)
    kept = meet(ffa, server).after.weights.adapter
    first = meet(rolora, server).after
    second = meet(rolora, first).after.weights.adapter
    for m, pair in server.weights.adapter.items():
        np.testing.assert_array_equal(kept[m].a, pair.a)
        np.testing.assert_array_equal(first.weights.adapter[m].a, pair.a)
        np.testing.assert_array_equal(second[m].b, first.weights.adapter[m].b)
        assert (np.asarray(second[m].a != pair.a)).all() and (np.asarray(kept[m].b != pair.b)).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.7, momentum=0.9),
        optax.adamw(0.1),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.sm3(0.1),
    ],
    ids=["momentum", "adamw", "adafactor", "sm3"],
)
def test_the_factor_that_is_idle_in_a_round_of_rolora_keeps_its_bits_and_its_moments(optimizer):
    """Of moments that are not kept by component, the factor alone."""
    method = METHODS["rolora"].make(SPEC, optimizer)
    server = method.init(jax.random.key(0), {})
    for t, (idle, busy) in enumerate([("a", "b"), ("b", "a")] * 2):
        after = meet(method, server, seed=t).after
        for old, new in zip(weights_like(server), weights_like(after), strict=True):
            for m in SPEC.targets:
                np.testing.assert_array_equal(getattr(old[m], idle), getattr(new[m], idle))
                assert (getattr(old[m], busy) != getattr(new[m], busy)).any()
        server = after


def weights_like(server: Server) -> list[dict[str, Pair]]:
    """The factors, and an optimiser's moments that have their shapes."""
    leaves = jax.tree.leaves((server.weights, server.opt_state), is_leaf=lambda x: isinstance(x, Trainable))
    found = [x.adapter for x in leaves if isinstance(x, Trainable)]
    shapes = [jax.tree.map(jnp.shape, adapter) for adapter in found]
    return [adapter for adapter, shape in zip(found, shapes, strict=True) if shape == shapes[0]]


def test_fedex_lora_has_a_residual_of_low_rank():
    """``(C - 1) r`` at most: two clients of rank 3 leave 3 of 8."""
    method = make("fedex_lora")
    met = meet(method, begin(method), (R, R), shares=(0.4, 0.6))
    sizes = np.linalg.svd(met.after.base_delta["q"], compute_uv=False)
    assert ((sizes > 1e-5).sum(-1) == R).all()


def test_flexlora_misses_the_singular_values_beyond_r():
    method = make("flexlora")
    met = meet(method, begin(method), MIXED)
    for m, missed in error(method, met).items():
        sizes = np.linalg.svd(met.ideal[m], compute_uv=False)
        beyond = np.sqrt((sizes[:, R:] ** 2).sum(-1))
        np.testing.assert_allclose(np.linalg.norm(missed, axis=(1, 2)), beyond, rtol=1e-4)
        assert (beyond > 0.1).all()


def test_fed_sb_starts_with_the_best_low_rank_part_of_a_sign_step():
    method = make("fed_sb", first_step=0.1)
    rng = np.random.default_rng(0)
    gradient = {m: jnp.float32(rng.normal(size=(t.layers, t.i, t.o))) for m, t in SPEC.targets.items()}
    server = method.from_gradient(begin(method), gradient)
    for m, found in total(method, server).items():
        u, sizes, vt = np.linalg.svd(-0.1 * np.sign(np.asarray(gradient[m])))
        np.testing.assert_allclose(found, (u[..., :R] * sizes[:, None, :R]) @ vt[:, :R], atol=1e-6)
    met = meet(method, server)
    for m, pair in server.memory["fed_sb"].items():
        for fixed, later in zip(pair, met.after.memory["fed_sb"][m], strict=True):
            np.testing.assert_array_equal(fixed, later)
        r_mean = sum(
            w * kernel_of(h.weights.adapter[m], SPEC.scales()[m])
            for w, h in zip(SHARES, met.held, strict=True)
        )
        np.testing.assert_allclose(total(method, met.after)[m], r_mean, atol=1e-5)


def test_the_norm_of_a_product_by_grams_and_padding_keeps_it():
    adapter = begin(make("fedit")).weights.adapter
    products = [np.einsum("nki,nko->nio", *pair) for pair in adapter.values()]
    found = product_norm(adapter)
    np.testing.assert_allclose(found, np.sqrt(sum((x**2).sum() for x in products)), rtol=1e-5)
    padded = {m: Pair(*(jnp.pad(x, ((0, 0), (0, 2), (0, 0))) for x in pair)) for m, pair in adapter.items()}
    np.testing.assert_allclose(product_norm(padded), found, rtol=1e-6)


def test_padding_and_truncating_gives_back_what_was_sent():
    method = make("zero_padding")
    met = meet(method, begin(method), (2,), shares=(1.0,))
    again = method.download(jax.random.key(0), met.after, Client(*map(jnp.asarray, (0, 2, 1.0))), 2)
    for m, pair in met.held[0].weights.adapter.items():
        for sent, back in zip(pair, again.weights.adapter[m], strict=True):
            np.testing.assert_allclose(back, sent, atol=1e-6)


def test_a_padded_mean_is_the_mean_over_trainers_times_their_share():
    padded, contributors = make("zero_padding"), make("raflora", factors=True)
    server = begin(padded)
    one, other = (meet(method, server, MIXED).after.weights.adapter for method in (padded, contributors))
    q = np.array([sum(w for k, w in zip(MIXED, SHARES, strict=True) if k > i) for i in range(R)])
    for m in one:
        for low, mean in zip(one[m], other[m], strict=True):
            np.testing.assert_allclose(low, q[:, None] * mean, atol=1e-5)


def test_without_training_raflora_stands_still_flexlora_damps_once_and_padding_twice():
    """By the share q of those that hold a component, which is 1 for the first only."""
    ks = (1, 3, 2)
    q = np.array([1.0, 0.8, 0.5])
    rng = np.random.default_rng(3)
    kernels = {m: jnp.float32(rng.normal(size=(t.layers, t.i, t.o))) for m, t in SPEC.targets.items()}
    cut = {m: factorised(x, R, SPEC.scales()[m]) for m, x in kernels.items()}
    for name, power in (("raflora", 0), ("flexlora", 1), ("zero_padding", 2)):
        method = make(name)
        server = begin(method)._replace(weights=Trainable(cut, {}))
        after = total(method, meet(method, server, ks, noise=0.0).after)
        for m in cut:
            before = np.linalg.svd(np.asarray(kernel_of(cut[m], SPEC.scales()[m])), compute_uv=False)[:, :R]
            found = np.linalg.svd(after[m], compute_uv=False)[:, :R]
            np.testing.assert_allclose(found, np.sort(before * q**power)[:, ::-1], rtol=1e-4)


def test_raflora_keeps_the_product_that_nobody_trained():
    method = make("raflora")
    server = begin(method)
    met = meet(method, server, (1, 2, 2))
    old = server.weights.adapter
    for m, done in total(method, met.after).items():
        last = np.einsum("nki,nko->nio", old[m].a[:, 2:], old[m].b[:, 2:]) * SPEC.scales()[m]
        parts = [h.weights.adapter[m] for h in met.held]
        first = sum(w * kernel_of(Pair(p.a[:, :1], p.b[:, :1])) for w, p in zip(SHARES, parts, strict=True))
        second = sum(
            w / 0.8 * kernel_of(Pair(p.a[:, 1:2], p.b[:, 1:2]))
            for w, p in zip(SHARES[1:], parts[1:], strict=True)
        )
        wanted = SPEC.scales()[m] * (first + second) + last
        sizes = np.linalg.svd(wanted - done, compute_uv=False)
        np.testing.assert_allclose(
            sizes[:, 0], np.linalg.svd(wanted, compute_uv=False)[:, R], rtol=1e-3
        )  # what the SVD cuts off
