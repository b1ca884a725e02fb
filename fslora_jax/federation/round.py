"""One federated round as one compiled program: download, local steps, upload, combine, server update."""

from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.local import UNIT, ClientOptimizer, Passes, Rates, ScoreFn, train
from fslora_jax.methods import TOLD, Client, Combined, Method, Server, merge
from fslora_jax.random import Purpose, device_key
from fslora_jax.sharding import CLIENTS, manual_axes, replicated, whole
from fslora_jax.types import Batch, Local

T = TypeVar("T")

Shift = Callable[[PyTree, dict[str, Array]], PyTree]
"""A model's base with something added to its kernels, ``(base, {module: (N, i, o)}) -> base``."""


SERVER = 1
"""Which argument of a round its result may take the place of."""


class Keys(NamedTuple):
    """Base keys of the random purposes inside a round; round and client are folded in here."""

    sketch: Key[Array, ""]
    dropout: Key[Array, ""]
    network: Key[Array, ""]
    server: Key[Array, ""]


class Constants(NamedTuple):
    """What a run has of its own where runs share a program."""

    keys: Keys
    rates: Rates


def constants_of(seed: int, rates: Rates = UNIT, mesh: Mesh | None = None) -> Constants:
    """A run's, made in place: ``device_put`` refuses keys on a mesh of several processes."""
    return _maker(seed, mesh)(rates)


@cache
def _maker(seed: int, mesh: Mesh | None) -> Callable[[Rates], Constants]:
    """The program that makes them, one for all who ask for the same keys."""

    def make(rates: Rates) -> Constants:
        purposes = (Purpose.SKETCH, Purpose.DROPOUT, Purpose.NETWORK, Purpose.SERVER)
        keys = Keys(*(device_key(seed, purpose) for purpose in purposes))
        return Constants(keys, jax.tree.map(jnp.float32, rates))

    return jax.jit(make, out_shardings=replicated(mesh))


class Cohort(NamedTuple):
    """The clients of one round in their slots; leaves ``(groups, chunks, slots, ...)``."""

    clients: Client
    batches: Batch


class Played(NamedTuple):
    """What a round leaves beside the server: losses ``(groups, chunks, slots, H)``, what each client remembers, and
    numbers for its record."""

    losses: Float[Array, "groups chunks slots H"]
    memory: dict[str, PyTree]
    told: dict[str, Float[Array, ""]] = {}


def make_round(
    score: ScoreFn,
    method: Method,
    optimizer: ClientOptimizer,
    layout: Layout,
    *,
    local_steps: int,
    dropout: bool = False,
    passes: Passes | None = None,
    mesh: Mesh | None = None,
    shift: Shift | None = None,
) -> Callable[[PyTree, Server, Constants, Cohort], tuple[Server, Played]]:
    """The round ``(base, server, constants, cohort) -> (server, what was played)``; ``jax.jit`` makes it one program.

    Ranks, clients, seeds, learning rates and data are arguments: one executable serves every round of a run, and runs
    that differ in these alone. ``shift`` moves the base of a method that does so. On a mesh every group of devices
    along ``clients`` runs its own clients, and the groups meet in one sum; how the devices of one group share the work
    is the compiler's affair, led by the shardings of the base and of the model's activations.
    """
    locally = local_training(
        score, method, optimizer, layout, local_steps=local_steps, dropout=dropout, passes=passes
    )

    def of_clients(
        base: PyTree, server: Server, constants: Constants, cohort: Cohort
    ) -> tuple[Combined, Played]:
        given, after, losses = locally(base, server, constants, cohort)
        # Without it the TPU compiler trains twice, once for the adapters and once for the heads.
        after, losses = jax.lax.optimization_barrier((after, losses))
        clients = split(layout, cohort.clients)
        network_keys = split(layout, client_keys(constants.keys.network, server, cohort.clients.id))
        upload = jax.vmap(method.upload, in_axes=(0, None, 0, 0, 0))
        tiers = zip(network_keys, given, after, clients, strict=True)
        sent = [upload(key, server, old, new, client) for key, old, new, client in tiers]
        memory = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(kept for _, kept in sent))
        combined = method.combine([payload for payload, _ in sent], [tier.weight for tier in clients])
        return combined, Played(losses, memory)

    traced_once = jax.jit(of_clients, inline=True)  # for its shapes and for the loop over chunks

    def of_group(
        base: PyTree, server: Server, constants: Constants, cohort: Cohort
    ) -> tuple[Combined, Played]:
        chunks = jax.tree.map(lambda x: x[0], cohort)
        one = jax.tree.map(lambda x: x[0], chunks)
        # A group's own copy: gradients at replicated weights would be summed over the groups.
        own = server if mesh is None else jax.lax.pcast(server, CLIENTS, to="varying")
        own = own._replace(announced=announced(method, chunks.clients, mesh))
        shifted = shift(base, own.base_delta) if shift and method.traits.moves_base else base
        shapes = jax.eval_shape(traced_once, shifted, own, constants, one)[0]
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if mesh is not None:
            nothing = jax.lax.pcast(nothing, CLIENTS, to="varying")

        def chunk(total: Combined, cohort: Cohort) -> tuple[Combined, Played]:
            combined, played = traced_once(shifted, own, constants, cohort)
            return merge(total, combined), played

        combined, played = jax.lax.scan(chunk, nothing, chunks)
        if mesh is not None:  # the only lines where groups meet
            summed = jax.lax.psum(combined._replace(peak={}), CLIENTS)
            combined = summed._replace(peak=jax.lax.pmax(combined.peak, CLIENTS))
        return whole(combined), jax.tree.map(lambda x: x[None], played)

    def one_round(
        base: PyTree, server: Server, constants: Constants, cohort: Cohort
    ) -> tuple[Server, Played]:
        combined, played = collect(base, server, constants, cohort)
        new = whole(method.update(jax.random.fold_in(constants.keys.server, server.round), server, combined))
        return new, played._replace(told=new.memory.get(TOLD, {}))

    collect = of_group
    if mesh is not None:
        collect = jax.shard_map(
            of_group,
            mesh=mesh,
            axis_names=manual_axes(mesh),
            in_specs=(P(), P(), P(), P(CLIENTS)),
            out_specs=(P(), P(CLIENTS)),
        )
    return one_round


def several_rounds(
    one_round: Callable,
) -> Callable[[PyTree, Server, Constants, Cohort], tuple[Server, Played]]:
    """Rounds one after another in one dispatch; cohorts, and what is played, have a leading axis of rounds."""

    def rounds(base: PyTree, server: Server, constants: Constants, cohorts: Cohort) -> tuple[Server, Played]:
        return jax.lax.scan(
            lambda server, cohort: one_round(base, server, constants, cohort), server, cohorts
        )

    return rounds


def several_runs(one_round: Callable) -> Callable[[PyTree, Server, Constants, Cohort], tuple[Server, Played]]:
    """Runs side by side in one dispatch; all but the base has a leading axis of runs.

    A CPU does one after another: wider products gain nothing there, and fresh memory costs time.
    """
    if jax.default_backend() == "cpu":
        return lambda base, *of_runs: jax.lax.map(lambda own: one_round(base, *own), of_runs)
    return jax.vmap(one_round, in_axes=(None, 0, 0, 0))


def local_training(
    score: ScoreFn,
    method: Method,
    optimizer: ClientOptimizer,
    layout: Layout,
    *,
    local_steps: int,
    dropout: bool = False,
    passes: Passes | None = None,
) -> Callable[[PyTree, Server, Constants, Cohort], tuple[list[Local], list[Local], Float[Array, "C H"]]]:
    """What the clients of one lane are given, what each holds after its local steps, and its losses, by tier.

    ``(base, server, constants, cohort)``, the cohort's leaves ``(slots, ...)``.
    """

    def locally(base: PyTree, server: Server, constants: Constants, cohort: Cohort):
        clients = split(layout, cohort.clients)
        sketch_keys = split(layout, client_keys(constants.keys.sketch, server, cohort.clients.id))
        given = [
            jax.vmap(lambda key, client, cap=cap: method.download(key, server, client, cap))(key, client)
            for (cap, _), key, client in zip(layout.tiers, sketch_keys, clients, strict=True)
        ]
        after, losses = train(
            forwarded(score, method, server),
            optimizer,
            base,
            given,
            cohort.batches,
            server.round * local_steps,
            client_keys(constants.keys.dropout, server, cohort.clients.id) if dropout else None,
            rates=constants.rates,
            penalty=method.penalty,
            at_step=changing(method, sketch_keys, clients, given),
            passes=passes,
        )
        return given, after, losses

    return locally


def split(layout: Layout, tree: T) -> list[T]:
    """Leaves ``(slots, ...)`` by tier."""
    ends = list(accumulate(count for _, count in layout.tiers))
    starts = [end - count for end, (_, count) in zip(ends, layout.tiers, strict=True)]
    return [jax.tree.map(lambda x, s=s, e=e: x[s:e], tree) for s, e in zip(starts, ends, strict=True)]


def client_keys(base_key: Key[Array, ""], server: Server, ids: Array) -> Key[Array, " C"]:
    """A purpose's key of each client in this round."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(base_key, server.round), ids)


def forwarded(score: ScoreFn, method: Method, server: Server) -> ScoreFn:
    """The model's score of what clients train, where that is not the model's factors themselves."""
    if (forward := method.forward) is None:
        return score

    def of_trained(base, tiers, batch, keys):
        return score(base, [jax.vmap(partial(forward, server))(tier) for tier in tiers], batch, keys)

    return of_trained


def changing(
    method: Method, keys: list[Key[Array, " C"]], clients: list[Client], tiers: list[Local]
) -> Callable[[Array], list[Local]] | None:
    """Scales and moving rows of all tiers by step, for a method that changes them."""
    if (at_step := method.at_step) is None:
        return None

    def at(h: Array) -> list[Local]:
        def one(key: Array, client: Client, local: Local) -> Local:
            return at_step(jax.random.fold_in(key, h), client, local)

        return [jax.vmap(one)(*parts) for parts in zip(keys, clients, tiers, strict=True)]

    return at


def announced(method: Method, clients: Client, mesh: Mesh | None) -> PyTree:
    """The weighted sum over the whole cohort of what its clients announce; ``clients`` are ``(chunks, slots)``."""
    if (announce := method.announce) is None:
        return ()
    said = jax.vmap(jax.vmap(announce))(clients)
    total = jax.tree.map(lambda x: jnp.einsum("cs,cs...->...", clients.weight, x), said)
    return total if mesh is None else jax.lax.pcast(jax.lax.psum(total, CLIENTS), CLIENTS, to="varying")
