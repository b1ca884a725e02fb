"""The real round of a config, lowered and compiled from abstract arrays."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fslora_jax.adapters.spec import model_spec
from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.errors import UserError
from fslora_jax.federation.cohort import Layout, plan_layout
from fslora_jax.federation.method import is_tiered, make_method
from fslora_jax.federation.optimizer import make_client_optimizer
from fslora_jax.federation.resources import resources
from fslora_jax.federation.round import SERVER, make_round
from fslora_jax.federation.setup import (
    cohort_sampler,
    different_cohorts,
    passes_of,
    row_multiple,
)
from fslora_jax.methods import Spec
from fslora_jax.models import Model, shifted
from fslora_jax.models.kernels import narrowed
from fslora_jax.plan.abstract import abstract_arguments, with_places
from fslora_jax.program import Collective, collectives, matmul_flops, memory_of
from fslora_jax.sharding import AXES, client_groups, make_mesh


class Compiled(NamedTuple):
    """What the compiler says of one round, for one device; bytes, and operations of its matrix products.

    ``sizes`` are those of the mesh, ``shape`` that of a client's minibatch. ``read`` are the frozen weights that its
    products read. ``failure`` is why there is no program; then the rest is what was known before.
    """

    sizes: dict[str, int]
    shape: BatchShape | None = None
    slots: int = 0
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    flops: float = 0.0
    read: float = 0.0
    exchanges: Sequence[Collective] = ()
    seconds: float = 0.0
    failure: str | None = None


def compile_abstract(config: Config, model: Model, shape: BatchShape, devices: Sequence[Any]) -> Compiled:
    """Compiles the round for ``devices``; a program that does not fit their memory is a failure, not an error.

    The rows of ``shape`` are rounded up to what the config's passes and mesh divide.

    Raises:
      UserError: the mesh does not make up the devices, or a weight cannot be split over it.
    """
    mesh = make_mesh(config.mesh.clients, config.mesh.fsdp, config.mesh.tensor, devices)
    layout = layout_of(config, model, client_groups(mesh))
    multiple = row_multiple(config)
    shape = shape._replace(rows=-(-shape.rows // multiple) * multiple)
    arguments = with_places(abstract_arguments(config, model, shape, layout), mesh, devices)
    started = time.perf_counter()
    traced = jax.jit(round_of(config, model, layout, mesh), donate_argnums=SERVER).trace(*arguments)
    sizes: dict[str, int] = (
        dict.fromkeys(AXES, 1) if mesh is None else {axis: mesh.shape[axis] for axis in AXES}
    )
    group = sizes["fsdp"] * sizes["tensor"]
    steps = config.federation.local_steps * layout.chunks
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]["layers"]))
    found = Compiled(
        sizes=sizes,
        shape=shape,
        slots=len(layout.caps) * layout.chunks,
        flops=matmul_flops(traced.jaxpr.jaxpr) / group,
        read=steps * 2 * weights / sizes["tensor"],  # forwards and backwards, at the least
    )
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found._replace(failure=out_of_memory(str(error)), seconds=time.perf_counter() - started)
    return found._replace(
        **memory_of(program)._asdict(),
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


def layout_of(config: Config, model: Model, groups: int) -> Layout:
    """The slots of the config's cohorts on so many groups of devices."""
    cohorts = map(cohort_sampler(config), range(different_cohorts(config)))
    tiered = is_tiered(config, make_method(config, Spec({}, config.lora.r, 1.0)))
    longest = config.data.max_length
    ranks, _ = resources(config, model, longest, longest**2)
    chunks = config.federation.cohort_chunks
    return plan_layout(ranks, cohorts, r=config.lora.r, tiered=tiered, groups=groups, chunks=chunks)


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
