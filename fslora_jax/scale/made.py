"""A federation without files: a model from its ``config.json`` with random weights, clients with random tokens."""

from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from fslora_jax.config import Config
from fslora_jax.data.partition import Partition
from fslora_jax.data.tokens import TokenStore
from fslora_jax.federation.examples import check_length
from fslora_jax.federation.feed import Population
from fslora_jax.federation.resources import resources
from fslora_jax.federation.setup import Federation, Task, federation_of, mesh_of
from fslora_jax.models import Model
from fslora_jax.random import Purpose, device_key, host_rng
from fslora_jax.sharding import base_shardings

LABELS = 2


def made_federation(config: Config, model: Model) -> Federation:
    """All that a run of the config computes with; there is nothing to evaluate on."""
    mesh = mesh_of(config)
    return federation_of(config, made_task(config, model, mesh), mesh)


def made_task(config: Config, model: Model, mesh: Mesh | None) -> Task:
    """Every client has as many texts as a minibatch, each of ``data.max_length`` tokens.

    Raises:
      UserError: the model takes no texts that long.
    """
    check_length(config.data.max_length, model, config.model.name)
    key = device_key(config.seed, Purpose.INIT)
    places = base_shardings(mesh, jax.eval_shape(model.init_base, key))
    base = jax.jit(model.init_base, out_shardings=places if mesh is not None else None)(key)
    length, texts = config.data.max_length, config.federation.batch_size
    count, rng = config.population * texts, host_rng(config.seed, Purpose.PARTITION)
    tokens = rng.integers(0, model.vocab_size, count * length, np.int32)
    none = np.zeros(len(tokens), np.int8)
    ranks, clock = resources(config, model, length, length**2)
    population = Population(
        store=TokenStore(tokens, np.arange(count + 1) * length, none, none),
        labels=rng.integers(0, LABELS, count),
        examples=Partition(np.arange(count), np.arange(config.population + 1) * texts),
        ranks=ranks,
        shares=np.ones(config.population),
        clock=clock,
    )
    names = tuple(map(str, range(LABELS)))
    return Task(model, base, names, (), population, cast(Any, None), (population.labels, names))
