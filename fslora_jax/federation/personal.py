"""Each client's own adapter on examples of its own: local training and scoring of many clients at a time."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, PyTree, Real

from fslora_jax.backend import compiler_options
from fslora_jax.config import Config
from fslora_jax.data.batches import FILLER, deal_out, make_batch, shape_for
from fslora_jax.data.tokens import TokenStore
from fslora_jax.evaluate import Answers, gather
from fslora_jax.federation.cohort import EMPTY, Layout, plan_layout
from fslora_jax.federation.feed import Feed, make_cohort
from fslora_jax.federation.memories import Memories, remembering
from fslora_jax.federation.method import is_tiered
from fslora_jax.federation.round import Cohort, Constants, announced, local_training
from fslora_jax.federation.setup import Federation, global_model, run_constants
from fslora_jax.methods import Server
from fslora_jax.processes import fetch
from fslora_jax.sharding import CLIENTS, over_clients
from fslora_jax.types import Batch, Local, Score

BATCH = 32
"""Examples of each client that are scored at a time."""


def score_own(
    config: Config,
    federation: Federation,
    server: Server,
    memories: Memories | None,
    store: TokenStore,
    labels: Real[np.ndarray, " rows"],
    clients: Int[np.ndarray, " rows"],
) -> Answers:
    """What each row's client says to it with the adapter that it holds after the local steps of the coming round.

    As many clients train at once as in a round, on the same mesh; two programs serve them all. All local steps are
    done, whatever the config says of slow and failing clients.
    """
    steps = federation.feed.steps.undisturbed()
    mine = {
        int(client): deal_out(store, np.flatnonzero(clients == client), BATCH)
        for client in np.unique(clients)
    }
    at_once = len(federation.feed.layout.caps) * federation.feed.layout.groups
    chunks = by_batches(mine, at_once)
    layout = layout_for(config, federation, chunks)
    every = np.concatenate([*mine.values()])
    shape = shape_for(store, every, config.data.row_length or config.data.max_length, steps.packing)
    trained, scored = programs(config, federation, layout)
    base, constants = global_model(federation, server)[0], run_constants(config, federation.mesh)
    scores, slots = [], []
    for ids in chunks:
        taking_part = Feed(steps, layout, lambda _, ids=ids: ids, federation.feed.shape)
        cohort = make_cohort(federation.task.population, taking_part, [int(server.round)], federation.mesh)
        held = trained(base, server, constants, remembering(cohort, memories))
        for rows in by_slot(mine, fetch(cohort.clients.id)[:, 0]):
            batch = make_batch(store, labels, rows, shape, steps.packing)
            scores.append(fetch(scored(base, held, jax.device_put(batch, over_clients(federation.mesh)))))
            slots.append(rows)
    return gather(jax.tree.map(lambda *parts: np.concatenate(parts), *scores), np.concatenate(slots))


def by_batches(mine: dict[int, np.ndarray], size: int) -> list[np.ndarray]:
    """The clients in groups of ``size`` with nearly equal numbers of batches, so that few places stay empty."""
    ordered = np.array(sorted(mine, key=lambda client: (-len(mine[client]), client)))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def layout_for(config: Config, federation: Federation, chunks: Sequence[np.ndarray]) -> Layout:
    """Slots that hold each of the chunks; the last one may leave some empty."""
    everybody = np.concatenate(chunks)
    full = [*chunks[:-1], everybody[-len(chunks[0]) :]]
    return plan_layout(
        federation.task.population.ranks,
        full,
        r=config.lora.r,
        tiered=is_tiered(config, federation.method),
        groups=federation.feed.layout.groups,
    )


def by_slot(
    mine: dict[int, np.ndarray], lanes: Int[np.ndarray, "groups slots"]
) -> Iterator[Int[np.ndarray, "groups slots E"]]:
    """The n-th batch of each client in its slot, fillers where it has none."""
    for n in range(max(len(mine[client]) for client in lanes[lanes != EMPTY].tolist())):
        rows = np.full((*lanes.shape, BATCH), FILLER)
        for place_, client in np.ndenumerate(lanes):
            if client != EMPTY and n < len(mine[client]):
                rows[place_] = mine[client][n]
        yield rows


def programs(config: Config, federation: Federation, layout: Layout) -> tuple[Any, Any]:
    """``(base, server, constants, cohort) -> tiers`` after local training, and ``(base, tiers, batch) -> Score``.

    Leaves have a leading axis of groups of devices, each of which trains and scores its own clients.
    """
    task, method, mesh = federation.task, federation.method, federation.mesh
    locally = local_training(
        task.model.score,
        method,
        federation.optimizer,
        layout,
        local_steps=federation.feed.steps.local_steps,
        dropout=config.lora.lora_dropout > 0,
    )

    def train(base: PyTree, server: Server, constants: Constants, cohort: Cohort) -> list[Local]:
        chunks = jax.tree.map(lambda x: x[0], cohort)
        own = server if mesh is None else jax.lax.pcast(server, CLIENTS, to="varying")
        own = own._replace(announced=announced(method, chunks.clients, mesh))
        after = locally(base, own, constants, jax.tree.map(lambda x: x[0], chunks))[1]
        if (forward := method.forward) is not None:
            after = [jax.vmap(partial(forward, own))(tier) for tier in after]
        return jax.tree.map(lambda x: x[None], after)

    def score(base: PyTree, tiers: list[Local], batch: Batch) -> Score:
        held, mine = jax.tree.map(lambda x: x[0], (tiers, batch))
        return jax.tree.map(lambda x: x[None], task.model.score(base, held, mine, None))

    def spread(program: Any, *inputs: P) -> Any:
        if mesh is not None:
            axes = {"axis_names": {CLIENTS}, "in_specs": inputs, "out_specs": P(CLIENTS)}
            program = jax.shard_map(program, mesh=mesh, **axes)
        return jax.jit(program, compiler_options=compiler_options())

    shared, own = P(), P(CLIENTS)
    return spread(train, shared, shared, shared, own), spread(score, shared, own, own)
