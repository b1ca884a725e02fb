"""The engines under comparison: each builds a function that does round 0 of a config from the same state.

Where there are several devices all spread the clients over them, but for those that take one client after another.

| name            | what it is                                                                               |
|-----------------|------------------------------------------------------------------------------------------|
| `tiered`        | this package: the whole round in one program, clients of one rank in one tier             |
| `masked`        | the same with every client at the global rank                                             |
| `unchunked`     | `tiered` with the whole cohort at once                                                     |
| `loop`          | the same round as a Python loop over clients, one compiled program for each rank          |
| `drjax`         | the same clients under DrJAX's map and reduce (arXiv 2403.07128), all at the global rank  |
| `torch`         | PyTorch + PEFT, one client after another, batches padded to their longest example         |
| `torch-padded`  | the same, padded to `data.max_length`, as the method's authors do                         |
"""

import atexit
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from fslora_jax.backend import compiler_options
from fslora_jax.bench.torch_loop import torch_engine
from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.federation.calls import cohort_of, compile_round, training_base
from fslora_jax.federation.cohort import plan_layout
from fslora_jax.federation.feed import make_cohort
from fslora_jax.federation.local import train
from fslora_jax.federation.memories import remembering
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.setup import (
    Federation,
    federation_of,
    initial_server,
    load_task,
    open_memories,
    run_constants,
    set_up,
)
from fslora_jax.methods import Client, Combined, Method, Server
from fslora_jax.models.kernels import narrowed
from fslora_jax.sharding import CLIENTS
from fslora_jax.types import Local

Round = Callable[[], object]
"""Does one round and waits for its end; the first call also compiles."""


def with_layout(
    config: Config, federation: Federation, *, tiered: bool, chunks: int
) -> tuple[Config, Federation]:
    """The same federation with another layout of the cohort."""
    population, lanes = federation.task.population, federation.layout.lanes
    devices = lanes // config.federation.cohort_chunks
    layout = plan_layout(
        population.ranks, [federation.cohort(0)], r=federation.spec.r, lanes=devices * chunks, tiered=tiered
    )
    changed = config.federation.model_copy(update={"cohort_chunks": chunks})
    return config.model_copy(update={"federation": changed}), federation._replace(layout=layout)


def compiled(config: Config, federation: Federation, *, tiered: bool, chunks: int | None = None) -> Round:
    """This package's round."""
    chunks = config.federation.cohort_chunks if chunks is None else chunks
    config, federation = with_layout(config, federation, tiered=tiered, chunks=chunks)
    server, constants = initial_server(config, federation), run_constants(config, federation.mesh)
    base, folder, programs = training_base(config, federation), Path(mkdtemp()), []
    atexit.register(rmtree, folder, ignore_errors=True)
    memories = open_memories(config, federation, server, folder)

    def batches() -> Cohort:
        return remembering(cohort_of(config, federation, 0), memories)

    def arguments() -> tuple[Server, Cohort]:
        return jax.tree.map(jnp.copy, server), batches()

    ready = [arguments()]

    def one_round() -> Server:
        before, cohort = ready.pop()
        if not programs:
            programs.append(compile_round(config, federation, base, before, constants, cohort)[0])
        new = programs[0](base, before, constants, cohort)[0]
        ready.append(arguments())  # as in a run: the next round's, while the devices work
        return jax.block_until_ready(new)

    return one_round


def python_loop(config: Config, federation: Federation) -> Round:
    """A Python loop over clients: download, compiled local steps, upload; then one update."""
    method, population = federation.method, federation.task.population
    base = training_base(config, federation)
    server, (keys, rates) = initial_server(config, federation), run_constants(config, federation.mesh)
    sketch_key = jax.random.fold_in(keys.sketch, 0)
    local_steps = partial(
        train, federation.task.model.score, federation.optimizer, passes=federation.steps.passes, rates=rates
    )
    steps = jax.jit(local_steps, compiler_options=compiler_options(config.model.products))
    download = jax.jit(method.download, static_argnums=3)
    add = jax.jit(lambda total, more: jax.tree.map(jnp.add, total, more))
    send = jax.jit(partial(sent, method, jax.random.fold_in(keys.network, 0)))
    update = jax.jit(partial(method.update, keys.server))

    def one_round() -> Server:
        total = None
        for client in federation.cohort(0):
            k = int(population.ranks[client])
            layout = federation.layout._replace(caps=(k,), lanes=1)
            alone = make_cohort(
                population, federation.steps, layout, client[None], 0, shape=federation.shape, chunks=1
            )
            who, batches = jax.tree.map(lambda x: x[0, 0], alone)
            one = jax.tree.map(lambda x: x[0], who)
            given = jax.tree.map(
                lambda x: x[None], download(jax.random.fold_in(sketch_key, int(client)), server, one, k)
            )
            after, _ = steps(base, [given], batches, jnp.int32(0), None)
            share = jnp.float32(1 / len(federation.cohort(0)))[None]
            payload = send(server, given, after[0], who._replace(weight=share))
            total = payload if total is None else add(total, payload)
        return jax.block_until_ready(update(server, total))

    return one_round


def sent(
    method: Method, key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
) -> Combined:
    """What one client, alone in its tier, adds to the sum."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, client.id)
    upload = jax.vmap(method.upload, in_axes=(0, None, 0, 0, 0))
    return method.combine([upload(keys, server, before, after, client)[0]], [client.weight])


def drjax_map(config: Config, federation: Federation) -> Round:
    """The clients as DrJAX's map, their uploads through its reduce; shapes must be equal, so all have rank r."""
    try:
        import drjax
    except ImportError:
        raise UserError("engine 'drjax': drjax is not installed; pip install 'fslora_jax[bench]'") from None
    config, federation = with_layout(config, federation, tiered=False, chunks=1)
    method, products, mesh = federation.method, config.model.products, federation.mesh
    base = narrowed(federation.task.base, products)  # a copy for each client: turned kernels only cost
    server, (keys, rates) = initial_server(config, federation), run_constants(config, federation.mesh)
    cohort = cohort_of(config, federation, 0)
    sketch_key, network_key = (jax.random.fold_in(key, 0) for key in (keys.sketch, keys.network))
    local_steps = partial(train, federation.task.model.score, federation.optimizer, rates=rates)

    slots = cohort.clients.id.size

    @drjax.program(placements={CLIENTS: slots})
    def program(base, server, cohort):
        def one_client(base, server, client, batch):
            given = method.download(
                jax.random.fold_in(sketch_key, client.id), server, client, federation.spec.r
            )
            given, batch = jax.tree.map(lambda x: x[None], (given, batch))
            (after,), _ = local_steps(base, [given], batch, jnp.int32(0), None)
            return sent(method, network_key, server, given, after, jax.tree.map(lambda x: x[None], client))

        clients, batches = jax.tree.map(lambda x: x.reshape(slots, *x.shape[3:]), cohort)
        shared = drjax.broadcast((base, server))
        uploads = drjax.map_fn(one_client, (*shared, clients, batches))
        return method.update(keys.server, server, drjax.reduce_sum(uploads))

    step = jax.jit(program, compiler_options=compiler_options(products))

    def one_round() -> Server:
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jax.block_until_ready(step(base, server, cohort))

    return one_round


ENGINES: dict[str, Callable[[Config, Federation], Round]] = {
    "tiered": partial(compiled, tiered=True),
    "masked": partial(compiled, tiered=False),
    "unchunked": partial(compiled, tiered=True, chunks=1),
    "loop": python_loop,
    "drjax": drjax_map,
    "torch": partial(torch_engine, pad_to_max=False),
    "torch-padded": partial(torch_engine, pad_to_max=True),
}

OURS = ("tiered", "masked", "unchunked")
"""This package's round, whatever the method."""

ONE_BY_ONE = ("loop", "torch", "torch-padded")
"""Engines whose clients take turns: each client has the whole machine, as one device with all its cores."""


def engine_round(engine: str, config: Config) -> tuple[Federation, Round]:
    """What an engine computes with, and its round."""
    alone = engine in ONE_BY_ONE
    federation = federation_of(config, load_task(config, None), None) if alone else set_up(config)
    if engine not in OURS and federation.method.first_memory is not None:
        raise UserError(
            f"engine {engine!r}: it has no memory for clients, which {config.federation.method} needs; "
            f"expected some of {', '.join(OURS)}"
        )
    return federation, ENGINES[engine](config, federation)
