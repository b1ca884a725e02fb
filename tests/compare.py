"""Compares what the package played with what `oracle` computes from the same draws and data."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import toy
from toy import BASE, LAYERS, METHOD, ORDER, STEPS, TARGETS, R

from fslora_jax.data.batches import make_batch
from fslora_jax.federation.feed import Population, Steps, local_examples
from fslora_jax.federation.round import constants_of
from fslora_jax.methods import Client, Method, Server, fslora
from fslora_jax.types import Batch, Local, Trainable


@cache
def fslora_with(server: str, spec: str = "equal") -> Method:
    """FSLoRA with one of the toy's server optimisers; the same object each time, so that it compiles once."""
    return (
        METHOD if (server, spec) == ("average", "equal") else fslora(toy.SPECS[spec], toy.SERVERS[server][0])
    )


@cache
def played(optimizer: str, server: str, layout: str, spec: str = "equal") -> toy.Played:
    """Three rounds of FSLoRA."""
    return toy.play(fslora_with(server, spec), toy.OPTIMIZERS[optimizer][0], tiered=layout == "tiered")


def last(found: toy.Played) -> oracle.Parameters:
    """The global weights in the end."""
    return flat(found.servers[-1].weights)


def client_key(base_key: jax.Array, t: int, client: int) -> jax.Array:
    """The key of a client in a round."""
    return jax.random.fold_in(jax.random.fold_in(base_key, t), client)


@cache
def _download(spec: str) -> Callable[..., Local]:
    return jax.jit(fslora_with("average", spec).download, static_argnums=3)


def give(server: Server, client: int, k: int, cap: int, spec: str = "equal") -> Local:
    """What FSLoRA gives a client in the coming round, in a slot of rank ``cap``."""
    key = client_key(constants_of(5).keys.sketch, int(server.round), client)
    who = Client(jnp.int32(client), jnp.int32(k), jnp.float32(1))
    return _download(spec)(key, server._replace(opt_state=()), who, cap)


def client_batches(population: Population, client: int, t: int) -> Batch:
    """A client's minibatches of a round, leaves ``(H, ...)``."""
    chosen = local_examples(population, STEPS, np.array(client), t)
    return make_batch(population.store, population.labels, chosen, toy.SHAPE, False)


def oracle_base() -> oracle.Base:
    """The toy's frozen weights in the paper's orientation."""
    kernels = {(m, n): BASE[m][n].T.astype(np.float64) for n in range(LAYERS) for m in ORDER}
    return oracle.Base(BASE["embed"].astype(np.float64), kernels)


def flat(weights: Trainable) -> oracle.Parameters:
    """Global weights as the oracle's parameters, bit by bit."""
    found = {}
    for m, pair in weights.adapter.items():
        for n in range(LAYERS):
            found[m, n, "A"] = np.asarray(pair.a[n], np.float64)
            found[m, n, "B"] = np.asarray(pair.b[n], np.float64).T
    return found | {("head", p): np.asarray(v, np.float64) for p, v in weights.head["classifier"].items()}


def oracle_minibatches(batch: Batch) -> list[oracle.Minibatch]:
    """Batches with leaves ``(H, ...)``, one example a row, as lists of texts."""
    b = jax.tree.map(np.asarray, batch)
    return [
        oracle.Minibatch([t[s > 0] for t, s in zip(tokens, segments, strict=True)], labels, weights)
        for tokens, segments, labels, weights in zip(b.tokens, b.segments, b.labels, b.weights, strict=True)
    ]


def drawn(server: Server, client: int, k: int, spec: str = "equal") -> dict[tuple[str, int], np.ndarray]:
    """The components that a client is given in the coming round, for each (module, layer)."""
    index = give(server, client, k, R, spec).index
    ranks = {"equal": {"up": k, "down": k}, "mixed": {"up": k, "down": {1: 1, 3: 2, 6: 4}[k]}}[spec]
    return {(m, n): np.asarray(index[m][n, : ranks[m]]) for m in TARGETS for n in range(LAYERS)}


def participants(
    server: Server, population: Population, ids: np.ndarray, spec: str, done: np.ndarray
) -> list[oracle.Participant]:
    """The clients of a round as the oracle takes them; only what is drawn comes from the package."""
    shares = population.shares[ids] / population.shares[ids].sum()
    return [
        oracle.Participant(
            drawn(server, int(c), int(population.ranks[c]), spec),
            share,
            oracle_minibatches(client_batches(population, int(c), int(server.round)))[: done[c]],
        )
        for c, share in zip(ids, shares, strict=True)
    ]


def close(found: dict, expected: dict, tolerance: float = 2e-5) -> None:
    """Equal arrays; in the toy they are of order 1, and a round moves them by about 0.1."""
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=str(name)
        )


def check_with_oracle(
    found: toy.Played,
    optimizer: str,
    server: str = "average",
    *,
    population: Population = toy.POPULATION,
    cohorts: Sequence[np.ndarray] = toy.COHORTS,
    spec: str = "equal",
    steps: Steps = STEPS,
) -> None:
    """Global weights after every round and every client's losses, computed by hand from the first server on."""
    x = flat(found.servers[0].weights)
    hand = toy.SERVERS[server][1]()
    losses = {}
    for t, ids in enumerate(cohorts):
        done = steps.done(len(population.ranks), t)
        ids = ids[done[ids] > 0]
        x, by_client = oracle.run_round(
            oracle_base(),
            x,
            participants(found.servers[t], population, ids, spec, done),
            r={"up": toy.R, "down": toy.R if spec == "equal" else 4},
            s={"up": 0.5, "down": 0.5 if spec == "equal" else 0.8},
            optimizer=toy.OPTIMIZERS[optimizer][1],
            server=hand,
            first_step=t * toy.STEPS.local_steps,
        )
        losses |= {(t, int(c)): loss for c, loss in zip(ids, by_client, strict=True)}
        close(flat(found.servers[t + 1].weights), x)
    close({at: found.losses[at][: len(loss)] for at, loss in losses.items()}, losses)
