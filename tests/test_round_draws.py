"""Rounds whose draws a test hands out: identities 6 and 9 of the method."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import toy
from compare import close, flat
from test_round_broken import over_contributors

from fslora_jax import lora
from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.local import ClientOptimizer
from fslora_jax.federation.round import Cohort, constants_of, make_round
from fslora_jax.methods import Client, Method, Server, Spec, fslora, parts
from fslora_jax.types import Batch, Pair, Score, Trainable

# --- Identity 6 ------------------------------------------------------------------------------------------------


def handing_out(method: Method, spec: Spec, index: dict[str, np.ndarray]) -> Method:
    """The method with draws from a table: module -> components ``(clients, N, most)`` of each client."""

    def download(key, server: Server, client: Client, cap: int):
        gain = jnp.where(jnp.arange(cap) < client.k, spec.r / client.k, 0.0)
        given = {m: jnp.asarray(index[m], jnp.int32)[client.id][:, :cap] for m in index}
        gains = {m: jnp.broadcast_to(gain, given[m].shape) for m in given}
        return parts.hold(spec, server.weights, given, gains)

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
    close(flat(permuted_first), flat(permuted_last), 1e-6)
    assert not np.array_equal(order, np.arange(toy.R))


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

    def mean_update(self) -> tuple[np.ndarray, np.ndarray]:
        """Of B and A in one round of the package, in which every draw of every client is one slot."""

        def score(w0, tiers, batch, keys):
            own = [(Pair(*(f[:, 0] for f in t.weights.adapter["q"])), t.scale["q"][:, 0]) for t in tiers]
            eye = jnp.broadcast_to(jnp.eye(self.n), (len(self.draws), self.n, self.n))
            effective = w0.T + lora.per_client(lambda mine, x: lora.delta(*mine, x), own, eye)
            loss = 0.5 * ((effective - self.target.T) ** 2).sum((1, 2))[:, None]
            return Score(loss, 0 * loss, jnp.ones_like(loss), 0 * loss)

        spec = Spec({"q": lora.Target(self.n, self.m, 1)}, self.r, self.s)
        table = np.array([[np.resize(i, max(self.ks))] for i in self.draws])
        method = handing_out(fslora(spec, optax.sgd(1.0)), spec, {"q": table})
        server = method.init(jax.random.key(0), {})
        pair = Pair(jnp.float32(self.a)[None], jnp.float32(self.b.T)[None])
        server = server._replace(weights=Trainable({"q": pair}, {}))

        k = np.array([len(i) for i in self.draws])
        share = np.array([1 / (len(self.ks) * (k == mine).sum()) for mine in k])
        clients = Client(jnp.arange(len(k)), jnp.int32(k), jnp.float32(share))
        nothing = Batch(
            *[jnp.zeros((len(k), 1, 1, 1), jnp.int32)] * 4,
            *[jnp.zeros((len(k), 1, 1))] * 2,
            jnp.zeros((len(k), 1, 1, 0), jnp.int32),
        )
        cohort = jax.tree.map(lambda x: x[None, None], Cohort(clients, nothing))
        optimizer = ClientOptimizer(optax.identity(), lambda _: jnp.float32(self.lr))
        one_round = jax.jit(make_round(score, method, optimizer, Layout(tuple(k.tolist())), local_steps=1))
        moved = one_round(jnp.float32(self.w0), server, constants_of(5), cohort)[0].weights.adapter["q"]
        return np.asarray(moved.b - pair.b)[0].T, np.asarray(moved.a - pair.a)[0]


def test_identity_9_the_mean_update_is_the_gradient_of_the_sketched_objective():
    q = Quadratic()
    for found, by_hand, closed in zip(
        q.mean_update(), q.gradient_by_enumeration(), q.gradient_in_closed_form(), strict=True
    ):
        np.testing.assert_allclose(by_hand, closed, rtol=1e-10)
        np.testing.assert_allclose(found, -q.lr * by_hand, rtol=1e-5, atol=1e-5)


def test_identity_9_sees_an_average_over_contributors(monkeypatch):
    over_contributors(monkeypatch)
    q = Quadratic()
    found, expected = q.mean_update()[0], -q.lr * q.gradient_by_enumeration()[0]
    assert abs(found - expected).max() > 0.1
