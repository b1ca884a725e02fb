"""One federated round as one compiled program: download, local steps, upload, combine, server update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.local import ClientOptimizer, ScoreFn, train
from fslora_jax.methods import Client, Method, Server
from fslora_jax.random import Purpose, device_key
from fslora_jax.sharding import CLIENTS, replicated, whole
from fslora_jax.types import Batch


class Keys(NamedTuple):
    """Base keys of the random purposes inside a round; round and client are folded in here."""

    sketch: Key[Array, ""]
    dropout: Key[Array, ""]


def base_keys(seed: int, mesh: Mesh | None = None) -> Keys:
    """The keys of a run, made in place: ``device_put`` refuses keys on a mesh of several processes."""

    def make() -> Keys:
        return Keys(device_key(seed, Purpose.SKETCH), device_key(seed, Purpose.DROPOUT))

    return jax.jit(make, out_shardings=replicated(mesh))()


class Cohort(NamedTuple):
    """The clients of one round in their slots; leaves ``(groups, chunks, slots, ...)``."""

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
) -> Callable[[PyTree, Server, Keys, Cohort], tuple[Server, Float[Array, "groups chunks slots H"]]]:
    """The round ``(base, server, keys, cohort) -> (server, losses)``; ``jax.jit`` makes it one program.

    Ranks, clients, seeds and data are arguments: one executable serves every round of a run. On a mesh every group of
    devices along ``clients`` runs its own clients, and the groups meet in one sum; how the devices of one group share
    the work is the compiler's affair, led by the shardings of the base and of the model's activations.
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
        # Without it the TPU compiler trains twice, once for the adapters and once for the heads.
        after, losses = jax.lax.optimization_barrier((after, losses))
        payloads = [jax.vmap(method.upload)(b, a) for b, a in zip(given, after, strict=True)]
        return method.combine(payloads, weights), losses

    def of_group(base: PyTree, server: Server, keys: Keys, cohort: Cohort):
        chunks = jax.tree.map(lambda x: x[0], cohort)
        first = jax.tree.map(lambda x: x[0], chunks)
        # A group's own copy: gradients at replicated weights would be summed over the groups.
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
            combined = jax.lax.psum(combined, CLIENTS)  # the only line where groups meet
        return whole(method.update(server, combined)), losses[None]

    if mesh is None:
        return of_group
    return jax.shard_map(
        of_group,
        mesh=mesh,
        axis_names={CLIENTS},
        in_specs=(P(), P(), P(), P(CLIENTS)),
        out_specs=(P(), P(CLIENTS)),
    )
