"""Identities of the federated methods: what clients hold, keep and draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meeting import FULL, LAYERS, SPEC, R, begin, make, meet, moved, total

from fslora_jax.methods import Client, Combined
from fslora_jax.methods.parts import kernel_of
from fslora_jax.types import Pair, Rows, Trainable


def test_fedsa_loras_clients_have_their_own_b_and_one_a():
    method = make("fedsa_lora")
    server = begin(method)
    client = Client(*map(jnp.asarray, (0, R, 1.0)), memory=method.first_memory(server))
    before = method.download(jax.random.key(0), server, client, R)
    after = moved(before, np.random.default_rng(5), 1.0)
    payload, memory = method.upload(jax.random.key(0), server, before, after, client)
    combined = method.combine([jax.tree.map(lambda x: x[None], payload)], [jnp.array([0.3])])
    later = method.update(jax.random.key(0), server, combined)
    own = method.download(jax.random.key(1), later, client._replace(memory=memory), R)
    another = method.download(jax.random.key(1), later, client, R)
    for m, pair in after.weights.adapter.items():
        np.testing.assert_array_equal(own.weights.adapter[m].b, pair.b)
        np.testing.assert_array_equal(another.weights.adapter[m].b, before.weights.adapter[m].b)
        for held in (own, another):
            np.testing.assert_array_equal(held.weights.adapter[m].a, later.weights.adapter[m].a)


@pytest.mark.parametrize("k", [1, 2, R])
@pytest.mark.parametrize("name", ["fed_plora", "hafl"])
def test_holding_still_leaves_the_global_model_and_trains_exactly_k(name, k):
    method = make(name)
    server = begin(method)
    server = meet(method, server, FULL).after  # with a ranking
    held = method.download(jax.random.key(3), server, Client(*map(jnp.asarray, (0, k, 1.0))), R)
    for m, found in total(method, server).items():
        np.testing.assert_array_equal(kernel_of(held.weights.adapter[m], held.scale[m]), np.float32(found))
        np.testing.assert_array_equal(held.trains[m].a.sum(-1), [k] * LAYERS)
        np.testing.assert_array_equal(held.trains[m].a, held.trains[m].b)


def test_hafl_trains_the_components_that_mattered():
    """One component moved far in every round; truncation hands out that one."""
    for freeze in (True, False):
        method = make("hafl", freeze=freeze)
        server = begin(method)
        change = {
            m: Pair(*(jnp.full_like(x, 0.01).at[:, 2].set(1.0) for x in p))
            for m, p in server.weights.adapter.items()
        }
        ones = {m: Rows(*[jnp.ones((LAYERS, R))] * 2) for m in SPEC.targets}
        server = method.update(jax.random.key(0), server, Combined(Trainable(change, {}), ones))
        held = method.download(
            jax.random.key(3), server, Client(*map(jnp.asarray, (0, 1, 1.0))), R if freeze else 1
        )
        for m in SPEC.targets:
            at = jnp.argmax(held.trains[m].a, -1) if freeze else held.index[m][:, 0]
            assert at.tolist() == [2, 2]


@pytest.mark.parametrize(("ks", "trained"), [((1, 2, 2), 2), ((1, 2, R), R)])
def test_hafl_trains_as_many_components_as_its_largest_client(ks, trained):
    """As its docstring says: nothing is known of a component that nobody trained."""
    method = make("hafl")
    server = begin(method)
    start = server.weights.adapter
    for seed in range(3):
        server = meet(method, server, ks, seed=seed).after
    for m, pair in server.weights.adapter.items():
        for new, old in zip(pair, start[m], strict=True):
            np.testing.assert_array_equal((new != old).any(-1).sum(-1), [trained] * LAYERS)


def test_importance_sampling_draws_k_with_the_probabilities_that_its_gains_say():
    method = make("fslora", importance=True, uniform_part=0.2)
    server, k, draws = begin(method), 2, 20_000

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        held = method.download(key, server, Client(*map(jnp.asarray, (0, k, 1.0))), k)
        rows = jnp.arange(LAYERS)[:, None]
        gain = jnp.zeros((LAYERS, R)).at[rows, held.index["q"]].set(held.scale["q"] / SPEC.scale)
        return gain, held.trains["q"].a.sum(-1)

    gains, counts = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))
    assert (counts == k).all()
    drawn = np.asarray(gains) > 0
    said = 1 / np.asarray(gains).max(0)
    assert np.ptp(said) > 0.2  # not uniform
    np.testing.assert_allclose(said.sum(-1), k, rtol=1e-5)
    np.testing.assert_allclose(drawn.mean(0), said, atol=0.015)
    np.testing.assert_allclose(gains.mean(0), 1, atol=0.04)  # E[S] = I


def test_a_redrawn_sketch_has_its_gain_in_every_step():
    method = make("fslora", redraw=True)
    client = Client(*map(jnp.asarray, (0, 2, 1.0)))
    held = method.download(jax.random.key(0), begin(method), client, R)
    np.testing.assert_array_equal(held.trains["q"].a, 1)
    seen = set()
    for h in range(8):
        now = method.at_step(jax.random.fold_in(jax.random.key(1), h), client, held)
        gain = np.asarray(now.scale["q"]) / SPEC.scale
        np.testing.assert_allclose(np.sort(gain, -1), [[0, 1.5, 1.5]] * LAYERS, rtol=1e-6)
        np.testing.assert_array_equal(now.trains["q"].a, gain > 0)
        seen.add(gain.tobytes())
    assert len(seen) > 3
