"""A model and a population so small that `oracle` can train them by hand, and helpers to play rounds with them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from jax.sharding import Mesh

from fslora_jax import lora
from fslora_jax.data.batches import make_batch
from fslora_jax.data.tokens import TokenStore
from fslora_jax.federation.cohort import Layout, plan_layout
from fslora_jax.federation.feed import Population, Steps, local_examples, make_cohort
from fslora_jax.federation.local import Apply, ClientOptimizer
from fslora_jax.federation.round import Keys, make_round, shardings
from fslora_jax.methods import Client, Method, Server, Spec
from fslora_jax.random import Purpose, device_key
from fslora_jax.types import Batch, Pair, Trainable

D, F, VOCAB, LABELS, LAYERS, R = 5, 7, 11, 3, 2, 6
ORDER = ("up", "down")
TARGETS = {"down": lora.Target(F, D, LAYERS), "up": lora.Target(D, F, LAYERS)}
SPEC = Spec(TARGETS, R, scale=0.8)
STEPS = Steps(seed=3, local_steps=3, batch_size=2, row_length=4, packing=False)
RANKS = np.array([1, 2, 6, 3, 1, 2, 3])
EVERYBODY = np.arange(len(RANKS))


def run_keys(seed: int = 5) -> Keys:
    """The base keys of a run."""
    return Keys(device_key(seed, Purpose.SKETCH), device_key(seed, Purpose.DROPOUT))


def rate(step):
    """A learning rate that tells steps and rounds apart."""
    return 0.3 / (1.0 + 0.1 * step)


OPTIMIZERS = {
    "sgd": (ClientOptimizer(optax.identity(), rate), lambda: oracle.Sgd(rate)),
    "momentum": (ClientOptimizer(optax.trace(0.9), rate), lambda: oracle.Sgd(rate, 0.9)),
    "adamw": (
        ClientOptimizer(
            optax.chain(optax.scale_by_adam(eps=1e-3), optax.add_decayed_weights(0.3)), lambda t: 0.2 * rate(t)
        ),
        lambda: oracle.AdamW(lambda t: 0.2 * rate(t), eps=1e-3, decay=0.3),
    ),
}
"""Name -> (the package's client optimiser, the oracle's)."""

SERVERS = {
    "average": (optax.sgd(1.0), lambda: oracle.Sgd(lambda _: 1.0)),
    "momentum": (optax.sgd(0.7, momentum=0.9), lambda: oracle.Sgd(lambda _: 0.7, 0.9)),
    "adamw": (
        optax.adamw(0.1, eps=1e-3, weight_decay=0.2),
        lambda: oracle.AdamW(lambda _: 0.1, eps=1e-3, decay=0.2),
    ),
}
"""Name -> (the package's server optimiser, the oracle's)."""


def make_apply(dropout: float = 0.0) -> Apply:
    """The toy model in the shape of `local.Apply`."""

    def apply(base, tiers, batch: Batch, keys):
        mine = batch.segments[..., None] == jnp.arange(1, batch.labels.shape[-1] + 1)
        total = jnp.einsum("cble,cbld->ced", mine.astype(jnp.float32), base["embed"][batch.tokens])
        x = total / jnp.maximum(mine.sum((1, 2)), 1)[..., None]
        for layer in range(LAYERS):
            for number, name in enumerate(ORDER):
                seen = x
                if keys is not None:
                    keep = jax.vmap(
                        lambda key, x, place=10 * layer + number: jax.random.bernoulli(
                            jax.random.fold_in(key, place), 1 - dropout, x.shape
                        )
                    )(keys, x)
                    seen = jnp.where(keep, x / (1 - dropout), 0.0)
                own = [
                    (Pair(*(f[:, layer] for f in t.weights.adapter[name])), t.scale[name][:, layer])
                    for t in tiers
                ]
                low_rank = lora.per_client(lambda mine, x: lora.delta(*mine, x), own, seen)
                x = jnp.tanh(x @ base[name][layer] + low_rank)
        heads = [t.weights.head["classifier"] for t in tiers]
        return lora.per_client(lambda head, x: x @ head["kernel"] + head["bias"], heads, x)

    return apply


def make_base(seed: int = 0) -> dict[str, Any]:
    """Frozen weights; kernels are (layers, in, out)."""
    rng = np.random.default_rng(seed)
    kernels = {m: rng.normal(size=(LAYERS, t.i, t.o)) / np.sqrt(t.i) for m, t in TARGETS.items()}
    return {"embed": rng.normal(size=(VOCAB, D))} | kernels


BASE = jax.tree.map(np.float32, make_base())


def make_population(ranks: np.ndarray = RANKS, shares: np.ndarray | None = None, seed: int = 0) -> Population:
    """Clients with 3 to 5 examples of 1 to 4 tokens each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 6, len(ranks))
    lengths = rng.integers(1, STEPS.row_length + 1, sizes.sum())
    tokens = rng.integers(0, VOCAB, lengths.sum()).astype(np.int32)
    store = TokenStore(tokens, np.append(0, np.cumsum(lengths)), np.zeros(len(tokens), np.int8))
    return Population(
        store=store,
        labels=rng.integers(0, LABELS, sizes.sum()),
        examples=np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1]),
        ranks=ranks,
        shares=np.ones(len(ranks)) if shares is None else shares,
    )


POPULATION = make_population()


def start(method: Method, seed: int = 0) -> Server:
    """A server whose B is not zero, so that every factor has a gradient from the first step on."""
    head_key, a_key, b_key = jax.random.split(jax.random.key(seed), 3)
    head = {"classifier": {"kernel": jax.random.normal(head_key, (D, LABELS)), "bias": jnp.zeros(LABELS)}}
    server = method.init(a_key, head)
    adapter = {
        m: pair._replace(b=0.4 * jax.random.normal(jax.random.fold_in(b_key, n), pair.b.shape))
        for n, (m, pair) in enumerate(server.weights.adapter.items())
    }
    return server._replace(weights=Trainable(adapter, head))


class Played(NamedTuple):
    """What some rounds left: the server before and after each, the losses ``(round, client) -> (H,)``."""

    servers: list[Server]
    losses: dict[tuple[int, int], np.ndarray]
    compilations: int


def play(
    method: Method,
    optimizer: ClientOptimizer,
    *,
    population: Population = POPULATION,
    cohorts: Sequence[np.ndarray] = (EVERYBODY,),
    tiered: bool = True,
    devices: int = 1,
    chunks: int = 1,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    server: Server | None = None,
    seed: int = 5,
) -> Played:
    """Plays one round for each cohort with the package's compiled round."""
    if layout is None:
        layout = plan_layout(
            population.ranks, cohorts, r=R, lanes=devices * chunks, tiered=tiered
        )
    one_round = jax.jit(
        make_round(
            make_apply(dropout),
            method,
            optimizer,
            layout,
            local_steps=STEPS.local_steps,
            dropout=dropout > 0,
            mesh=mesh,
        )
    )
    everywhere = shardings(mesh)[0]
    base, keys = jax.device_put((BASE, run_keys(seed)), everywhere)
    servers = [jax.device_put(start(method) if server is None else server, everywhere)]
    losses = {}
    for t, ids in enumerate(cohorts):
        cohort = make_cohort(
            population, STEPS, layout, ids, t, num_rows=STEPS.batch_size, chunks=chunks, mesh=mesh
        )
        server, by_slot = one_round(base, servers[-1], keys, cohort)
        servers.append(server)
        if mesh is None or jax.process_count() == 1:
            losses |= by_client(t, cohort.clients.id, by_slot)
    return Played(servers, losses, one_round._cache_size())


def by_client(t: int, ids, losses) -> dict[tuple[int, int], np.ndarray]:
    flat = np.asarray(losses).reshape(-1, STEPS.local_steps)
    return {(t, int(c)): loss for c, loss in zip(np.asarray(ids).ravel(), flat, strict=True) if c >= 0}


def client_key(base_key: jax.Array, t: int, client: int) -> jax.Array:
    """The key of a client in a round."""
    return jax.random.fold_in(jax.random.fold_in(base_key, t), client)


def drawn_by(method: Method, server: Server, client: int, k: int) -> dict:
    """The components that a client is given in the coming round: (module, layer) -> indices."""
    key = client_key(run_keys().sketch, int(server.round), client)
    index = method.download(key, server, Client(jnp.int32(client), jnp.int32(k), jnp.float32(1)), k).index
    return {(m, n): np.asarray(index[m][n]) for m in TARGETS for n in range(LAYERS)}


def client_batches(population: Population, client: int, t: int) -> Batch:
    """A client's minibatches of a round, leaves ``(H, ...)``."""
    chosen = local_examples(population, STEPS, np.array(client), t)
    return make_batch(population.store, population.labels, chosen, STEPS.batch_size, STEPS.row_length, False)


def oracle_base() -> oracle.Base:
    """The toy's frozen weights in the paper's orientation."""
    base = jax.tree.map(lambda x: np.asarray(x, np.float64), BASE)
    return oracle.Base(base["embed"], {(m, n): base[m][n].T for n in range(LAYERS) for m in ORDER})


def oracle_parameters(weights: Trainable) -> oracle.Parameters:
    """Global weights in the oracle's flat form."""
    flat = {}
    for m, pair in weights.adapter.items():
        for n in range(LAYERS):
            flat[m, n, "A"] = np.asarray(pair.a[n], np.float64)
            flat[m, n, "B"] = np.asarray(pair.b[n], np.float64).T
    return flat | {("head", p): np.asarray(v, np.float64) for p, v in weights.head["classifier"].items()}


def oracle_minibatches(batch: Batch) -> list[oracle.Minibatch]:
    """Batches with leaves ``(H, ...)``, one example a row, as lists of texts."""
    b = jax.tree.map(np.asarray, batch)
    return [
        oracle.Minibatch([t[s > 0] for t, s in zip(tokens, segments, strict=True)], labels, weights)
        for tokens, segments, labels, weights in zip(b.tokens, b.segments, b.labels, b.weights, strict=True)
    ]


def participants(
    method: Method, server: Server, population: Population, ids: np.ndarray, t: int
) -> list[oracle.Participant]:
    """The clients of a round as the oracle takes them; the draws are the method's, weights by shares."""
    shares = population.shares[ids] / population.shares[ids].sum()
    return [
        oracle.Participant(
            drawn_by(method, server, int(c), int(population.ranks[c])),
            share,
            oracle_minibatches(client_batches(population, int(c), t)),
        )
        for c, share in zip(ids, shares, strict=True)
    ]


def assert_close(found: Trainable, expected: Trainable, tolerance: float = 2e-5) -> None:
    """Equal factors and heads; in the toy they are of order 1, and a round moves them by about 0.1."""
    a, b = oracle_parameters(found), oracle_parameters(expected)
    for p in a:
        np.testing.assert_allclose(a[p], b[p], rtol=tolerance, atol=tolerance, err_msg=str(p))
