"""A config's model and the arguments of its round as shapes: nothing is read but ``config.json``, nothing is held."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from fslora_jax import hub
from fslora_jax.adapters.spec import model_spec
from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.federation.cohort import Layout
from fslora_jax.federation.method import make_method
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.setup import model_options, run_constants
from fslora_jax.methods import Client, Server
from fslora_jax.models import Model, build_model
from fslora_jax.sharding import base_shardings, over_clients, replicated
from fslora_jax.tensors import read_object
from fslora_jax.types import Batch


def abstract_model(config: Config, num_labels: int, changes: Mapping[str, Any] | None = None) -> Model:
    """The model of a config from its ``config.json`` alone, which may lie in a folder without weights.

    ``changes`` replace fields that are there.
    """
    local = Path(config.model.name).expanduser() / "config.json"
    path = local if local.is_file() else hub.resolve_model(config.model.name) / "config.json"
    fields = dict(read_object(path))
    return build_model(
        fields | {name: value for name, value in (changes or {}).items() if name in fields},
        num_labels=num_labels,
        task="sequence" if num_labels else "causal",
        **model_options(config),
    )


def abstract_arguments(
    config: Config, model: Model, shape: BatchShape, layout: Layout
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """Base, server, constants and cohort as shapes."""
    f = config.federation
    method = make_method(config, model_spec(config.lora, model, f.share_sketch))
    slots = (layout.groups, layout.chunks, len(layout.caps))
    steps = (*slots, f.local_steps)

    def cohort(server: Server) -> Cohort:
        memory = {} if method.first_memory is None else method.first_memory(server)
        memory = jax.tree.map(lambda x: jnp.zeros((*slots, *x.shape), x.dtype), memory)
        clients = Client(jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32), jnp.zeros(slots), memory)
        cells = jnp.zeros((*steps, shape.rows, shape.row_length), jnp.int32)
        labels = jnp.zeros((*steps, f.batch_size), jnp.int32)
        places = jnp.zeros((*steps, shape.rows, shape.places), jnp.int32)
        return Cohort(clients, Batch(cells, cells, cells, cells, labels, labels.astype(jnp.float32), places))

    key = jax.random.key(0)
    server = jax.eval_shape(lambda key: method.init(key, model.init_head(key)), key)
    return (
        jax.eval_shape(model.init_base, key),
        server,
        jax.eval_shape(lambda: run_constants(config, None)),
        jax.eval_shape(cohort, server),
    )


def with_places(
    arguments: tuple[PyTree, PyTree, PyTree, PyTree], mesh: Mesh | None, devices: Sequence[Any]
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """The shapes on their places, as a run has its arrays."""
    base, server, constants, cohort = arguments

    def at(x: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def everywhere(tree: PyTree, place: Any) -> PyTree:
        return jax.tree.map(lambda x: at(x, place), tree)

    if mesh is None:
        alone = SingleDeviceSharding(devices[0])
        base, server, constants, cohort = everywhere(arguments, alone)
        return base, server, constants, cohort
    split = jax.tree.map(at, base, base_shardings(mesh, base))
    whole = replicated(mesh)
    return (
        split,
        everywhere(server, whole),
        everywhere(constants, whole),
        everywhere(cohort, over_clients(mesh)),
    )
