"""Methods: what is handed out (identities 1, 4), what goes over the wire (8), how it is averaged, what stays (5)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from compare import flat, give

from fslora_jax.federation.round import constants_of
from fslora_jax.methods import (
    Client,
    Combined,
    Payload,
    Server,
    fedit,
    fslora,
    traffic,
    whole,
)
from fslora_jax.methods.parts import hold, take_step, weighted_sum
from fslora_jax.types import Pair, Rows, Trainable

EVERYBODY = {m: Rows(*[jnp.ones((toy.LAYERS, toy.R))] * 2) for m in toy.TARGETS}
"""Every row was trained."""

WIDE = toy.SPEC._replace(r=64)
"""Two independent draws of 8 out of 64 are equal once in four billion."""


def drawn_sets(spec, rounds: int, clients: int) -> np.ndarray:
    """Sorted indices ``(rounds, clients, modules * layers, 8)`` of fslora's draws, with the keys of the round."""
    method = fslora(spec, optax.sgd(1.0))
    server = toy.start(method)
    by_client = jax.vmap(jax.random.fold_in, in_axes=(None, 0))

    @jax.jit
    def of_round(t):
        keys = by_client(jax.random.fold_in(constants_of(5).keys.sketch, t), jnp.arange(clients))
        who = Client(jnp.arange(clients), jnp.full(clients, 8), jnp.ones(clients))
        held = jax.vmap(lambda key, client: method.download(key, server, client, 8))(keys, who)
        return jnp.sort(jnp.concatenate(list(held.index.values()), 1), -1)

    return np.array([of_round(t) for t in range(rounds)])


def test_identity_1_draws_differ_by_client_round_module_and_layer():
    sets = drawn_sets(WIDE, 4, 6).reshape(-1, 8)
    assert len(sets) == 4 * 6 * len(toy.TARGETS) * toy.LAYERS
    assert len(np.unique(sets, axis=0)) == len(sets)


def test_identity_1_a_shared_sketch_differs_by_client_and_round_only():
    sets = drawn_sets(WIDE._replace(share_sketch=True), 4, 6)
    assert (sets == sets[:, :, :1]).all()
    assert len(np.unique(sets[:, :, 0].reshape(-1, 8), axis=0)) == 4 * 6


def test_identity_1_any_slot_holds_the_same_draw():
    server = toy.start(toy.METHOD)
    tight, loose = (give(server, 2, 3, cap) for cap in (3, toy.R))
    for m in toy.TARGETS:
        assert (loose.index[m][:, :3] == tight.index[m]).all()
        assert (loose.scale[m][:, :3] == tight.scale[m]).all()
        assert (loose.scale[m][:, 3:] == 0).all()
        assert all((rows == (jnp.arange(toy.R) < 3)).all() for rows in loose.trains[m])
        np.testing.assert_allclose(tight.scale[m], toy.SPEC.scale * toy.R / 3, rtol=1e-6)
        for held, of in zip(tight.weights.adapter[m], server.weights.adapter[m], strict=True):
            for n in range(toy.LAYERS):
                assert (held[n] == of[n, tight.index[m][n]]).all()


def test_identity_4_at_full_rank_a_client_holds_everything():
    server = toy.start(toy.METHOD)
    held, everything = give(server, 1, toy.R, toy.R), whole(toy.SPEC, server.weights)
    for m in toy.TARGETS:
        order = np.argsort(held.index[m], axis=1)[..., None]
        assert (
            np.take_along_axis(np.asarray(held.index[m])[..., None], order, 1)
            == everything.index[m][..., None]
        ).all()
        np.testing.assert_allclose(held.scale[m], everything.scale[m], rtol=1e-6)
        for mine, of in zip(held.weights.adapter[m], everything.weights.adapter[m], strict=True):
            assert (np.take_along_axis(np.asarray(mine), order, 1) == of).all()


@pytest.mark.parametrize("k", [1, 3, toy.R])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("ranks", toy.SPECS)
def test_identity_8_uploads_hold_exactly_k_columns_and_rows(k, share, ranks):
    spec = toy.SPECS[ranks]._replace(share_sketch=share)
    held = {"up": k, "down": k if ranks == "equal" else {1: 1, 3: 2, 6: 4}[k]}
    method = fslora(spec, optax.sgd(1.0))
    server = toy.start(method)
    who = Client(jnp.int32(0), jnp.int32(k), jnp.float32(1))
    given = jax.eval_shape(lambda server: method.download(jax.random.key(0), server, who, k), server)
    payload, _ = jax.eval_shape(method.upload, jax.random.key(0), server, given, given, who)
    for m, target in toy.TARGETS.items():
        assert payload.delta.adapter[m].a.shape == (toy.LAYERS, held[m], target.i)
        assert payload.delta.adapter[m].b.shape == (toy.LAYERS, held[m], target.o)
        assert payload.index[m].shape == (toy.LAYERS, held[m])

    def size(tree) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    head = sum(x.size for x in jax.tree.leaves(server.weights.head))
    down, up = traffic(spec, k, head)
    shared = 4 * sum(held.values() if ranks == "mixed" else [k])
    indices = 0 if k == toy.R else (shared if share else size(given.index))
    assert up == size(payload.delta)
    assert down == size(given.weights) + indices


def random_payload(rng: np.random.Generator, clients: int, k: int) -> Payload:
    def values(*shape):
        return jnp.float32(rng.normal(size=shape))

    adapter = {
        m: Pair(values(clients, t.layers, k, t.i), values(clients, t.layers, k, t.o))
        for m, t in toy.TARGETS.items()
    }
    head = {"classifier": {"kernel": values(clients, toy.D, toy.LABELS), "bias": values(clients, toy.LABELS)}}
    index = {
        m: jnp.array([[rng.permutation(toy.R)[:k] for _ in range(toy.LAYERS)] for _ in range(clients)])
        for m in toy.TARGETS
    }
    moves = {
        m: jnp.broadcast_to(jnp.arange(k) < max(k - 1, 1), x.shape).astype(float) for m, x in index.items()
    }
    return Payload(Trainable(adapter, head), index, {m: Rows(x, x) for m, x in moves.items()})


def test_combining_is_a_weighted_sum_over_clients():
    rng = np.random.default_rng(0)
    payloads = [random_payload(rng, 2, 4), random_payload(rng, 3, 2)]
    weights = [jnp.array([0.1, 0.2]), jnp.array([0.3, 0.4, 0.0])]
    found = jax.jit(partial(weighted_sum, toy.SPEC.ranks()))(payloads, weights)
    for m, target in toy.TARGETS.items():
        a = np.zeros((toy.LAYERS, toy.R, target.i))
        mass = np.zeros((toy.LAYERS, toy.R))
        for payload, weight in zip(payloads, weights, strict=True):
            for c, n, j in np.ndindex(*payload.index[m].shape):
                place = payload.index[m][c, n, j]
                a[n, place] += weight[c] * payload.delta.adapter[m].a[c, n, j]
                mass[n, place] += weight[c] * payload.trains[m].a[c, n, j]
        np.testing.assert_allclose(found.delta.adapter[m].a, a, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.mass[m].a, mass, rtol=1e-6)
        np.testing.assert_array_equal(found.mass[m].b, found.mass[m].a)
    bias = sum(w @ p.delta.head["classifier"]["bias"] for p, w in zip(payloads, weights, strict=True))
    np.testing.assert_allclose(found.delta.head["classifier"]["bias"], bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", toy.SERVERS)
def test_identity_5_the_server_moves_only_what_somebody_trained(name):
    """In the second round, when momentum, Adam's moments and decay would move everything."""
    optimizer = toy.SERVERS[name][0]
    server = toy.start(fedit(toy.SPEC, optimizer))
    change = jax.tree.map(jnp.ones_like, server.weights)
    one = {m: Rows(*[jnp.zeros((toy.LAYERS, toy.R)).at[1, 2].set(1.0)] * 2) for m in toy.TARGETS}
    update = jax.jit(partial(take_step, optimizer))
    first = update(server, change, EVERYBODY)
    sparse = jax.tree.map(jnp.zeros_like, change)._replace(head=change.head)
    second = update(first, sparse, one)
    for before, after, everything in ((server, first, True), (first, second, False)):
        old, new = flat(before.weights), flat(after.weights)
        for name_of, value in old.items():
            moved = value != new[name_of]
            if name_of[0] == "head" or everything:
                assert moved.all()
            elif name == "average" or name_of[1] == 0:
                assert not moved.any()
            else:
                only = moved if name_of[2] == "A" else moved.T
                assert only[2].all() and not np.delete(only, 2, 0).any()


@pytest.mark.parametrize("name", toy.SERVERS)
def test_a_round_in_which_nobody_reports_leaves_nothing_but_its_number(name):
    """Not even momentum in the head, or one more step in Adam's count."""
    optimizer = toy.SERVERS[name][0]
    server = toy.start(fedit(toy.SPEC, optimizer))
    update = jax.jit(partial(take_step, optimizer))
    first = update(server, jax.tree.map(jnp.ones_like, server.weights), EVERYBODY)
    nobody = jax.tree.map(jnp.zeros_like, EVERYBODY)
    second = update(first, jax.tree.map(jnp.zeros_like, server.weights), nobody)
    assert (first.round, second.round) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, second._replace(round=first.round), first)


def test_plain_averaging_adds_the_mean_change():
    method = fedit(toy.SPEC, optax.sgd(1.0))
    server = toy.start(method)
    change = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), server.weights)
    after: Server = jax.jit(method.update)(jax.random.key(0), server, Combined(change, EVERYBODY))
    for name, value in flat(server.weights).items():
        np.testing.assert_allclose(flat(after.weights)[name], value + 0.1, rtol=1e-6, atol=1e-7)


def test_spare_components_are_held_but_do_not_train():
    server = toy.start(toy.METHOD)
    index = {m: jnp.tile(jnp.arange(4), (toy.LAYERS, 1)) for m in toy.TARGETS}
    gain = {m: jnp.tile(jnp.array([2.0, 0.0, 2.0, 0.0]), (toy.LAYERS, 1)) for m in toy.TARGETS}
    held = hold(toy.SPEC, server.weights, index, gain)
    for m in toy.TARGETS:
        np.testing.assert_allclose(
            held.scale[m][0], [2 * toy.SPEC.scale, 0, 2 * toy.SPEC.scale, 0], rtol=1e-6
        )
        assert held.trains[m].a[1].tolist() == held.trains[m].b[1].tolist() == [1, 0, 1, 0]
