"""Pruning over wireless: the split of the bandwidth against its laws, and what clients then send."""

import jax
import numpy as np
import toy
import wrapped
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.methods.wrappers.prune import split_bandwidth

CLIENTS = st.lists(st.tuples(st.floats(0.01, 5), st.floats(0.1, 50)), min_size=1, max_size=6)


def seconds(compute, load, plan) -> np.ndarray:
    """What each client takes for what it keeps."""
    kept = 1 - plan.rho
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(kept > 0, kept * (compute + load / plan.bandwidth), 0.0)


@given(CLIENTS, st.floats(0.05, 20), st.floats(0.1, 100))
def test_the_deadline_is_kept_and_met_where_something_is_pruned(clients, deadline, bandwidth):
    compute, load = np.array(clients).T
    plan = split_bandwidth(compute, load, deadline, bandwidth)
    assert plan.bandwidth.sum() <= bandwidth * (1 + 1e-9)
    assert ((plan.rho >= 0) & (plan.rho <= 1)).all()
    took = seconds(compute, load, plan)
    assert (took <= deadline * (1 + 1e-9)).all()
    some = (plan.rho > 1e-9) & (plan.rho < 1)
    np.testing.assert_allclose(took[some], deadline, rtol=1e-6)


@given(CLIENTS, st.floats(0.05, 20), st.floats(0.1, 100), st.integers(0, 99))
def test_no_random_split_prunes_less(clients, deadline, bandwidth, seed):
    compute, load = np.array(clients).T
    best = split_bandwidth(compute, load, deadline, bandwidth).rho.sum()
    for share in np.random.default_rng(seed).dirichlet(np.ones(len(clients)), size=20):
        other = np.maximum(0, 1 - deadline / (compute + load / np.maximum(share * bandwidth, 1e-12)))
        assert best <= other.sum() + 1e-6


@given(CLIENTS, st.floats(0.05, 20), st.floats(0.1, 100), st.floats(1, 5))
def test_more_bandwidth_never_prunes_more(clients, deadline, bandwidth, factor):
    compute, load = np.array(clients).T
    less, more = (
        split_bandwidth(compute, load, deadline, b).rho.sum() for b in (bandwidth, factor * bandwidth)
    )
    assert more <= less + 1e-6


OPTIONS = {"deadline": 4.0, "bandwidth": 250.0, "efficiency": [1.0, 2.0, 8.0]}


def test_clients_send_the_most_important_components_and_each_is_averaged_over_its_senders():
    method = wrapped.make("fedit", {"prune": OPTIONS})
    server = wrapped.start(method)
    sent = wrapped.one_round(method, server)
    up = np.asarray(method.traffic(0, sent.clients, 0).up)
    each = toy.LAYERS * sum(t.i + t.o for t in toy.TARGETS.values())
    counts = up // (4 * each)
    assert counts.tolist() == [0, 2, 4]
    for m, pair in server.weights.adapter.items():
        a, b = map(np.asarray, pair)
        strength = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        for n in range(toy.LAYERS):
            order = np.argsort(-strength[n])
            senders = np.zeros(wrapped.SPEC.r)
            total = np.zeros_like(a[n])
            for c, (count, weight) in enumerate(zip(counts, wrapped.WEIGHTS, strict=True)):
                kept = np.isin(np.arange(wrapped.SPEC.r), order[:count])
                change = np.asarray(sent.payload.delta.adapter[m].a[c, n])
                assert (change[~kept] == 0).all() and (change[kept] != 0).all()
                assert ((np.asarray(sent.before.scale[m][c, n]) > 0) == kept).all()
                senders += weight * kept
                total += weight * change
            mean = total / np.where(senders > 0, senders, 1)[:, None]
            np.testing.assert_allclose(sent.server.weights.adapter[m].a[n], a[n] + mean, atol=1e-6)


def test_personal_parts_are_not_pruned_and_not_counted():
    """FedSA-LoRA: B trains everywhere and stays with the client, bit by bit; fewer rows of A travel."""
    method = wrapped.make("fedsa_lora", {"prune": OPTIONS | {"bandwidth": 125.0}})
    first, second = wrapped.rounds(method, 2)
    width = toy.LAYERS * sum(t.i for t in toy.TARGETS.values())
    counts = np.asarray(method.traffic(0, first.clients, 18).up) // (4 * width)
    assert counts.min() < wrapped.SPEC.r
    for m in toy.TARGETS:
        assert (np.asarray(first.before.trains[m].b) == 1).all()
        found = np.asarray(first.before.trains[m].a).sum(-1)
        assert (found == counts[:, None]).all()
        np.testing.assert_array_equal(second.before.weights.adapter[m].b, first.after.weights.adapter[m].b)
    jax.tree.map(np.testing.assert_array_equal, second.before.weights.head, first.after.weights.head)
