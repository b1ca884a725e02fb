"""The estimators against closed forms in the quadratic model: no bias, intervals that cover at their rate, growth."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic as q
from jax.flatten_util import ravel_pytree
from scipy import stats

from fslora_jax.theory.estimate import mean, u_statistic
from fslora_jax.theory.growth import expected_growth, update_spread
from fslora_jax.theory.moments import (
    client_sums,
    for_population,
    moments,
    own_part,
    products,
    sampling_variances,
)
from fslora_jax.theory.smoothness import along, hessian_product, largest_eigenvalue
from fslora_jax.types import Pair

REPETITIONS, DRAWS, BATCHES = 400, 32, 2
CLIENTS = jnp.arange(len(q.KS))


def sums_of(client, key, ks=q.KS, targets=q.TARGETS, draws=DRAWS):
    k, target = jnp.array(ks)[client], targets[client]

    def gradients(key, batches):
        each = jax.value_and_grad(lambda pair, z: q.loss(pair, q.diagonals(key, k), target + q.noise(z)))
        return jax.vmap(each, (None, 0))(q.AT, batches)

    def losses(batches):
        return jax.vmap(lambda z: q.loss(q.AT, jnp.ones((q.N, q.R)), target + q.noise(z)))(batches)

    sketches, batches = jax.random.split(jax.random.fold_in(key, client))
    keys = jax.random.split(sketches, draws), jax.random.split(batches, (draws, BATCHES))
    return client_sums(gradients, losses, *keys)


def measured(key, chosen=CLIENTS):
    each = jax.vmap(sums_of, (0, None))(chosen, key)
    sums = jax.tree.map(lambda x: x.sum(0), each)
    few = jax.tree.map(lambda x: x[:8].mean(0, keepdims=True) / len(chosen), sums.total)
    return moments(sums, BATCHES, len(chosen), len(q.KS)) | {"naive": products(few)[0, 0]}


@pytest.fixture(scope="module")
def repeated():
    keys = jax.random.split(jax.random.key(1), REPETITIONS)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(measured))(keys))


def bias(values, truth):
    """In standard errors."""
    return (values.mean() - truth) / (values.std(ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("name", q.truths())
def test_estimates_have_no_bias_and_cover_at_their_rate(repeated, name):
    truth, found = q.truths()[name], repeated[name]
    assert abs(bias(found.value, truth)) < 3.5
    covered = ((found.low <= truth) & (truth <= found.high)).sum()
    low, high = stats.binom.interval(0.999, REPETITIONS, 0.95)
    assert low <= covered <= high


def test_a_plain_squared_norm_would_be_found_biased(repeated):
    assert bias(repeated["naive"], q.truths()["grad_f_S^2"]) > 3.5


def test_a_sample_of_clients_speaks_for_all():
    """The mean over all samples of two of the three clients is the truth of three."""
    keys = jax.random.split(jax.random.key(2), 200)
    pairs = jnp.array([[0, 1], [0, 2], [1, 2]])
    found = jax.jit(jax.vmap(jax.vmap(measured, (None, 0)), (0, None)))(keys, pairs)
    for name, truth in q.truths().items():
        assert abs(bias(np.asarray(found[name].value).mean(1), truth)) < 3.5


MANY, FEW, TIMES = 24, 10, 6
MANY_KS = np.resize(q.KS, MANY)
MANY_TARGETS = jnp.float32(np.random.default_rng(4).normal(size=(MANY, q.N, q.I, q.O)))


@pytest.fixture(scope="module")
def sampled():
    """Estimates from ten of 24 clients, drawn anew each time, with few draws: for these alone, and for all."""

    def one(key):
        chosen = jax.random.permutation(key, MANY)[:FEW]
        each = jax.vmap(lambda c: sums_of(c, key, MANY_KS, MANY_TARGETS, TIMES))(chosen)
        sums = jax.tree.map(lambda x: x.sum(0), each)
        parts = jax.vmap(partial(own_part, batches=BATCHES))(each)
        return moments(sums, BATCHES, FEW, MANY), sampling_variances(parts, MANY)

    keys = jax.random.split(jax.random.key(5), REPETITIONS)
    found, variances = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))
    return found, for_population(found, variances, TIMES, FEW, MANY)


@pytest.mark.parametrize("name", q.truths())
def test_intervals_from_a_sample_of_clients_cover_what_holds_for_all(sampled, name):
    truth = q.truths(ks=MANY_KS, targets=MANY_TARGETS)[name]
    low, high = stats.binom.interval(0.999, REPETITIONS, 0.95)
    alone, wide = (((x.low <= truth) & (truth <= x.high)).sum() for x in (found[name] for found in sampled))
    assert abs(bias(sampled[0][name].value, truth)) < 3.5
    assert alone < low <= wide <= high


def test_intervals_for_all_clients_are_those_of_the_draws_where_all_were_drawn(sampled):
    found, _ = sampled
    same = for_population(found, dict.fromkeys(found, np.float64(1e9)), TIMES, MANY, MANY)
    for name, x in found.items():
        np.testing.assert_allclose(same[name], x, rtol=1e-5, err_msg=name)


def test_the_sketch_adds_half_its_variance_to_the_objective():
    """Identity 2: ``f_S - f`` is half of ``s^2 E|B(S-I)A|^2``, in closed form."""
    a, b = (np.asarray(x, float) for x in q.AT)
    components, product = ((a**2).sum(2) * (b**2).sum(2)).sum(), (np.einsum("nri,nro->nio", a, b) ** 2).sum()
    weights = q.R / q.KS - 1
    closed = q.S**2 * weights * (q.R * components - product) / (q.R - 1) / 2
    np.testing.assert_allclose(q.truths()["f_S - f"], closed.mean(), rtol=1e-5)


def test_u_statistics_are_loops_over_tuples_of_different_replicates():
    x = np.random.default_rng(0).normal(size=(6, 2))
    kernel = x @ x.T
    R = range(6)
    pairs = [kernel[a, b] for a in R for b in R if a != b]
    triples = [kernel[a, b] * kernel[a, c] for a in R for b in R for c in R if len({a, b, c}) == 3]
    apart = [
        kernel[a, b] * kernel[c, d] for a in R for b in R for c in R for d in R if len({a, b, c, d}) == 4
    ]
    z1 = max(np.mean(triples) - np.mean(apart), 0)
    z2 = np.mean(np.square(pairs)) - np.mean(apart)
    half = stats.t.ppf(0.975, 5) * np.sqrt((4 * 4 * z1 + 2 * z2) / 30)
    for known in (kernel, kernel + 100 * np.eye(6)):
        found = u_statistic(jnp.float32(known))
        np.testing.assert_allclose(found, [np.mean(pairs) + f * half for f in (0, -1, 1)], rtol=1e-4)
    value, low, high = mean(jnp.float32(x[:, 0]))
    expected = stats.t.interval(0.95, 5, x[:, 0].mean(), stats.sem(x[:, 0]))
    np.testing.assert_allclose([value, low, high], [x[:, 0].mean(), *expected], rtol=1e-4)


@pytest.fixture(scope="module")
def spreads():
    """Estimated variances of local updates at a rate so small that gradients do not move."""
    keys = jax.random.split(jax.random.key(3), (160, 50))

    def gradient(key, pair):
        return jax.grad(q.loss)(pair, q.diagonals(key, 2), q.TARGETS[1])

    def variances(keys, redraw):
        kernels = update_spread(gradient, q.AT, keys, 1e-4, 20, redraw=redraw)
        return jax.vmap(u_statistic)(kernels).value

    run = jax.jit(jax.vmap(jax.vmap(variances, (0, None)), (None, 0)))
    return dict(zip((False, True), np.asarray(run(keys, jnp.arange(2))).mean(1), strict=True))


def test_a_fixed_sketch_makes_variance_grow_as_h_squared(spreads):
    sigma = q.variance(q.AT, 2, q.TARGETS[1])
    for h in (2, 5, 10, 20):
        for redraw, found in spreads.items():
            closed = 1e-8 * expected_growth(h, redraw=redraw) * sigma
            np.testing.assert_allclose(found[h - 1], closed, rtol=0.05)
        np.testing.assert_allclose(spreads[False][h - 1] / spreads[True][h - 1], h, rtol=0.05)


def test_lanczos_finds_the_largest_eigenvalue():
    gradient = jax.grad(partial(q.loss, diagonal=jnp.ones((q.N, q.R)), target=q.TARGETS[0]))
    flat, unravel = ravel_pytree(q.AT)
    dense = np.asarray(jax.jacobian(lambda x: ravel_pytree(gradient(unravel(x)))[0])(flat))
    values = np.linalg.eigvalsh((dense + dense.T) / 2)
    largest = values[np.abs(values).argmax()]
    product = hessian_product(gradient, q.AT)
    start = Pair(*(jnp.float32(np.random.default_rng(0).normal(size=x.shape)) for x in q.AT))
    run = jax.jit(partial(largest_eigenvalue, product), static_argnums=1)
    found = [float(run(start, steps)[0]) for steps in (2, 4, flat.size + 3)]
    assert found[0] < found[1] <= largest * (1 + 1e-5)
    np.testing.assert_allclose(found[2], largest, rtol=1e-4)
    value, vector = run(start, flat.size + 3)
    np.testing.assert_allclose(along(product, vector), value, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_sketched_objective_is_r_over_k_times_as_smooth(k):
    """In B, with orthonormal rows of A exactly so; it is not ``(r/k)^2``."""
    rows = np.linalg.qr(np.random.default_rng(1).normal(size=(q.N, q.I, q.R)))[0]
    a = jnp.array(np.swapaxes(rows, 1, 2), jnp.float32)
    largest = {}
    for rank in (k, q.R):
        gradient = jax.grad(lambda b, rank=rank: q.expected(Pair(a, b), rank, q.TARGETS[0]))
        product = hessian_product(gradient, q.AT.b)
        largest[rank] = float(largest_eigenvalue(product, q.AT.b, 12)[0])
    np.testing.assert_allclose(largest[k] / largest[q.R], q.R / k, rtol=1e-4)
