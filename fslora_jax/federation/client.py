"""Clients one by one: what each holds after its local steps of the coming round."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fslora_jax.backend import compiler_options
from fslora_jax.config import Config
from fslora_jax.data.batches import make_batch, shape_for
from fslora_jax.errors import UserError
from fslora_jax.federation.feed import local_examples
from fslora_jax.federation.local import train
from fslora_jax.federation.setup import Federation
from fslora_jax.methods import Client, Server
from fslora_jax.random import Purpose, device_key
from fslora_jax.types import Local


def train_client(config: Config, federation: Federation, server: Server, client: int) -> Local:
    """What one client holds; see `train_clients`."""
    return next(train_clients(config, federation, server, [client]))[1]


def train_clients(
    config: Config, federation: Federation, server: Server, clients: Sequence[int]
) -> Iterator[tuple[int, Local]]:
    """Each client's rank-k adapter and head after the local steps of round ``server.round``, one after another.

    They draw the sketches and the batches that the compiled round would give them. There is one program for each k.

    Raises:
      UserError: there is no such client.
    """
    population, steps, round = federation.task.population, federation.steps, int(server.round)
    for client in clients:
        if not 0 <= client < len(population.ranks):
            raise UserError(f"client {client}: expected one of 0 to {len(population.ranks) - 1}")
    chosen = local_examples(population, steps, np.array(clients), round)
    shape = shape_for(population.store, chosen, steps.row_length, steps.packing)
    local_steps = jax.jit(train, static_argnums=(0, 1), compiler_options=compiler_options())

    def key(purpose: Purpose, client: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(device_key(config.seed, purpose), round), client)

    for client, examples in zip(clients, chosen, strict=True):
        k = int(population.ranks[client])
        who = Client(jnp.int32(client), jnp.int32(k), jnp.float32(1))
        given = federation.method.download(key(Purpose.SKETCH, client), server, who, k)
        after, _ = local_steps(
            federation.task.model.score,
            federation.optimizer,
            federation.task.base,
            [jax.tree.map(lambda x: x[None], given)],
            make_batch(population.store, population.labels, examples[None], shape, steps.packing),
            server.round * steps.local_steps,
            key(Purpose.DROPOUT, client)[None] if config.lora.lora_dropout else None,
        )
        yield client, jax.tree.map(lambda x: x[0], after[0])
