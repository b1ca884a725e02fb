"""The contract of every method: its oracle, one program, stable state, any layout and order, frozen bits, bytes.

`oracle_factors` and `oracle_products` have each method by hand. The masked round runs with SGD and the tiered one, in
chunks, with AdamW and decay, both against the oracle; `on_devices` does the same on eight devices with momentum.
"""

from itertools import pairwise

import jax
import numpy as np
import optax
import oracle
import pytest
import toy
from compare import client_batches, close, flat, oracle_base, oracle_minibatches
from contract_methods import (
    CASES,
    FULL,
    MIXED,
    SPEC,
    WAYS,
    R,
    check_with_hand,
    effective,
    layout_of,
    method_of,
    played,
    population_of,
    replayed,
    rounds_by_hand,
)

from fslora_jax.federation.local import ClientOptimizer
from fslora_jax.methods import METHODS, Client, Server

HEAD = toy.D * toy.LABELS + toy.LABELS
every_case = pytest.mark.parametrize("case", CASES)


def test_every_method_has_its_row():
    assert {case.name for case in CASES.values()} == set(METHODS)


@every_case
@pytest.mark.parametrize("way", ["masked", "chunks"])
def test_a_round_is_the_equations(case, way):
    check_with_hand(case, played(case, way), WAYS[way].optimizer)


@every_case
def test_one_program_serves_all_rounds_ranks_and_orders_and_the_state_keeps_its_form(case):
    """Another order of the clients, and weights of another scale, are the same round."""
    found, population = played(case, "masked"), population_of(case)
    other = population._replace(shares=8 * population.shares)
    turned = replayed(case, "masked", cohorts=[ids[::-1] for ids in toy.COHORTS], population=other)
    close(effective(case, turned.servers[-1]), effective(case, found.servers[-1]), 1e-4)
    if not method_of(case).traits.full_rank:
        replayed(case, "masked", population=FULL)
    program = toy.compiled_round(
        method_of(case), toy.OPTIMIZERS["sgd"][0], layout_of(case, "masked"), 0.0, None
    )
    assert program._cache_size() == 1
    for one, other in pairwise(found.servers):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail(str(x)), one, other)


@every_case
@pytest.mark.parametrize("way", ["masked", "chunks"])
def test_what_nobody_trained_stays_bit_identical(case, way):
    """In the chunked rounds AdamW's decay would move it. What starts afresh, or is cut by an SVD, has no such rows."""
    found, still = played(case, way), 0
    for step in rounds_by_hand(case, found, WAYS[way].optimizer):
        old, new = flat(step.before.weights), flat(step.after.weights)
        for p in old:
            nobody = ~np.any([m[p] for m in step.moves], 0)
            still += nobody.sum()
            if not (CASES[case].svd or step.before.base_delta or case == "fedsa_lora"):
                np.testing.assert_array_equal(old[p][nobody], new[p][nobody])
        for m, delta in step.before.base_delta.items() if case == "xgblora" else ():
            layers = np.asarray(step.before.memory["xgblora"]) > 0
            moved = np.asarray(delta != step.after.base_delta[m]).any((1, 2))
            np.testing.assert_array_equal(moved, layers)
    assert (still > 0) == (not method_of(case).traits.full_rank or case in ONE_FACTOR)


ONE_FACTOR = {"ffa_lora", "rolora", "fedsa_lora", "xgblora", "rac_lora", "rac_lora drawing A"}
"""They train all r components, but not both factors of all layers, or do not send both."""

EVERYTHING = 4 * sum(t.layers * R * (t.i + t.o) for t in toy.TARGETS.values())
DENSE = 4 * sum(t.layers * t.i * t.o for t in toy.TARGETS.values())
INDICES = len(toy.TARGETS) * toy.LAYERS

# Bytes down of each client, from (bytes of factors up, ks), where they are not the bytes up.
DOWN = {
    "fslora": lambda up, ks: up + 4 * INDICES * ks * (ks < R),
    "hafl": lambda up, ks: 0 * up + EVERYTHING + 4 * INDICES * ks * (ks < R),
    "hafl of truncation": lambda up, ks: up + 4 * INDICES * ks * (ks < R),
    "fed_plora": lambda up, ks: 0 * up + EVERYTHING,
    "flora": lambda up, ks: 0 * up + up.sum(),
    "xgblora": lambda up, ks: 0 * up + up.sum(),
    "fedex_lora": lambda up, ks: up + min(up.sum(), DENSE),
}
BESIDE = {"hetlora": lambda ks: 4 + 0 * ks, "fed_plora": lambda ks: 4 * INDICES * ks * (ks < R)}
"""Bytes up beside factors and head."""


@every_case
def test_bytes_are_those_of_what_was_trained(case):
    ids, ks = toy.COHORTS[0], population_of(case).ranks[toy.COHORTS[0]]
    clients = Client(ids, ks, np.ones(len(ids)))
    counted = "zero_padding" if case == "hetlora" else case  # which counts before it prunes
    step = next(rounds_by_hand(counted, played(counted, "masked"), "sgd"))
    head = 0 if case == "fedsa_lora" else HEAD
    factors = np.array([4 * sum(m[p].sum() for p in m if p[0] != "head") for m in step.moves])
    down, up = method_of(case).traffic(0, clients, HEAD)
    np.testing.assert_array_equal(up, factors + 4 * head + BESIDE.get(case, lambda ks: 0)(ks))
    expected = DOWN.get(case, lambda up, ks: up)(factors, ks) + 4 * head
    np.testing.assert_array_equal(np.broadcast_to(down, ks.shape), expected)


@every_case
def test_it_learns(case):
    """The global model's loss falls on the data of the three clients that train it.

    From the second server on: the first has a random B, which methods that start afresh do not go on from.
    """
    ids = toy.COHORTS[0]
    servers = replayed(case, "masked", cohorts=[ids] * 24).servers
    data = [b for c in ids for t in range(3) for b in oracle_minibatches(client_batches(MIXED, int(c), t))]
    first, last = (
        np.mean([global_loss(case, server, batch) for batch in data]) for server in (servers[1], servers[-1])
    )
    assert last < 0.97 * first


def global_loss(case: str, server: Server, batch: oracle.Minibatch) -> float:
    """Of what is evaluated."""
    w = effective(case, server)
    base = oracle.Base(oracle_base().embed, {at: w[at] for at in oracle_base().w})
    none = {
        (*at, f): np.zeros(shape)
        for at, v in base.w.items()
        for f, shape in (("B", (len(v), 1)), ("A", (1, v.shape[1])))
    }
    flat_head = {p: v for p, v in w.items() if p[0] == "head"}
    ones = {at: np.eye(1) for at in base.w}
    return oracle.loss_and_gradients(base, none | flat_head, SPEC.scales(), ones, batch)[0]


class Clipped(oracle.Sgd):
    """With gradients clipped to a norm of 0.2 over all that trains."""

    def step(self, x, g, moves, t):
        norm = np.sqrt(sum((np.where(moves[p], v, 0.0) ** 2).sum() for p, v in g.items()))
        return super().step(x, {p: v * min(1.0, 0.2 / norm) for p, v in g.items()}, moves, t)


def test_what_is_frozen_does_not_count_in_the_norm_that_is_clipped(monkeypatch):
    """FFA-LoRA has a gradient at A, which it does not follow."""
    clipping = ClientOptimizer(optax.clip_by_global_norm(0.2), toy.rate)
    monkeypatch.setitem(toy.OPTIMIZERS, "clipped", (clipping, lambda: Clipped(toy.rate)))
    monkeypatch.setitem(WAYS, "clipped", WAYS["masked"]._replace(optimizer="clipped"))
    check_with_hand("ffa_lora", replayed("ffa_lora", "clipped"), "clipped")


@pytest.mark.parametrize("case", ["fed_plora", "hafl"])
def test_folding_or_freezing_starts_from_the_global_models_loss(case):
    """For every k, while truncation and FSLoRA do not."""
    for name, same in ((case, True), ("hafl of truncation", False), ("fslora", False)):
        found = played(name, "masked")
        for c in toy.COHORTS[0].tolist():
            batch = oracle_minibatches(client_batches(MIXED, c, 0))[0]
            alike = np.isclose(found.losses[0, c][0], global_loss(name, found.servers[0], batch), rtol=1e-5)
            assert alike == (same or MIXED.ranks[c] == R)


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["fslora", "zero_padding", "raflora of factors", "hafl", "hafl of truncation", "fed_plora"]
)
def test_at_full_rank_it_is_fedit(case):
    found = replayed(case, "masked", population=FULL).servers[-1]
    close(flat(found.weights), flat(played("fedit", "masked").servers[-1].weights), 1e-5)


def test_raflora_at_equal_ranks_is_flexlora():
    one, other = (replayed(case, "masked", population=FULL).servers[-1] for case in ("raflora", "flexlora"))
    close(effective("raflora", one), effective("flexlora", other), 1e-5)


def test_mixed_ranks_are_not_that_limit():
    """The limits above would be no news if ranks did not matter."""
    ends = [
        effective(case, replayed(case, "masked", population=MIXED).servers[-1])["up", 0]
        for case in ("fslora", "zero_padding", "raflora of factors", "fed_plora")
    ]
    for one, other in pairwise(ends):
        assert np.abs(one - other).max() > 1e-3
    assert SPEC.r == R
