"""The law of the draws and the variance they cause: identities 1 and 2 of the method; gather and scatter."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fslora_jax.lora import delta
from fslora_jax.sketch import draw, gather, scatter_sum
from fslora_jax.types import Pair

DRAWS = 20_000


def diagonals(r: int, k: int, cap: int) -> np.ndarray:
    """The diagonals of many sketches ``S``."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    index, gain = jax.vmap(lambda key: draw(key, r, k, cap))(keys)
    return np.asarray(jnp.zeros((DRAWS, r)).at[jnp.arange(DRAWS)[:, None], index].add(gain))


@pytest.mark.parametrize(("r", "k", "cap"), [(7, 3, 5), (6, 1, 1), (5, 4, 5), (4, 4, 4)])
def test_identity_1_moments_of_the_draws(r, k, cap):
    s = diagonals(r, k, cap)
    chosen = s > 0
    assert (chosen.sum(1) == k).all()
    np.testing.assert_allclose(s[chosen], r / k, rtol=1e-6)

    def five_errors(p: float) -> float:
        return 5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-6

    pair = k * (k - 1) / (r * (r - 1))
    together = (chosen[:, :, None] & chosen[:, None, :]).mean(0)
    assert abs(chosen.mean(0) - k / r).max() <= five_errors(k / r)
    assert abs(together - pair)[~np.eye(r, dtype=bool)].max() <= five_errors(pair)
    assert abs(s.mean(0) - 1).max() <= r / k * five_errors(k / r)
    assert abs((s**2).mean(0) - r / k).max() <= (r / k) ** 2 * five_errors(k / r)


def test_identity_1_every_subset_is_as_likely():
    chosen = diagonals(5, 2, 3) > 0
    counts = np.array([chosen[:, list(subset)].all(1).sum() for subset in combinations(range(5), 2)])
    expected = DRAWS / len(counts)
    assert counts.sum() == DRAWS
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared, 9 degrees, one in a thousand


def test_identity_1_the_slot_does_not_change_the_draw():
    for seed in range(20):
        drawn = [draw(jax.random.key(seed), 8, 3, cap) for cap in (3, 5, 8)]
        for index, gain in drawn:
            assert len(set(index.tolist())) == len(index)
            assert index[:3].tolist() == drawn[0].index.tolist()
            np.testing.assert_allclose(gain, [8 / 3] * 3 + [0] * (len(gain) - 3))


def test_identity_1_the_rank_is_data():
    program = jax.jit(lambda key, k: draw(key, 8, k, 8))
    for k in range(1, 9):
        assert (program(jax.random.key(0), k).gain > 0).sum() == k
    assert program._cache_size() == 1


@pytest.mark.parametrize("k", range(1, 6))
def test_identity_2_variance_of_the_sketched_product(k):
    """``E|B(S-I)A|^2`` over all subsets, with ``B S A`` as the package computes it, and its closed form."""
    r, m, n = 5, 4, 3
    b, a = (np.random.default_rng(0).normal(size=shape) for shape in ((m, r), (r, n)))
    pair = Pair(jnp.float32(a)[None], jnp.float32(b.T)[None])
    squares = []
    for subset in combinations(range(r), k):
        held = gather(pair, jnp.array([subset]))
        bsa = delta(Pair(held.a[0], held.b[0]), jnp.full(k, r / k), jnp.eye(n)).T
        squares.append(((np.asarray(bsa) - b @ a) ** 2).sum())
    components = ((b**2).sum(0) * (a**2).sum(1)).sum()
    closed = (r / k - 1) * (r * components - ((b @ a) ** 2).sum()) / (r - 1)
    np.testing.assert_allclose(np.mean(squares), closed, rtol=1e-5, atol=1e-8)
    assert (closed > 1) == (k < r)


def test_gather_takes_the_same_components_of_both_factors():
    rng = np.random.default_rng(0)
    pair = Pair(*(jnp.float32(rng.normal(size=(2, 6, d))) for d in (3, 4)))
    index = jnp.array([[4, 1, 0], [2, 5, 3]])
    held = gather(pair, index)
    for n in range(2):
        for place, j in enumerate(index[n]):
            assert (held.a[n, place] == pair.a[n, j]).all()
            assert (held.b[n, place] == pair.b[n, j]).all()


def test_scatter_sum_is_a_loop_over_clients_and_components():
    rng = np.random.default_rng(0)
    clients, layers, k, r, d = 4, 2, 3, 7, 5
    parts = rng.normal(size=(clients, layers, k, d)).astype(np.float32)
    weight = rng.random(clients).astype(np.float32)
    index = np.array([[rng.permutation(r - 1)[:k] for _ in range(layers)] for _ in range(clients)])
    expected = np.zeros((layers, r, d))
    for c, n, j in np.ndindex(clients, layers, k):
        expected[n, index[c, n, j]] += weight[c] * parts[c, n, j]
    found = np.asarray(scatter_sum(jnp.array(parts), jnp.array(index), jnp.array(weight), r))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (found[:, r - 1] == 0).all()


def test_scatter_puts_back_what_gather_took():
    rng = np.random.default_rng(1)
    pair = Pair(*(jnp.float32(rng.normal(size=(2, 6, d))) for d in (3, 4)))
    index = jnp.array([rng.permutation(6) for _ in range(2)])
    for factor, held in zip(pair, gather(pair, index), strict=True):
        assert (scatter_sum(held[None], index[None], jnp.ones(1), 6) == factor).all()
