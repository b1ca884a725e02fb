"""The compiled round against the equations: identities 3, 4, 5 and 7 of the method; seeds and executables.

Identities 1 and 2 are in test_sketch.py and test_methods.py, 6 and 9 in test_round_draws.py, 8 in test_methods.py;
devices and processes, which belong to 7, in test_devices.py.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from compare import check_with_oracle, client_batches, close, drawn, flat, fslora_with, give, last, played

from fslora_jax.federation import local
from fslora_jax.federation.cohort import plan_layout, sample_cohort
from fslora_jax.federation.local import Passes
from fslora_jax.methods import Client, Payload, Server, fedit
from fslora_jax.types import Batch, Local

CELLS = ("tokens", "segments", "positions", "types", "places")
UNEQUAL = toy.POPULATION._replace(shares=np.array([1.0, 2, 3, 4, 5, 6, 7]))


# --- Slow and failing clients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
def test_clients_of_unequal_steps_are_a_loop_of_real_lengths_over_those_that_report(optimizer):
    steps = toy.STEPS._replace(min_local_steps=1, failure_rate=0.4)
    done = [steps.done(len(toy.RANKS), t)[ids] for t, ids in enumerate(toy.COHORTS)]
    assert {0, 1, 2, 3} >= set(np.concatenate(done)) >= {0, 2}  # the seed makes some fail and some stop early
    found = toy.play(fslora_with("average"), toy.OPTIMIZERS[optimizer][0], steps=steps)
    check_with_oracle(found, optimizer, steps=steps)


def test_a_round_in_which_all_fail_changes_nothing():
    steps = toy.STEPS._replace(failure_rate=1 - 1e-9)
    found = toy.play(fslora_with("average"), toy.OPTIMIZERS["adamw"][0], steps=steps)
    for server in found.servers[1:]:
        for a, b in zip(
            jax.tree.leaves(server.weights), jax.tree.leaves(found.servers[0].weights), strict=True
        ):
            np.testing.assert_array_equal(a, b)


# --- Identities 3 and 5 -----------------------------------------------------------------------------------------


def untouched(before: Server, ids: np.ndarray) -> dict[tuple, np.ndarray]:
    """For each factor, which rank components nobody drew."""
    found = {}
    for m in toy.TARGETS:
        for n in range(toy.LAYERS):
            anyone = np.concatenate([drawn(before, int(c), int(toy.RANKS[c]))[m, n] for c in ids])
            found[m, n] = ~np.isin(np.arange(toy.R), anyone)
    return found


def check_untouched(found: toy.Played) -> None:
    """Identity 5: from round to round, exactly the components that somebody drew have moved."""
    still = 0
    for (before, after), ids in zip(pairwise(found.servers), toy.COHORTS, strict=True):
        old, new = flat(before.weights), flat(after.weights)
        for (m, n), nobody in untouched(before, ids).items():
            moved_a = (old[m, n, "A"] != new[m, n, "A"]).any(1)
            moved_b = (old[m, n, "B"] != new[m, n, "B"]).any(0)
            assert (moved_a == ~nobody).all()
            assert (moved_b == ~nobody).all()
            still += nobody.sum()
    assert still > 5


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
def test_identities_3_and_5_of_whole_rounds(optimizer):
    """Extracted rounds are masked rounds are the equations, and what nobody drew stays bit-identical."""
    extracted, masked = (played(optimizer, "average", layout) for layout in ("tiered", "masked"))
    for found in (extracted, masked):
        check_with_oracle(found, optimizer)
        check_untouched(found)
    close(last(extracted), last(masked), 5e-6)
    close(extracted.losses, masked.losses)


def test_identity_3_of_modules_with_ranks_and_scales_of_their_own():
    """In tiers and in masks; momentum at the server would show a component that nobody drew."""
    extracted, masked = (played("momentum", "momentum", layout, "mixed") for layout in ("tiered", "masked"))
    assert extracted.servers[0].weights.adapter["down"].a.shape == (toy.LAYERS, 4, toy.F)
    for found in (extracted, masked):
        check_with_oracle(found, "momentum", "momentum", spec="mixed")
    close(last(extracted), last(masked), 5e-6)


@pytest.mark.parametrize("server", ["momentum", "adamw"])
def test_identity_5_with_a_server_optimizer(server):
    found = played("sgd", server, "tiered")
    check_with_oracle(found, "sgd", server)
    check_untouched(found)


def test_data_size_weights_are_the_equations():
    found = toy.play(toy.METHOD, toy.OPTIMIZERS["sgd"][0], population=UNEQUAL)
    check_with_oracle(found, "sgd", population=UNEQUAL)
    assert not np.allclose(last(found)["up", 0, "A"], last(played("sgd", "average", "tiered"))["up", 0, "A"])


# --- Identity 4 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
def test_identity_4_at_full_rank_it_is_federated_lora(optimizer):
    everyone = toy.make_population(ranks=np.full_like(toy.RANKS, toy.R))
    ours, fedits = (
        toy.play(method, toy.OPTIMIZERS[optimizer][0], population=everyone, tiered=False)
        for method in (toy.METHOD, fedit(toy.SPEC, toy.SERVERS["average"][0]))
    )
    close(last(ours), last(fedits), 5e-6)
    close(ours.losses, fedits.losses)
    check_with_oracle(fedits, optimizer, population=everyone)


# --- Identity 7 ------------------------------------------------------------------------------------------------


def test_identity_7_a_cohort_is_a_loop_over_clients():
    """The same round by the package's own parts, one client after the other, each alone."""
    method, base, (optimizer, _) = toy.METHOD, jax.device_put(toy.BASE), toy.OPTIMIZERS["momentum"]
    found, t = played("momentum", "average", "tiered"), 1
    server, ids = found.servers[t], toy.COHORTS[t]

    @jax.jit
    def alone(given: Local, batches: Batch) -> tuple[Payload, jax.Array]:
        tier, batches = jax.tree.map(lambda x: x[None], (given, batches))
        first = server.round * toy.STEPS.local_steps
        (after,), loss = local.train(toy.make_score(), optimizer, base, [tier], batches, first, None)
        who = Client(*(x[None] for x in (jnp.int32(0), jnp.int32(1), jnp.float32(1))))
        upload = jax.vmap(method.upload, in_axes=(0, None, 0, 0, 0))
        return upload(jax.random.split(jax.random.key(0), 1), server, tier, after, who)[0], loss[0]

    payloads, losses = [], {}
    for c in ids.tolist():
        given = give(server, c, int(toy.RANKS[c]), cap=int(toy.RANKS[c]))
        payload, losses[t, c] = alone(given, client_batches(toy.POPULATION, c, t))
        payloads.append(payload)
    combined = jax.jit(method.combine)(payloads, [jnp.full(1, 1 / len(ids))] * len(ids))
    looped = method.update(jax.random.key(0), server, combined)
    close(flat(found.servers[t + 1].weights), flat(looped.weights), 5e-6)
    close({key: found.losses[key] for key in losses}, losses)


def test_identity_7_chunks_and_empty_slots_change_nothing():
    """Three clients in four places: a server with momentum would show what an empty slot had touched."""
    chunked = toy.play(fslora_with("momentum"), toy.OPTIMIZERS["adamw"][0], chunks=2)
    check_with_oracle(chunked, "adamw", "momentum")


@pytest.mark.parametrize("passes", [Passes(1), Passes(1, skip=False), Passes(2)], ids=str)
def test_identity_7_a_minibatch_in_passes_is_the_minibatch(passes):
    """Two rows of one example each; in chunks, in tiers, with decay."""
    steps = toy.STEPS._replace(passes=passes)
    found = toy.play(fslora_with("momentum"), toy.OPTIMIZERS["adamw"][0], chunks=2, steps=steps)
    check_with_oracle(found, "adamw", "momentum")


def test_passes_without_examples_are_not_run():
    """Of four rows two are taken: a score that counts its calls is asked twice, or four times without skipping."""
    batch = jax.tree.map(lambda x: x[None], client_batches(toy.POPULATION, 3, 0))
    wide = batch._replace(
        **{name: jnp.pad(getattr(batch, name), ((0, 0), (0, 0), (0, 2), (0, 0))) for name in CELLS}
    )
    tier = jax.tree.map(lambda x: x[None], give(toy.start(toy.METHOD), 3, 3, toy.R))
    optimizer, score, base = toy.OPTIMIZERS["sgd"][0], toy.make_score(), jax.device_put(toy.BASE)
    for passes, expected in ((Passes(1), 2), (Passes(1, skip=False), 4), (None, 1)):
        calls = []

        def counting(*arguments, calls=calls):
            jax.debug.callback(lambda: calls.append(1))
            return score(*arguments)

        (after,), losses = local.train(
            counting, optimizer, base, [tier], wide, jnp.int32(0), None, passes=passes
        )
        jax.effects_barrier()
        assert len(calls) == expected * toy.STEPS.local_steps
        (plain,), right = local.train(score, optimizer, base, [tier], batch, jnp.int32(0), None)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.weights, plain.weights)
        np.testing.assert_allclose(losses, right, rtol=1e-6)


def test_identity_7_dropout_is_the_clients_own_in_any_layout():
    optimizer, without = toy.OPTIMIZERS["sgd"][0], played("sgd", "average", "tiered")
    tiers = toy.play(toy.METHOD, optimizer, dropout=0.4)
    masks = toy.play(toy.METHOD, optimizer, dropout=0.4, tiered=False, chunks=2)
    close(last(tiers), last(masks), 5e-6)
    close(tiers.losses, masks.losses)
    assert all(not np.allclose(tiers.losses[c], without.losses[c]) for c in tiers.losses)


# --- Seeds and executables ---------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bits_and_another_seed_other_draws():
    first = played("sgd", "average", "tiered")
    again, other = (toy.play(toy.METHOD, toy.OPTIMIZERS["sgd"][0], seed=seed) for seed in (5, 6))
    for name, value in last(first).items():
        assert np.array_equal(value, last(again)[name])
    assert not np.allclose(last(first)["up", 0, "A"], last(other)["up", 0, "A"])


def test_one_executable_serves_all_rounds_and_all_ratios():
    optimizer = toy.OPTIMIZERS["sgd"][0]
    cohorts = [sample_cohort(0, t, len(toy.RANKS), 3) for t in range(6)]
    tiers = plan_layout(toy.RANKS, cohorts, r=toy.R, tiered=True)
    toy.play(toy.METHOD, optimizer, cohorts=cohorts, layout=tiers)
    masks = plan_layout(toy.RANKS, toy.COHORTS, r=toy.R, tiered=False)
    for ranks in (toy.RANKS, np.arange(7) % toy.R + 1, np.full(7, toy.R)):
        toy.play(toy.METHOD, optimizer, population=toy.make_population(ranks=ranks), layout=masks)
    for layout in (tiers, masks):
        assert toy.compiled_round(toy.METHOD, optimizer, layout, 0.0, None)._cache_size() == 1
