"""From a config to everything a run needs: model, data, clients, method, optimisers, the shape of the cohort."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from fslora_jax import hub
from fslora_jax.adapters.spec import model_spec
from fslora_jax.backend import split_cpu
from fslora_jax.config import Config
from fslora_jax.data.batches import make_batch, shape_for
from fslora_jax.data.held_out import HeldOut
from fslora_jax.data.tasks import TASKS
from fslora_jax.federation.cohort import plan_layout, sample_cohort
from fslora_jax.federation.division import divide, marks_of
from fslora_jax.federation.examples import load_examples, model_task, outputs, tokenise, tokenise_held_out
from fslora_jax.federation.feed import Feed, Population, Steps, local_examples
from fslora_jax.federation.local import ClientOptimizer, Passes
from fslora_jax.federation.memories import Memories
from fslora_jax.federation.method import is_tiered, make_method
from fslora_jax.federation.optimizer import learning_rates, make_client_optimizer
from fslora_jax.federation.resources import resources
from fslora_jax.federation.round import Constants, constants_of
from fslora_jax.federation.shapes import best_row_length, plan_shape, planned_rounds
from fslora_jax.federation.start import start_server, starting_point
from fslora_jax.lora import width
from fslora_jax.methods import Method, Server, Spec, whole
from fslora_jax.models import Model, load_model, shifted
from fslora_jax.provenance import fingerprint_of
from fslora_jax.sharding import base_sharding, client_groups, make_mesh, replicated
from fslora_jax.types import Batch, Trainable


class Task(NamedTuple):
    """The base model, and the task's texts as tokens; ``marks`` as in ``marks_of``."""

    model: Model
    base: PyTree
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    population: Population
    test: HeldOut
    marks: tuple[np.ndarray, tuple[str, ...]]


class Federation(NamedTuple):
    """All that a run computes with; nothing here changes from round to round."""

    task: Task
    start: Trainable | None
    spec: Spec
    method: Method
    optimizer: ClientOptimizer
    feed: Feed
    mesh: Mesh | None


def with_feed(federation: Federation, **changes: Any) -> Federation:
    """The same federation with another feed."""
    return federation._replace(feed=federation.feed._replace(**changes))


def load_task(config: Config, mesh: Mesh | None, beside: Task | None = None) -> Task:
    """Finds, reads and tokenises what the config names, and divides it among the clients.

    The base model of a task ``beside`` it is taken as it is.
    """
    folder = hub.resolve_model(config.model.name)
    train, test = load_examples(config.data, config.seed, folder)
    if beside is None:
        model, base = load_base(config, folder, outputs(config.data, train), mesh)
    else:
        model, base = beside.model, beside.base
    store = tokenise(folder, model, train, config.data)
    lengths = store.lengths.astype(float)
    partition, _ = divide(config, train)
    ranks, clock = resources(config, model, lengths.mean(), np.square(lengths).mean())
    sizes = partition.sizes.astype(float)
    weighted = config.federation.client_weights == "examples"
    population = Population(
        store=store,
        labels=train.labels,
        examples=partition,
        ranks=ranks,
        shares=sizes if weighted else np.ones_like(sizes),
        clock=clock,
    )
    held = tokenise_held_out(folder, model, test, config.data, client_groups(mesh))
    metrics, marks = TASKS[config.data.task].metrics, marks_of(config, train)
    return Task(model, base, train.label_names, metrics, population, held, marks)


def data_fingerprint(task: Task) -> str:
    """Of all that is trained and tested on, as tokens."""
    store, test = task.population.store, task.test
    tested = np.sort(test.batches.tokens[test.batches.segments > 0])  # however they are packed
    known = (store.tokens, store.offsets, store.types, store.learned, task.population.labels)
    return fingerprint_of(*map(np.asarray, (*known, tested, test.owner, test.labels)))


def load_base(config: Config, folder: Path, num_labels: int, mesh: Mesh | None) -> tuple[Model, PyTree]:
    """The frozen model in its places."""
    return load_model(
        folder,
        task=model_task(config.data),
        num_labels=num_labels,
        placement=None if mesh is None else partial(base_sharding, mesh),
        **model_options(config),
    )


def model_options(config: Config) -> dict[str, Any]:
    """What a config says of its model, as `build_model` takes it; task and labels are a matter of the data."""
    return {
        "pooling": config.model.pooling,
        "dtype": config.model.dtype,
        "lora_dropout": config.lora.lora_dropout,
        "attention": config.model.attention,
        "remat": config.model.remat,
        "quantization": config.model.quantization,
    }


def set_up(config: Config, beside: Federation | None = None) -> Federation:
    """Everything before the first round; with the base model of a federation ``beside`` it, if there is one.

    Raises:
      UserError: a model, file, target or client does not fit the config.
    """
    mesh = mesh_of(config)
    return federation_of(config, load_task(config, mesh, beside and beside.task), mesh)


def settle_devices(config: Config) -> None:
    """Has JAX count the CPU as the config says, before anything asks JAX for its devices."""
    if config.mesh.cpu_devices is not None:
        split_cpu(config.mesh.cpu_devices, config.clients_per_round)


def mesh_of(config: Config) -> Mesh | None:
    """The mesh over all devices; None for a single one.

    Raises:
      UserError: they are not as many as the config says.
    """
    settle_devices(config)
    return make_mesh(config.mesh.clients, config.mesh.fsdp, config.mesh.tensor, jax.devices())


def federation_of(config: Config, task: Task, mesh: Mesh | None) -> Federation:
    """Method, optimisers and shapes for a task that is loaded."""
    f = config.federation
    spec = model_spec(config.lora, task.model, f.share_sketch)
    method = make_method(config, spec)
    model, frozen, start = starting_point(config, task.model, spec, task.label_names)
    base = task.base | jax.device_put(frozen, replicated(mesh))
    cohort = cohort_sampler(config)
    layout = plan_layout(
        task.population.ranks,
        map(cohort, range(different_cohorts(config))),
        r=config.lora.r,
        tiered=is_tiered(config, method),
        groups=client_groups(mesh),
        chunks=f.cohort_chunks,
    )
    steps = Steps(
        seed=config.seed,
        local_steps=f.local_steps,
        batch_size=f.batch_size,
        row_length=config.data.row_length or 0,
        packing=config.data.packing,
        min_local_steps=f.min_local_steps,
        failure_rate=f.failure_rate,
        wanted=f.clients_per_round if f.clients_asked else None,
        row_multiple=row_multiple(config),
        passes=passes_of(config, mesh),
    )
    planned = planned_rounds(steps, f.num_rounds, config.clients_per_round)
    if not steps.row_length:
        wide = width(task.model.modules)
        steps = steps._replace(
            row_length=best_row_length(task.population, steps, layout, cohort, planned, wide)
        )
    feed = Feed(steps, layout, cohort, plan_shape(task.population, steps, cohort, planned))
    return Federation(
        task=task._replace(model=model, base=base),
        start=start,
        spec=spec,
        method=method,
        optimizer=make_client_optimizer(config.client_optimizer, f.num_rounds, f.local_steps),
        feed=feed,
        mesh=mesh,
    )


def row_multiple(config: Config) -> int:
    """What divides the rows of a minibatch: a pass of them, else the devices that share them out."""
    return config.federation.rows_per_pass or config.mesh.fsdp


def passes_of(config: Config, mesh: Mesh | None) -> Passes | None:
    """How minibatches go through the model.

    Devices that share one client's work run the same passes, so there none is skipped.
    """
    rows = config.federation.rows_per_pass
    if rows is None:
        return None
    return Passes(rows, skip=mesh is None or mesh.size == client_groups(mesh))


def cohort_sampler(config: Config) -> Callable[[int], np.ndarray]:
    """The clients of each round."""
    return lambda t: sample_cohort(config.seed, t, config.population, config.clients_per_round)


def different_cohorts(config: Config) -> int:
    """How many rounds have cohorts of their own: one where everybody takes part."""
    everybody = config.clients_per_round == config.population
    return 1 if everybody else config.federation.num_rounds


def initial_server(config: Config, federation: Federation) -> Server:
    """Global weights before the first round, on the devices."""
    server = start_server(config, federation.method, federation.task.model, federation.spec, federation.start)
    if (from_gradient := federation.method.from_gradient) is not None:
        server = jax.jit(from_gradient)(server, kernel_gradient(federation, server))
    return jax.device_put(server, replicated(federation.mesh))


def run_constants(config: Config, mesh: Mesh | None) -> Constants:
    """What a run has of its own beside its server and its clients."""
    return constants_of(config.seed, learning_rates(config.client_optimizer), mesh)


def kernel_gradient(federation: Federation, server: Server) -> dict[str, Array]:
    """The mean over all clients of the loss's gradient at the adapted kernels, on each one's first minibatch."""
    task, steps = federation.task, federation.feed.steps.undisturbed()._replace(local_steps=1)
    held = jax.tree.map(lambda x: x[None], whole(federation.spec, federation.method.adapter(server)))
    nothing = {m: jnp.zeros((t.layers, t.i, t.o)) for m, t in federation.spec.targets.items()}

    def loss(delta: dict[str, Array], base: PyTree, batch: Batch) -> Array:
        one = jax.tree.map(lambda x: x[None], batch)
        found = task.model.score(shifted(base, delta), [held], one, None)
        return found.loss.sum() / jnp.maximum(found.count.sum(), 1.0)

    add = jax.jit(lambda total, *given: jax.tree.map(jnp.add, total, jax.grad(loss)(nothing, *given)))
    total, population = nothing, task.population
    first = local_examples(population, steps, np.arange(len(population.ranks)), 0)[:, 0]
    shape = shape_for(population.store, first, steps.row_length, steps.packing)
    for chosen in first:
        batch = make_batch(population.store, population.labels, chosen, shape, steps.packing)
        total = add(total, task.base, batch)
    return jax.tree.map(lambda x: x / len(first), total)


def global_model(federation: Federation, server: Server) -> tuple[PyTree, Trainable]:
    """The base, with what was merged into it, and the global adapter and head: what is evaluated."""
    base = federation.task.base
    if federation.method.traits.moves_base:
        base = shifted(base, server.base_delta)
    return base, federation.method.adapter(server)


def open_memories(
    config: Config, federation: Federation, first: Server, folder: Path, *, saved: bool = False
) -> Memories | None:
    """What clients remember, in files: nothing yet, or what was ``saved``; None where they never remember anything.

    ``first`` is the server before the first round.
    """
    if (first_memory := federation.method.first_memory) is None:
        return None
    return Memories(folder, first_memory(first), config.population, saved=saved)
