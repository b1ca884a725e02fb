"""The real round of a config, lowered and compiled from abstract arrays."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from fslora_jax.adapters.spec import model_spec
from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.errors import UserError
from fslora_jax.federation.cohort import Layout, plan_layout
from fslora_jax.federation.method import is_tiered, make_method
from fslora_jax.federation.optimizer import make_client_optimizer
from fslora_jax.federation.resources import resources
from fslora_jax.federation.round import SERVER, Cohort, make_round
from fslora_jax.federation.setup import (
    cohort_sampler,
    different_cohorts,
    passes_of,
    run_constants,
)
from fslora_jax.methods import Client, Spec
from fslora_jax.models import Model, shifted
from fslora_jax.models.kernels import narrowed
from fslora_jax.program import Collective, collectives, matmul_flops
from fslora_jax.sharding import AXES, base_shardings, client_groups, make_mesh, over_clients, replicated
from fslora_jax.types import Batch


class Compiled(NamedTuple):
    """What the compiler says of one round, for one device; bytes, and operations of its matrix products.

    ``read`` are the frozen weights that its products read. ``failure`` is why there is no program.
    """

    sizes: dict[str, int]
    slots: int
    arguments: int
    temporaries: int
    outputs: int
    flops: float
    read: float
    exchanges: Sequence[Collective]
    seconds: float
    failure: str | None = None


def compile_round(config: Config, model: Model, shape: BatchShape, devices: Sequence[Any]) -> Compiled:
    """Compiles the round for ``devices``; a program that does not fit their memory is a failure, not an error.

    Raises:
      UserError: the mesh does not make up the devices, or a weight cannot be split over it.
    """
    mesh = make_mesh(config.mesh.clients, config.mesh.fsdp, config.mesh.tensor, devices)
    layout = layout_of(config, model, client_groups(mesh) * config.federation.cohort_chunks)
    arguments = placed(abstract_arguments(config, model, shape, layout), mesh, devices)
    started = time.perf_counter()
    traced = jax.jit(round_of(config, model, layout, mesh), donate_argnums=SERVER).trace(*arguments)
    sizes: dict[str, int] = (
        dict.fromkeys(AXES, 1) if mesh is None else {axis: mesh.shape[axis] for axis in AXES}
    )
    group = sizes["fsdp"] * sizes["tensor"]
    steps = config.federation.local_steps * config.federation.cohort_chunks
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]["layers"]))
    found = Compiled(
        sizes=sizes,
        slots=len(layout.caps) * config.federation.cohort_chunks,
        arguments=0,
        temporaries=0,
        outputs=0,
        flops=matmul_flops(traced.jaxpr.jaxpr) / group,
        read=steps * 2 * weights / sizes["tensor"],  # forwards and backwards, at the least
        exchanges=(),
        seconds=0.0,
    )
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found._replace(failure=out_of_memory(str(error)), seconds=time.perf_counter() - started)
    memory: Any = program.memory_analysis()
    return found._replace(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        exchanges=collectives(text_of(program), sizes),
        seconds=time.perf_counter() - started,
    )


def text_of(program: Any) -> str:
    """The compiled program, which tells what is exchanged.

    Raises:
      UserError: the compiler is of another release than this jaxlib, which cannot read its program.
    """
    try:
        return program.as_text() or ""
    except jax.errors.JaxRuntimeError:
        raise UserError(
            "libtpu: this jaxlib cannot read its programs; install the release that belongs together: "
            f"pip install 'jax[tpu]=={jax.__version__}'"
        ) from None


def out_of_memory(message: str) -> str:
    """The sentence of XLA's message that says how much was wanted."""
    lines = [line.strip() for line in message.splitlines() if "memory" in line]
    return (lines or [message.strip()])[0][:200]


def layout_of(config: Config, model: Model, lanes: int) -> Layout:
    """The slots of the config's cohorts."""
    cohorts = map(cohort_sampler(config), range(different_cohorts(config)))
    tiered = is_tiered(config, make_method(config, Spec({}, config.lora.r, 1.0)))
    longest = config.data.max_length
    ranks, _ = resources(config, model, longest, longest**2)
    return plan_layout(ranks, cohorts, r=config.lora.r, lanes=lanes, tiered=tiered)


def round_of(config: Config, model: Model, layout: Layout, mesh: Mesh | None) -> Any:
    """The function that a run compiles."""
    f = config.federation
    spec, passes = model_spec(config.lora, model, f.share_sketch), passes_of(config, mesh)
    method, narrow = make_method(config, spec), partial(narrowed, products=config.model.products)
    one_round = make_round(
        model.score,
        method,
        make_client_optimizer(config.client_optimizer, f.num_rounds, f.local_steps),
        layout,
        local_steps=f.local_steps,
        dropout=config.lora.lora_dropout > 0,
        passes=passes and passes._replace(skip=False),  # a bound needs them all
        mesh=mesh,
        shift=lambda base, delta: narrow(shifted(base, delta)),
    )
    if method.traits.moves_base:
        return one_round
    return lambda base, *others: one_round(narrow(base), *others)


def abstract_arguments(
    config: Config, model: Model, shape: BatchShape, layout: Layout
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """Base, server, constants and cohort as shapes."""
    f = config.federation
    method = make_method(config, model_spec(config.lora, model, f.share_sketch))
    slots = (layout.lanes // f.cohort_chunks, f.cohort_chunks, len(layout.caps))
    steps = (*slots, f.local_steps)

    def cohort() -> Cohort:
        clients = Client(jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32), jnp.zeros(slots))
        cells = jnp.zeros((*steps, shape.rows, shape.row_length), jnp.int32)
        labels = jnp.zeros((*steps, f.batch_size), jnp.int32)
        places = jnp.zeros((*steps, shape.rows, shape.places), jnp.int32)
        return Cohort(clients, Batch(cells, cells, cells, cells, labels, labels.astype(jnp.float32), places))

    key = jax.random.key(0)
    return (
        jax.eval_shape(model.init_base, key),
        jax.eval_shape(lambda key: method.init(key, model.init_head(key)), key),
        jax.eval_shape(lambda: run_constants(config, None)),
        jax.eval_shape(cohort),
    )


def placed(
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
