"""One federated round as one compiled program: download, local steps, upload, combine, server update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.local import ClientOptimizer, ScoreFn, train
from fslora_jax.methods import Client, Method, Server
from fslora_jax.random import Purpose, device_key
from fslora_jax.types import Batch

CLIENTS = "clients"
"""The mesh axis over which a cohort is spread."""


class Keys(NamedTuple):
    """Base keys of the random purposes inside a round; round and client are folded in here."""

    sketch: Key[Array, ""]
    dropout: Key[Array, ""]


def base_keys(seed: int, mesh: Mesh | None = None) -> Keys:
    """The keys of a run, made in place: ``device_put`` refuses keys on a mesh of several processes."""

    def make() -> Keys:
        return Keys(device_key(seed, Purpose.SKETCH), device_key(seed, Purpose.DROPOUT))

    return jax.jit(make, out_shardings=shardings(mesh)[0])()


class Cohort(NamedTuple):
    """The clients of one round in their slots; leaves ``(devices, chunks, slots, ...)``."""

    clients: Client
    batches: Batch


def make_round(
    score: ScoreFn,
    method: Method,
    optimizer: ClientOptimizer,
    layout: Layout,
    *,
    local_steps: int,
    dropout: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[PyTree, Server, Keys, Cohort], tuple[Server, Float[Array, "devices chunks slots H"]]]:
    """The round ``(base, server, keys, cohort) -> (server, losses)``; ``jax.jit`` makes it one program.

    Ranks, clients, seeds and data are arguments: one executable serves every round of a run. On a mesh every device
    runs its own clients and the devices meet in one sum; base weights and server are replicated.
    """

    def of_clients(base: PyTree, server: Server, keys: Keys, cohort: Cohort):
        clients, batches = cohort
        by_client = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        sketch_keys = by_client(jax.random.fold_in(keys.sketch, server.round), clients.id)
        dropout_keys = (
            by_client(jax.random.fold_in(keys.dropout, server.round), clients.id) if dropout else None
        )

        given, weights, start = [], [], 0
        for cap, count in layout.tiers:
            slots = slice(start, start + count)
            tier = jax.tree.map(lambda x, slots=slots: x[slots], clients)
            download = jax.vmap(lambda key, client, cap=cap: method.download(key, server, client, cap))
            given.append(download(sketch_keys[slots], tier))
            weights.append(tier.weight)
            start += count
        first_step = server.round * local_steps
        after, losses = train(score, optimizer, base, given, batches, first_step, dropout_keys)
        payloads = [jax.vmap(method.upload)(b, a) for b, a in zip(given, after, strict=True)]
        return method.combine(payloads, weights), losses

    def of_device(base: PyTree, server: Server, keys: Keys, cohort: Cohort):
        chunks = jax.tree.map(lambda x: x[0], cohort)
        first = jax.tree.map(lambda x: x[0], chunks)
        # A device's own copy: gradients at replicated weights would be summed over the devices.
        own = server if mesh is None else jax.lax.pcast(server, CLIENTS, to="varying")
        shapes = jax.eval_shape(of_clients, base, own, keys, first)[0]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if mesh is not None:
            nothing = jax.lax.pcast(nothing, CLIENTS, to="varying")

        def chunk(total, cohort):
            combined, losses = of_clients(base, own, keys, cohort)
            return jax.tree.map(jnp.add, total, combined), losses

        combined, losses = jax.lax.scan(chunk, nothing, chunks)
        if mesh is not None:
            combined = jax.lax.psum(combined, CLIENTS)  # the only line where devices meet
        return method.update(server, combined), losses[None]

    if mesh is None:
        return of_device
    return jax.shard_map(
        of_device, mesh=mesh, in_specs=(P(), P(), P(), P(CLIENTS)), out_specs=(P(), P(CLIENTS))
    )


def shardings(mesh: Mesh | None) -> tuple[NamedSharding | None, NamedSharding | None]:
    """Where (replicated values, per-client values) live on a mesh."""
    if mesh is None:
        return None, None
    return NamedSharding(mesh, P()), NamedSharding(mesh, P(CLIENTS))
