"""Identities of the federated methods: HetLoRA's ranks, weights and penalty."""

import jax
import jax.numpy as jnp
import numpy as np
from meeting import LAYERS, MIXED, R, begin, make, meet

from fslora_jax.methods import Client, Method, Server
from fslora_jax.methods.hetlora import NAME as HETLORA
from fslora_jax.methods.hetlora import product_norm, tail_norm, tail_rows
from fslora_jax.types import Local, Pair, Trainable


def hetlora_upload(method: Method, server: Server, factor: float, rank: int, k: int = R) -> tuple[int, Local]:
    """The rank that a client has after its factors shrank or grew by ``factor``."""
    client = Client(*map(jnp.asarray, (0, k, 1.0)), memory={HETLORA: {"rank": jnp.int32(rank)}})
    before = method.download(jax.random.key(0), server, client, R)
    after = before._replace(weights=jax.tree.map(lambda x: factor * x, before.weights))
    payload, memory = method.upload(jax.random.key(0), server, before, after, client)
    held = int(payload.trains["q"].a.sum(-1)[0])
    assert held == memory[HETLORA]["rank"]
    return held, before


def test_hetloras_ranks_never_rise_nor_fall_below_the_least():
    method = make("hetlora", decay=0.7, least_rank=2)
    server = begin(method)
    assert hetlora_upload(method, server, 2.0, -1)[0] == R
    assert hetlora_upload(method, server, 1.0, -1)[0] == R
    assert hetlora_upload(method, server, 0.5, -1)[0] == 2
    assert hetlora_upload(method, server, 0.5, 2)[0] == 2
    assert hetlora_upload(method, server, 2.0, 2)[0] == 2
    assert hetlora_upload(method, server, 0.5, -1, k=1)[0] == 1
    _, before = hetlora_upload(method, server, 1.0, 2)
    assert before.trains["q"].a.sum(-1).tolist() == [2.0, 2.0]


def test_hetlora_never_prunes_at_b_zero():
    """Also where the tail of A has shrunk, by decay say."""
    method = make("hetlora", decay=0.7, least_rank=1)
    server = begin(method)
    adapter = {m: pair._replace(b=0 * pair.b) for m, pair in server.weights.adapter.items()}
    blank = server._replace(weights=Trainable(adapter, {}))
    assert hetlora_upload(method, blank, 0.5, -1)[0] == R


def test_hetloras_weights_are_shares_of_norms_whatever_their_scale():
    method = make("hetlora")
    server = begin(method)
    met = meet(method, server, MIXED, shares=(0.2, 0.5, 0.3))
    other = meet(method, server, MIXED, shares=(0.4, 0.1, 0.5))
    norms = [float(product_norm(h.weights.adapter)) for h in met.held]
    for m, pair in met.after.weights.adapter.items():
        wanted = sum(
            n / sum(norms) * np.pad(h.weights.adapter[m].a, ((0, 0), (0, R - k), (0, 0)))
            for n, h, k in zip(norms, met.held, MIXED, strict=True)
        )
        np.testing.assert_allclose(pair.a, wanted, atol=1e-5)
        np.testing.assert_allclose(pair.a, other.after.weights.adapter[m].a, atol=1e-6)


def test_hetlora_with_equal_norms_is_fedit_and_zero_norms_do_not_wipe_a():
    het, fedit = make("hetlora", decay=1.0, tail_penalty=0.0), make("fedit")
    server = begin(fedit)
    equal = (0.5, 0.5)
    for noise in (0.0, None):
        start = (
            server
            if noise == 0.0
            else server._replace(
                weights=Trainable({m: p._replace(b=0 * p.b) for m, p in server.weights.adapter.items()}, {})
            )
        )
        one, other = (
            meet(method, start, (R, R), shares=equal, noise=0.0).after.weights.adapter
            for method in (het, fedit)
        )
        for m in one:
            np.testing.assert_allclose(one[m].a, other[m].a, atol=1e-6)
            assert np.abs(one[m].a).max() > 0.1


def test_hetloras_tail_penalty_bounds_the_product_of_the_tail_and_has_a_gradient():
    method = make("hetlora", decay=0.4, tail_penalty=1.0)
    held = method.download(
        jax.random.key(0),
        begin(method),
        Client(*map(jnp.asarray, (0, R, 1.0)), memory={HETLORA: {"rank": jnp.int32(-1)}}),
        R,
    )
    tail = tail_rows(held, 0.4)
    assert [rows.sum() for rows in tail.values()] == [2 * LAYERS] * 2
    cut = {m: Pair(*(x * tail[m][..., None] for x in pair)) for m, pair in held.weights.adapter.items()}
    assert tail_norm(held.weights.adapter, tail) >= product_norm(cut)
    blank = {m: pair._replace(b=0 * pair.b) for m, pair in held.weights.adapter.items()}
    gradient = jax.grad(lambda x: method.penalty(held._replace(weights=Trainable(x, {}))))(blank)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    grown = jax.grad(lambda x: method.penalty(held._replace(weights=Trainable(x, {}))))(held.weights.adapter)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(grown))
