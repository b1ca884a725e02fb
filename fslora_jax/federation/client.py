"""One client alone: what it holds after its local steps of the coming round."""

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
    """The rank-k adapter and head of ``client`` after the local steps of round ``server.round``.

    It draws the sketch and the batches that the compiled round would give it.

    Raises:
      UserError: there is no such client.
    """
    population, steps, round = federation.task.population, federation.steps, int(server.round)
    if not 0 <= client < len(population.ranks):
        raise UserError(f"client {client}: expected one of 0 to {len(population.ranks) - 1}")
    k = int(population.ranks[client])
    ids = np.array([client])
    chosen = local_examples(population, steps, ids, round)
    shape = shape_for(population.store, chosen, steps.row_length, steps.packing)
    batches = make_batch(population.store, population.labels, chosen, shape, steps.packing)

    def key(purpose: Purpose) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(device_key(config.seed, purpose), round), client)

    given = federation.method.download(
        key(Purpose.SKETCH), server, Client(jnp.int32(client), jnp.int32(k), jnp.float32(1)), k
    )
    after, _ = jax.jit(train, static_argnums=(0, 1), compiler_options=compiler_options())(
        federation.task.model.score,
        federation.optimizer,
        federation.task.base,
        [jax.tree.map(lambda x: x[None], given)],
        batches,
        server.round * steps.local_steps,
        key(Purpose.DROPOUT)[None] if config.lora.lora_dropout else None,
    )
    return jax.tree.map(lambda x: x[0], after[0])
