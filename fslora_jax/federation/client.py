"""Clients one by one: what each holds after its local steps of the coming round."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fslora_jax.backend import compiler_options
from fslora_jax.config import Config
from fslora_jax.data.batches import make_batch, shape_for
from fslora_jax.errors import UserError
from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.feed import local_examples
from fslora_jax.federation.memories import Memories
from fslora_jax.federation.method import is_tiered
from fslora_jax.federation.round import Cohort, local_training
from fslora_jax.federation.setup import Federation, global_model, run_constants
from fslora_jax.methods import Client, Server
from fslora_jax.types import Local


def train_client(
    config: Config, federation: Federation, server: Server, client: int, memories: Memories | None = None
) -> Local:
    """What one client holds; see `train_clients`."""
    return next(train_clients(config, federation, server, [client], memories))[1]


def train_clients(
    config: Config,
    federation: Federation,
    server: Server,
    clients: Sequence[int],
    memories: Memories | None = None,
) -> Iterator[tuple[int, Local]]:
    """Each client's adapter and head after the local steps of round ``server.round``, one after another.

    They draw the sketches and the batches that the compiled round would give them, and do all local steps, whatever the
    config says of slow and failing clients. There is one program for each k.

    Raises:
      UserError: there is no such client.
    """
    population, method = federation.task.population, federation.method
    steps = federation.feed.steps.undisturbed()
    for client in clients:
        if not 0 <= client < len(population.ranks):
            raise UserError(f"client {client}: expected one of 0 to {len(population.ranks) - 1}")
    chosen = local_examples(population, steps, np.array(clients), int(server.round))
    shape = shape_for(population.store, chosen, steps.row_length, steps.packing)
    base, constants = global_model(federation, server)[0], run_constants(config, None)

    @jax.jit(static_argnums=0, compiler_options=compiler_options())
    def trained(layout: Layout, base, server, constants, cohort) -> Local:
        locally = local_training(
            federation.task.model.score,
            method,
            federation.optimizer,
            layout,
            local_steps=steps.local_steps,
            dropout=config.lora.lora_dropout > 0,
        )
        held = jax.tree.map(lambda x: x[0], locally(base, server, constants, cohort)[1][0])
        return held if method.forward is None else method.forward(server, held)

    for client, examples in zip(clients, chosen, strict=True):
        k, id = int(population.ranks[client]), np.array([client])
        who = Client(jnp.int32(id), jnp.array([k], jnp.int32), jnp.ones(1))
        if memories is not None:
            who = who._replace(memory=memories.gather(id))
        batches = make_batch(population.store, population.labels, examples[None], shape, steps.packing)
        layout = Layout((k if is_tiered(config, method) else federation.spec.r,))
        yield client, trained(layout, base, server, constants, Cohort(who, batches))
