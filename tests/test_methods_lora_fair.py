"""Identities of the federated methods: LoRA-FAIR's correction of B."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from meeting import SPEC, Met, begin, error, make, means, meet, total

from fslora_jax.methods import Method
from fslora_jax.methods.lora_fair import descend, ridge
from fslora_jax.types import Pair


def corrected(**options) -> tuple[Met, Method]:
    method = make("lora_fair", **options)
    return meet(method, begin(method)), method


def test_lora_fair_without_penalty_leaves_what_a_cannot_reach():
    """``dW (I - P_A)``."""
    met, method = corrected(penalty=0.0)
    for m, missed in error(method, met).items():
        a = means(met, m)[0]
        off = np.eye(a.shape[-1]) - np.swapaxes(a, 1, 2) @ np.linalg.inv(a @ np.swapaxes(a, 1, 2)) @ a
        np.testing.assert_allclose(missed, off @ met.ideal[m], atol=1e-4)


def test_lora_fair_with_an_endless_penalty_is_fedit():
    met, _ = corrected(penalty=1e9)
    fedit = make("fedit")
    expected = meet(fedit, begin(fedit)).after.weights.adapter
    for m, pair in met.after.weights.adapter.items():
        for found, wanted in zip(pair, expected[m], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_lora_fair_is_never_worse_than_fedit_and_never_larger_than_both(penalty):
    met, method = corrected(penalty=penalty)
    fedit = make("fedit")
    plain = error(fedit, meet(fedit, begin(fedit)))
    for m, missed in error(method, met).items():
        assert (np.linalg.norm(missed, axis=(1, 2)) <= np.linalg.norm(plain[m], axis=(1, 2)) + 1e-5).all()
        size = np.linalg.norm(total(method, met.after)[m], axis=(1, 2))
        bound = np.linalg.norm(met.ideal[m], axis=(1, 2)) + np.linalg.norm(plain[m], axis=(1, 2))
        assert (size <= bound).all()


def test_lora_fair_corrects_nothing_where_clients_agree_and_bears_a_rank_above_the_width():
    method = make("lora_fair")
    server = begin(method)
    met = meet(method, server, noise=0.0)
    for m, pair in server.weights.adapter.items():
        np.testing.assert_allclose(met.after.weights.adapter[m].b, pair.b, atol=1e-5)
    rng = np.random.default_rng(0)
    a, residual = jnp.float32(rng.normal(size=(1, 6, 4))), jnp.float32(rng.normal(size=(1, 4, 5)))
    d = ridge(residual, a, 0.0)
    np.testing.assert_allclose(jnp.einsum("nki,nko->nio", a, d), residual, atol=1e-3)
    assert np.isfinite(ridge(residual, 0 * a, 0.0)).all()


def test_lora_fairs_cosine_comes_near_the_best_that_any_b_can_have():
    """``|dW P_A| / |dW|``, at factors of order 1; zero factors give no NaN."""
    met, _ = corrected()
    a, b = (jnp.float32(x) for x in means(met, "q"))
    wanted = jnp.float32(met.ideal["q"] / SPEC.scales()["q"])

    def cosine(d):
        product = np.einsum("nki,nko->nio", a, b + d)
        sizes = np.linalg.norm(product, axis=(1, 2)) * np.linalg.norm(wanted, axis=(1, 2))
        return (product * wanted).sum((1, 2)) / sizes

    on = np.swapaxes(a, 1, 2) @ np.linalg.inv(a @ np.swapaxes(a, 1, 2)) @ a
    best = np.linalg.norm(on @ wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    found = cosine(descend(wanted, Pair(a, b), 0.0, 1000, 0.3))
    assert (found > cosine(0 * b)).all() and (found <= best + 1e-5).all()
    np.testing.assert_allclose(found, best, atol=0.02)
    assert np.isfinite(descend(0 * wanted, Pair(a, 0 * b), 0.01, 3, 0.01)).all()


SOLVES = """
import jax, jax.numpy as jnp
from fslora_jax.methods.lora_fair import ridge

@jax.jit
def of_modules(a, residual):
    return [ridge(n * residual, a, 0.01) for n in range(1, 5)]

a = jax.random.normal(jax.random.key(0), (6, 64, 384))
for _ in range(20):
    jax.block_until_ready(of_modules(a, jnp.ones((6, 384, 384))))
"""


def test_corrections_of_several_modules_at_once_end():
    """In a process of its own, since batched solves of XLA's CPU block each other where they are as many as threads."""
    subprocess.run([sys.executable, "-c", SOLVES], check=True, timeout=120)
