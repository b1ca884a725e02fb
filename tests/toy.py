"""A model and a population so small that `oracle` can train them by hand, and a way to play rounds with them."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
from jax.sharding import Mesh

from fslora_jax import lora
from fslora_jax.data.batches import BatchShape
from fslora_jax.data.partition import Partition
from fslora_jax.data.tokens import TokenStore
from fslora_jax.federation.cohort import Layout, plan_layout
from fslora_jax.federation.feed import Feed, Population, Steps, make_cohort
from fslora_jax.federation.local import ClientOptimizer, Passes, ScoreFn
from fslora_jax.federation.round import Cohort, constants_of, make_round
from fslora_jax.methods import Method, Server, Spec, fslora
from fslora_jax.models.scores import score_labels
from fslora_jax.sharding import client_groups, make_mesh, replicated
from fslora_jax.types import Batch, Local, Trainable

D, F, VOCAB, LABELS, LAYERS, R = 5, 7, 11, 3, 2, 6
ORDER = ("up", "down")
TARGETS = {"down": lora.Target(F, D, LAYERS), "up": lora.Target(D, F, LAYERS)}
SPEC = Spec(TARGETS, R, scale=0.5)
SPECS = {
    "equal": SPEC,
    "mixed": SPEC._replace(rank_pattern={"down": 4}, scale_pattern={"down": 0.8}),
}
"""One rank for both modules; ``down`` at a rank and a scale of its own, of which clients hold 1, 2 or 4."""
STEPS = Steps(seed=3, local_steps=3, batch_size=2, row_length=4, packing=False)
SHAPE = BatchShape(STEPS.batch_size, STEPS.row_length, 0)
RANKS = np.array([1, 3, 6, 3, 1, 1, 3])
EVERYBODY = np.arange(len(RANKS))
COHORTS = (np.array([0, 3, 4]), np.array([0, 2, 4]), np.array([1, 4, 5]))
"""Three rounds of three clients: in the first and the last, many components are drawn by nobody."""


def rate(step):
    """A learning rate that tells steps and rounds apart."""
    return 0.1 / (1.0 + 0.1 * step)


def low_rate(step):
    """The same for Adam, whose steps have the size of the rate."""
    return 0.3 * rate(step)


ADAM = optax.chain(optax.scale_by_adam(eps=1e-3), optax.add_decayed_weights(0.3))

OPTIMIZERS = {
    "sgd": (ClientOptimizer(optax.identity(), rate), lambda: oracle.Sgd(rate)),
    "momentum": (ClientOptimizer(optax.trace(0.9), rate), lambda: oracle.Sgd(rate, 0.9)),
    "adamw": (ClientOptimizer(ADAM, low_rate), lambda: oracle.AdamW(low_rate, eps=1e-3, decay=0.3)),
}
"""Name -> (the package's client optimiser, the oracle's)."""

SERVERS = {
    "average": (optax.sgd(1.0), lambda: oracle.Sgd(lambda _: 1.0)),
    "momentum": (optax.sgd(0.7, momentum=0.9), lambda: oracle.Sgd(lambda _: 0.7, 0.9)),
    "adamw": (
        optax.adamw(0.1, eps=1e-2, weight_decay=0.2),
        lambda: oracle.AdamW(lambda _: 0.1, eps=1e-2, decay=0.2),
    ),
}
"""Name -> (the package's server optimiser, the oracle's)."""

METHOD = fslora(SPEC, SERVERS["average"][0])
"""FSLoRA as in the paper."""


@cache
def make_score(dropout: float = 0.0) -> ScoreFn:
    """The toy model in the shape of `local.ScoreFn`."""

    def drop(key, x, place: int):
        keep = jax.random.bernoulli(jax.random.fold_in(key, place), 1 - dropout, x.shape)
        return jnp.where(keep, x / (1 - dropout), 0.0)

    def apply(base, tiers: Sequence[Local], batch: Batch, keys):
        def layer(x, inputs):
            kernels, own, number = inputs
            for place, m in enumerate(ORDER):
                mine = [(pair[m], scale[m]) for pair, scale in own]
                seen = x
                if keys is not None:
                    by_layer = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
                    seen = jax.vmap(drop, in_axes=(0, 0, None))(by_layer, x, place)
                x = jnp.tanh(x @ kernels[m] + lora.per_client(lambda p, x: lora.delta(*p, x), mine, seen))
            return x, None

        own = [
            jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (t.weights.adapter, t.scale)) for t in tiers
        ]
        kernels = {m: base[m] for m in ORDER}
        x = jax.lax.scan(layer, mean_embedding(base["embed"], batch), (kernels, own, jnp.arange(LAYERS)))[0]
        heads = [t.weights.head["classifier"] for t in tiers]
        return lora.per_client(lambda head, x: x @ head["kernel"] + head["bias"], heads, x)

    return partial(score_labels, apply)


def mean_embedding(embed, batch: Batch):
    """The mean of each example's embeddings; 0 for an example without tokens."""
    mine = batch.segments[..., None] == jnp.arange(1, batch.labels.shape[-1] + 1)
    total = jnp.einsum("cble,cbld->ced", mine.astype(jnp.float32), embed[batch.tokens])
    return total / jnp.maximum(mine.sum((1, 2)), 1)[..., None]


def make_base(seed: int = 0) -> dict[str, np.ndarray]:
    """Frozen weights; kernels are (layers, in, out)."""
    rng = np.random.default_rng(seed)
    kernels = {m: rng.normal(size=(LAYERS, t.i, t.o)) / np.sqrt(t.i) for m, t in TARGETS.items()}
    return {name: x.astype(np.float32) for name, x in kernels.items()} | {
        "embed": rng.normal(size=(VOCAB, D)).astype(np.float32)
    }


BASE = make_base()


def shifted(base, delta):
    """The toy's base with something added to its kernels."""
    return base | {m: base[m] + change for m, change in delta.items()}


def make_population(ranks: np.ndarray = RANKS, shares: np.ndarray | None = None, seed: int = 0) -> Population:
    """Clients with 3 to 5 examples of 1 to 4 tokens each."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 6, len(ranks))
    lengths = rng.integers(1, STEPS.row_length + 1, sizes.sum())
    tokens = rng.integers(0, VOCAB, lengths.sum()).astype(np.int32)
    store = TokenStore(tokens, np.append(0, np.cumsum(lengths)), *np.zeros((2, len(tokens)), np.int8))
    return Population(
        store=store,
        labels=rng.integers(0, LABELS, sizes.sum()),
        examples=Partition(np.arange(sizes.sum()), np.append(0, np.cumsum(sizes))),
        ranks=ranks,
        shares=np.ones(len(ranks)) if shares is None else shares,
    )


POPULATION = make_population()


@cache
def start(method: Method) -> Server:
    """A server whose B is not zero, so that every factor has a gradient from the first step on."""
    head_key, a_key, b_key = jax.random.split(jax.random.key(0), 3)
    head = {"classifier": {"kernel": jax.random.normal(head_key, (D, LABELS)), "bias": jnp.zeros(LABELS)}}
    server = method.init(a_key, head)
    adapter = {
        m: pair._replace(b=0.4 * jax.random.normal(jax.random.fold_in(b_key, n), pair.b.shape))
        for n, (m, pair) in enumerate(server.weights.adapter.items())
    }
    return server._replace(weights=Trainable(adapter, head))


def mesh_of(clients: int, fsdp: int = 1, tensor: int = 1) -> Mesh | None:
    """A mesh over the first devices of the machine."""
    return make_mesh(clients, fsdp, tensor, jax.devices()[: clients * fsdp * tensor])


@cache
def compiled_round(
    method: Method,
    optimizer: ClientOptimizer,
    layout: Layout,
    dropout: float = 0.0,
    mesh: Mesh | None = None,
    passes: Passes | None = None,
):
    """The package's round, one program for each set of arguments in a whole test session."""
    one_round = make_round(
        make_score(dropout),
        method,
        optimizer,
        layout,
        local_steps=STEPS.local_steps,
        dropout=dropout > 0,
        passes=passes,
        mesh=mesh,
        shift=shifted,
    )
    return jax.jit(one_round)


class Played(NamedTuple):
    """What some rounds left: the server before and after each, the losses ``(round, client) -> (H,)``, memories."""

    servers: list[Server]
    losses: dict[tuple[int, int], np.ndarray]
    memories: dict[int, Any]


def play(
    method: Method,
    optimizer: ClientOptimizer,
    *,
    population: Population = POPULATION,
    cohorts: Sequence[np.ndarray] = COHORTS,
    tiered: bool = True,
    chunks: int = 1,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    dropout: float = 0.0,
    server: Server | None = None,
    seed: int = 5,
    steps: Steps = STEPS,
) -> Played:
    """Plays one round for each cohort with the package's compiled round."""
    groups = client_groups(mesh)
    if layout is None:
        layout = plan_layout(
            population.ranks, cohorts, r=R, tiered=tiered, groups=groups, chunks=chunks, max_tiers=R
        )
    in_passes = (steps.passes,) if steps.passes else ()
    one_round = compiled_round(method, optimizer, layout, dropout, mesh, *in_passes)
    first = start(method) if server is None else server
    constants = constants_of(seed, mesh=mesh)
    base, server = jax.device_put((BASE, first), replicated(mesh))
    servers, losses, memories = [server], {}, {}
    feed = Feed(steps, layout, cohorts.__getitem__, SHAPE)
    for t in range(len(cohorts)):
        cohort = make_cohort(population, feed, [t], mesh)
        cohort = remembering(method, first, memories, cohort)
        server, played = one_round(base, server, constants, cohort)
        servers.append(server)
        losses |= by_client(t, cohort.clients.id, played.losses)
        for slot, client in np.ndenumerate(cohort.clients.id if played.memory else []):
            memories[int(client)] = jax.tree.map(lambda x, slot=slot: np.asarray(x[slot]), played.memory)
    return Played(servers, losses, memories)


def remembering(method: Method, first: Server, memories: dict[int, Any], cohort: Cohort) -> Cohort:
    """A cohort whose clients have what they remember, one by one."""
    if method.first_memory is None:
        return cohort
    ids, begin = np.asarray(cohort.clients.id), method.first_memory(first)
    each = [memories.get(int(c), begin) for c in ids.ravel()]
    memory = jax.tree.map(lambda *xs: np.stack(xs).reshape(*ids.shape, *np.shape(xs[0])), *each)
    return cohort._replace(clients=cohort.clients._replace(memory=memory))


def by_client(t: int, ids: jax.Array, losses: jax.Array) -> dict[tuple[int, int], np.ndarray]:
    """The losses of the clients that are in a slot of this process."""
    found = {}
    for mine, values in zip(ids.addressable_shards, losses.addressable_shards, strict=True):
        flat = np.asarray(values.data).reshape(-1, STEPS.local_steps)
        found |= {(t, int(c)): x for c, x in zip(np.ravel(mine.data), flat, strict=True) if c >= 0}
    return found
