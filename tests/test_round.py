"""The compiled round against the equations: the oracle, identities 3 to 7 and 9 of the method, and broken copies.

Identities 1 and 2 are in test_sketch.py and test_methods.py, 8 in test_methods.py; devices and processes, which
belong to 7, in test_devices.py.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import combinations, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import toy

from fslora_jax import lora
from fslora_jax.federation import local
from fslora_jax.federation.cohort import Layout, plan_layout, sample_cohort
from fslora_jax.federation.feed import Population
from fslora_jax.federation.local import ClientOptimizer
from fslora_jax.federation.round import Cohort, make_round
from fslora_jax.methods import Client, Combined, Method, Payload, Server, Spec, base, fedit, fslora
from fslora_jax.sketch import Sketch, draw, gather, scatter_sum
from fslora_jax.types import Batch, Local, Pair, Trainable

LAYOUTS = ["tiered", "masked"]
UNEQUAL = toy.POPULATION._replace(shares=np.array([1.0, 2, 3, 4, 5, 6, 7]))


@cache
def fslora_with(server: str) -> Method:
    return toy.METHOD if server == "average" else fslora(toy.SPEC, toy.SERVERS[server][0])


@cache
def played(optimizer: str, server: str, layout: str) -> toy.Played:
    return toy.play(fslora_with(server), toy.OPTIMIZERS[optimizer][0], tiered=layout == "tiered")


def last(found: toy.Played) -> oracle.Parameters:
    return toy.flat(found.servers[-1].weights)


def check_with_oracle(
    found: toy.Played,
    optimizer: str,
    server: str = "average",
    *,
    population: Population = toy.POPULATION,
    cohorts: Sequence[np.ndarray] = toy.COHORTS,
) -> None:
    """Global weights after every round and every client's losses, computed by hand from the first server on."""
    x = toy.flat(found.servers[0].weights)
    hand = toy.SERVERS[server][1]()
    losses = {}
    for t, ids in enumerate(cohorts):
        x, by_client = oracle.run_round(
            toy.oracle_base(),
            x,
            toy.participants(found.servers[t], population, ids),
            r=toy.R,
            s=toy.SPEC.scale,
            optimizer=toy.OPTIMIZERS[optimizer][1],
            server=hand,
            first_step=t * toy.STEPS.local_steps,
        )
        losses |= {(t, int(c)): loss for c, loss in zip(ids, by_client, strict=True)}
        toy.close(toy.flat(found.servers[t + 1].weights), x)
    toy.close(found.losses, losses)


# --- Identity 3 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
def test_identity_3_whole_rounds_are_the_equations(optimizer, layout):
    check_with_oracle(played(optimizer, "average", layout), optimizer)


@pytest.mark.parametrize("optimizer", toy.OPTIMIZERS)
def test_identity_3_extracted_rounds_are_masked_rounds(optimizer):
    extracted, masked = (played(optimizer, "average", layout) for layout in LAYOUTS)
    toy.close(last(extracted), last(masked), 5e-6)
    toy.close(extracted.losses, masked.losses)


@pytest.mark.parametrize("server", ["momentum", "adamw"])
def test_server_optimizers_are_the_equations(server):
    check_with_oracle(played("sgd", server, "tiered"), "sgd", server)


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
    toy.close(last(ours), last(fedits), 5e-6)
    toy.close(ours.losses, fedits.losses)
    check_with_oracle(fedits, optimizer, population=everyone)


# --- Identity 5 ------------------------------------------------------------------------------------------------


def untouched(before: Server, ids: np.ndarray) -> dict[tuple, np.ndarray]:
    """For each factor, which rank components nobody drew."""
    found = {}
    for m in toy.TARGETS:
        for n in range(toy.LAYERS):
            anyone = np.concatenate([toy.drawn(before, int(c), int(toy.RANKS[c]))[m, n] for c in ids])
            found[m, n] = ~np.isin(np.arange(toy.R), anyone)
    return found


@pytest.mark.parametrize(
    ("optimizer", "server", "layout"),
    [(optimizer, "average", layout) for optimizer in toy.OPTIMIZERS for layout in LAYOUTS]
    + [("sgd", "momentum", "tiered"), ("sgd", "adamw", "tiered")],
)
def test_identity_5_what_nobody_drew_stays_bit_identical(optimizer, server, layout):
    still = 0
    rounds = zip(pairwise(played(optimizer, server, layout).servers), toy.COHORTS, strict=True)
    for (before, after), ids in rounds:
        old, new = toy.flat(before.weights), toy.flat(after.weights)
        for (m, n), nobody in untouched(before, ids).items():
            moved_a = (old[m, n, "A"] != new[m, n, "A"]).any(1)
            moved_b = (old[m, n, "B"] != new[m, n, "B"]).any(0)
            assert (moved_a == ~nobody).all()
            assert (moved_b == ~nobody).all()
            still += nobody.sum()
    assert still > 5


# --- Identity 6 ------------------------------------------------------------------------------------------------


def handing_out(method: Method, spec: Spec, index: dict[str, np.ndarray]) -> Method:
    """The method with draws from a table: module -> components ``(clients, N, most)`` of each client."""

    def download(key, server: Server, client: Client, cap: int):
        gain = jnp.where(jnp.arange(cap) < client.k, spec.r / client.k, 0.0)
        given = {m: jnp.asarray(index[m], jnp.int32)[client.id][:, :cap] for m in index}
        gains = {m: jnp.broadcast_to(gain, given[m].shape) for m in given}
        return base.hold(spec, server.weights, given, gains)

    return method._replace(download=download)


def permuted(weights: Trainable, order: np.ndarray) -> Trainable:
    adapter = {m: Pair(pair.a[:, order], pair.b[:, order]) for m, pair in weights.adapter.items()}
    return weights._replace(adapter=adapter)


def test_identity_6_permuting_the_rank_commutes_with_a_round():
    rng = np.random.default_rng(0)
    order = rng.permutation(toy.R)
    tables = {
        m: np.array([[rng.permutation(toy.R) for _ in range(toy.LAYERS)] for _ in toy.RANKS])
        for m in toy.TARGETS
    }
    method = fslora(toy.SPEC, toy.SERVERS["momentum"][0])
    server = toy.start(method)

    def after(server: Server, tables: dict[str, np.ndarray]) -> Trainable:
        handed = handing_out(method, toy.SPEC, tables)
        found = toy.play(handed, toy.OPTIMIZERS["momentum"][0], server=server, tiered=False)
        return found.servers[-1].weights

    there = {m: np.argsort(order)[table] for m, table in tables.items()}
    permuted_first = after(server._replace(weights=permuted(server.weights, order)), there)
    permuted_last = permuted(after(server, tables), order)
    toy.close(toy.flat(permuted_first), toy.flat(permuted_last), 1e-6)
    assert not np.array_equal(order, np.arange(toy.R))


# --- Identity 7 ------------------------------------------------------------------------------------------------


def test_identity_7_a_cohort_is_a_loop_over_clients():
    """The same round by the package's own parts, one client after the other, each alone."""
    method, (optimizer, _) = toy.METHOD, toy.OPTIMIZERS["momentum"]
    found, t = played("momentum", "average", "tiered"), 1
    server, ids = found.servers[t], toy.COHORTS[t]

    @partial(jax.jit, compiler_options=toy.QUICK)
    def alone(given: Local, batches: Batch) -> tuple[Payload, jax.Array]:
        tier, batches = jax.tree.map(lambda x: x[None], (given, batches))
        first = server.round * toy.STEPS.local_steps
        (after,), loss = local.train(toy.make_apply(), optimizer, toy.BASE, [tier], batches, first, None)
        return jax.vmap(method.upload)(tier, after), loss[0]

    payloads, losses = [], {}
    for c in ids.tolist():
        given = toy.give(server, c, int(toy.RANKS[c]), cap=int(toy.RANKS[c]))
        payload, losses[t, c] = alone(given, toy.client_batches(toy.POPULATION, c, t))
        payloads.append(payload)
    combined = jax.jit(method.combine)(payloads, [jnp.full(1, 1 / len(ids))] * len(ids))
    looped = method.update(server, combined)
    toy.close(toy.flat(found.servers[t + 1].weights), toy.flat(looped.weights), 5e-6)
    toy.close({key: found.losses[key] for key in losses}, losses)


def test_identity_7_chunks_and_empty_slots_change_nothing():
    """Three clients in four places: a server with momentum would show what an empty slot had touched."""
    chunked = toy.play(fslora_with("momentum"), toy.OPTIMIZERS["adamw"][0], chunks=2)
    check_with_oracle(chunked, "adamw", "momentum")


def test_identity_7_dropout_is_the_clients_own_in_any_layout():
    optimizer, without = toy.OPTIMIZERS["sgd"][0], played("sgd", "average", "tiered")
    tiers = toy.play(toy.METHOD, optimizer, dropout=0.4)
    masks = toy.play(toy.METHOD, optimizer, dropout=0.4, tiered=False, chunks=2)
    toy.close(last(tiers), last(masks), 5e-6)
    toy.close(tiers.losses, masks.losses)
    assert all(not np.allclose(tiers.losses[c], without.losses[c]) for c in tiers.losses)


# --- Identity 9 ------------------------------------------------------------------------------------------------


class Quadratic:
    """Two clients of ranks 1 and 2 with ``loss = |W0 + s B S A - T|^2 / 2``, and all their draws as one cohort."""

    m, n, r, s, lr, ks = 4, 3, 4, 0.7, 0.25, (2, 1)

    def __init__(self):
        rng = np.random.default_rng(1)
        self.w0, self.target = rng.normal(size=(2, self.m, self.n))
        self.b, self.a = rng.normal(size=(self.m, self.r)), rng.normal(size=(self.r, self.n))
        self.draws = [np.array(c) for k in self.ks for c in combinations(range(self.r), k)]

    def gradient_by_enumeration(self) -> tuple[np.ndarray, np.ndarray]:
        """Of f_S in B and A: the mean over clients of the mean over their draws."""
        grads = []
        for k in self.ks:
            sketches = [oracle.sketch(i, self.r) for i in self.draws if len(i) == k]
            gs = [self.w0 + self.s * self.b @ sk @ self.a - self.target for sk in sketches]
            grad_b = np.mean([self.s * g @ self.a.T @ sk for g, sk in zip(gs, sketches, strict=True)], 0)
            grad_a = np.mean([self.s * sk @ self.b.T @ g for g, sk in zip(gs, sketches, strict=True)], 0)
            grads.append((grad_b, grad_a))
        return tuple(np.mean(x, 0) for x in zip(*grads, strict=True))

    def gradient_in_closed_form(self) -> tuple[np.ndarray, np.ndarray]:
        """Of ``f + (s^2 w / 2) [r/(r-1) sum_j |b_j|^2 |a_j|^2 - |BA|^2/(r-1)]`` with the mean ``w`` of ``r/k - 1``."""
        w = np.mean([self.r / k - 1 for k in self.ks])
        ba = self.b @ self.a
        g = self.w0 + self.s * ba - self.target
        norms_a, norms_b = (self.a**2).sum(1), (self.b**2).sum(0)
        noise_b = (self.r * self.b * norms_a - ba @ self.a.T) / (self.r - 1)
        noise_a = (self.r * self.a * norms_b[:, None] - self.b.T @ ba) / (self.r - 1)
        return (
            self.s * g @ self.a.T + self.s**2 * w * noise_b,
            self.s * self.b.T @ g + self.s**2 * w * noise_a,
        )

    def mean_update(self, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
        """Of B and A in one round of the package, in which every draw of every client is one slot."""

        def apply(w0, tiers, batch, keys):
            own = [(Pair(*(f[:, 0] for f in t.weights.adapter["q"])), t.scale["q"][:, 0]) for t in tiers]
            eye = jnp.broadcast_to(jnp.eye(self.n), (len(self.draws), self.n, self.n))
            return w0.T + lora.per_client(lambda mine, x: lora.delta(*mine, x), own, eye)

        def loss(effective, batch):
            return 0.5 * ((effective - self.target.T) ** 2).sum((1, 2))

        monkeypatch.setattr(local, "cross_entropy", loss)
        spec = Spec({"q": lora.Target(self.n, self.m, 1)}, self.r, self.s)
        table = np.array([[np.resize(i, max(self.ks))] for i in self.draws])
        method = handing_out(fslora(spec, optax.sgd(1.0)), spec, {"q": table})
        server = method.init(jax.random.key(0), {})
        pair = Pair(jnp.float32(self.a)[None], jnp.float32(self.b.T)[None])
        server = server._replace(weights=Trainable({"q": pair}, {}))

        k = np.array([len(i) for i in self.draws])
        share = np.array([1 / (len(self.ks) * (k == mine).sum()) for mine in k])
        clients = Client(jnp.arange(len(k)), jnp.int32(k), jnp.float32(share))
        nothing = Batch(*[jnp.zeros((len(k), 1, 1, 1), jnp.int32)] * 4, *[jnp.zeros((len(k), 1, 1))] * 2)
        cohort = jax.tree.map(lambda x: x[None, None], Cohort(clients, nothing))
        optimizer = ClientOptimizer(optax.identity(), lambda _: jnp.float32(self.lr))
        one_round = jax.jit(make_round(apply, method, optimizer, Layout(tuple(k.tolist()), 1), local_steps=1))
        moved = one_round(jnp.float32(self.w0), server, toy.run_keys(), cohort)[0].weights.adapter["q"]
        return np.asarray(moved.b - pair.b)[0].T, np.asarray(moved.a - pair.a)[0]


def test_identity_9_the_mean_update_is_the_gradient_of_the_sketched_objective(monkeypatch):
    q = Quadratic()
    for found, by_hand, closed in zip(
        q.mean_update(monkeypatch), q.gradient_by_enumeration(), q.gradient_in_closed_form(), strict=True
    ):
        np.testing.assert_allclose(by_hand, closed, rtol=1e-10)
        np.testing.assert_allclose(found, -q.lr * by_hand, rtol=1e-5, atol=1e-5)


def test_identity_9_sees_an_average_over_contributors(monkeypatch):
    over_contributors(monkeypatch)
    q = Quadratic()
    found, expected = q.mean_update(monkeypatch)[0], -q.lr * q.gradient_by_enumeration()[0]
    assert abs(found - expected).max() > 0.1


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
    tiers = plan_layout(toy.RANKS, cohorts, r=toy.R, lanes=1, tiered=True)
    toy.play(toy.METHOD, optimizer, cohorts=cohorts, layout=tiers)
    masks = plan_layout(toy.RANKS, toy.COHORTS, r=toy.R, lanes=1, tiered=False)
    for ranks in (toy.RANKS, np.arange(7) % toy.R + 1, np.full(7, toy.R)):
        toy.play(toy.METHOD, optimizer, population=toy.make_population(ranks=ranks), layout=masks)
    for layout in (tiers, masks):
        assert toy.compiled_round(toy.METHOD, optimizer, layout, 0.0, None)._cache_size() == 1


# --- Broken copies: the comparison with the oracle must see each ------------------------------------------------


def without_gain(monkeypatch) -> None:
    def broken(*args) -> Sketch:
        index, gain = draw(*args)
        return Sketch(index, (gain > 0).astype(jnp.float32))

    monkeypatch.setattr(importlib.import_module("fslora_jax.methods.fslora"), "draw", broken)


def two_sketches(monkeypatch) -> None:
    def broken(pair: Pair, index) -> Pair:
        return Pair(gather(pair, index).a, gather(pair, (index + 1) % toy.R).b)

    monkeypatch.setattr(base, "gather", broken)


def over_contributors(monkeypatch) -> None:
    honest = base.weighted_sum

    def broken(r: int, payloads, weights) -> Combined:
        combined = honest(r, payloads, weights)
        share = {
            m: sum(
                scatter_sum(p.trains[m][..., None], p.index[m], w, r)
                for p, w in zip(payloads, weights, strict=True)
            )
            for m in combined.delta.adapter
        }
        adapter = {
            m: Pair(*(jnp.where(share[m] > 0, x / share[m], 0.0) for x in pair))
            for m, pair in combined.delta.adapter.items()
        }
        return combined._replace(delta=combined.delta._replace(adapter=adapter))

    monkeypatch.setattr(base, "weighted_sum", broken)


def decay_everywhere(monkeypatch) -> None:
    monkeypatch.setattr(local, "masked", lambda updates, trains: updates)


def server_moves_everything(monkeypatch) -> None:
    honest = base.apply_server_optimizer

    def broken(optimizer, server, combined: Combined) -> Server:
        return honest(optimizer, server, combined._replace(trained_by=jax.tree.map(jnp.ones_like, combined.trained_by)))

    monkeypatch.setattr(base, "apply_server_optimizer", broken)


@pytest.mark.parametrize(
    ("broken", "optimizer", "server", "layout"),
    [
        (without_gain, "sgd", "average", "masked"),
        (two_sketches, "sgd", "average", "masked"),
        (over_contributors, "sgd", "average", "masked"),
        (decay_everywhere, "adamw", "average", "masked"),
        (server_moves_everything, "sgd", "momentum", "tiered"),
    ],
)
def test_the_oracle_sees_a_broken_round(
    monkeypatch, broken: Callable, optimizer: str, server: str, layout: str
):
    check_with_oracle(played(optimizer, server, layout), optimizer, server)
    broken(monkeypatch)
    method = fslora(toy.SPEC, toy.SERVERS[server][0])
    found = toy.play(method, toy.OPTIMIZERS[optimizer][0], tiered=layout == "tiered")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_with_oracle(found, optimizer, server)
