"""The engines under comparison: each builds a function that does round 0 of a config from the same state.

Where there are several devices all spread the clients over them, but for those that take one client after another.

| name            | what it is                                                                               |
|-----------------|------------------------------------------------------------------------------------------|
| `tiered`        | this package: the whole round in one program, clients of one rank in one tier             |
| `masked`        | the same with every client at the global rank                                             |
| `unchunked`     | `tiered` with the whole cohort at once                                                     |
| `chunked`       | `tiered` in the config's chunks, or else with one client of each device at a time         |
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
import numpy as np
from jaxtyping import PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.bench.limits import TORCH, check_engine
from fslora_jax.bench.torch_loop import torch_engine
from fslora_jax.config import Config
from fslora_jax.federation.calls import arranged, cohort_of, compile_round, training_base
from fslora_jax.federation.cohort import Layout, plan_layout
from fslora_jax.federation.feed import host_cohort
from fslora_jax.federation.memories import remembering
from fslora_jax.federation.round import Cohort, Constants, announced, client_keys, local_training
from fslora_jax.federation.setup import (
    Federation,
    federation_of,
    initial_server,
    load_task,
    open_memories,
    run_constants,
    set_up,
    with_feed,
)
from fslora_jax.methods import Combined, Method, Server, merge
from fslora_jax.models import shifted
from fslora_jax.models.kernels import narrowed
from fslora_jax.sharding import CLIENTS

Round = Callable[[], object]
"""Does one round and waits for its end; the first call also compiles."""


def with_layout(federation: Federation, *, tiered: bool, chunks: int) -> Federation:
    """The same federation with another layout of the cohort."""
    layout = plan_layout(
        federation.task.population.ranks,
        [federation.feed.cohort(0)],
        r=federation.spec.r,
        tiered=tiered and not federation.method.traits.holds_all,
        groups=federation.feed.layout.groups,
        chunks=chunks,
    )
    return with_feed(federation, layout=layout)


def compiled(config: Config, federation: Federation, *, tiered: bool, chunks: int | None = None) -> Round:
    """This package's round."""
    federation = with_layout(federation, tiered=tiered, chunks=chunks or federation.feed.layout.chunks)
    server, constants = initial_server(config, federation), run_constants(config, federation.mesh)
    base, folder, programs = training_base(config, federation), Path(mkdtemp()), []
    atexit.register(rmtree, folder, ignore_errors=True)
    memories = open_memories(config, federation, server, folder)

    def batches() -> Cohort:
        return remembering(cohort_of(federation, 0), memories)

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


def chunked(config: Config, federation: Federation) -> Round:
    """This package's round in the config's chunks, or where it has none with one client of each device at a time."""
    _, groups, chunks = federation.feed.layout
    if chunks == 1:
        chunks = -(-config.clients_per_round // groups)
    return compiled(config, federation, tiered=True, chunks=chunks)


def python_loop(config: Config, federation: Federation) -> Round:
    """A Python loop over clients, each one's download, local steps and upload in one program; then one update."""
    base, server = training_base(config, federation), initial_server(config, federation)
    constants, method = run_constants(config, federation.mesh), federation.method

    def client(base: PyTree, server: Server, constants: Constants, alone: Cohort, cap: int) -> Combined:
        return one_client(config, federation, cap, base, server, constants, alone)

    program = jax.jit(client, static_argnums=4, compiler_options=compiler_options(config.model.products))
    move = jax.jit(lambda base, server: arranged(config, federation.mesh, shifted(base, server.base_delta)))
    add, update = jax.jit(merge), jax.jit(partial(updated, method, constants))

    def one_round() -> Server:
        cohort = host_cohort(federation.task.population, federation.feed, 0)
        cohort = jax.tree.map(lambda x: x[0], cohort)  # of the only group
        here = move(base, server) if method.traits.moves_base else base
        told = server._replace(announced=announced(method, cohort.clients, None))
        total = None
        for place in zip(*np.nonzero(cohort.clients.weight), strict=True):
            alone = jax.tree.map(lambda x, place=place: x[place][None], cohort)
            cap = federation.spec.r if method.traits.holds_all else int(cohort.clients.k[place])
            sent = program(here, told, constants, alone, cap)
            total = sent if total is None else add(total, sent)
        return jax.block_until_ready(update(server, total))

    return one_round


def one_client(
    config: Config,
    federation: Federation,
    cap: int,
    base: PyTree,
    server: Server,
    constants: Constants,
    alone: Cohort,
) -> Combined:
    """What one client adds to the sum, alone in a tier of rank ``cap``; leaves of ``alone`` are ``(1, ...)``."""
    method = federation.method
    locally = local_training(
        federation.task.model.score,
        method,
        federation.optimizer,
        Layout((cap,)),
        local_steps=config.federation.local_steps,
        dropout=config.lora.lora_dropout > 0,
        passes=federation.feed.steps.passes,
    )
    (before,), (after,), _ = locally(base, server, constants, alone)
    keys = client_keys(constants.keys.network, server, alone.clients.id)
    upload = jax.vmap(method.upload, in_axes=(0, None, 0, 0, 0))
    return method.combine([upload(keys, server, before, after, alone.clients)[0]], [alone.clients.weight])


def updated(method: Method, constants: Constants, server: Server, combined: Combined) -> Server:
    """The server after the round."""
    return method.update(jax.random.fold_in(constants.keys.server, server.round), server, combined)


def drjax_map(config: Config, federation: Federation) -> Round:
    """The clients as DrJAX's map, their uploads through its reduce; shapes must be equal, so all have rank r.

    Their minibatches go through the model whole, since one map has no loops of different lengths.
    """
    import drjax

    federation = with_layout(federation, tiered=False, chunks=1)
    federation = with_feed(federation, steps=federation.feed.steps._replace(passes=None))
    method, r, mesh = federation.method, federation.spec.r, federation.mesh
    # Each client has a copy, so that turned kernels only cost.
    ready = partial(narrowed, products=config.model.products)
    base = federation.task.base if method.traits.moves_base else ready(federation.task.base)
    server, constants = initial_server(config, federation), run_constants(config, mesh)
    cohort = cohort_of(federation, 0)
    slots = cohort.clients.id.size

    @drjax.program(placements={CLIENTS: slots})
    def program(base, server, cohort):
        def client(base, server, cohort):
            alone = jax.tree.map(lambda x: x[None], cohort)
            return one_client(config, federation, r, base, server, constants, alone)

        clients = jax.tree.map(lambda x: x.reshape(slots, *x.shape[3:]), cohort)
        here = ready(shifted(base, server.base_delta)) if method.traits.moves_base else base
        all_clients = jax.tree.map(lambda x: x[None], clients.clients)
        told = server._replace(announced=announced(method, all_clients, None))
        sent = drjax.map_fn(client, (*drjax.broadcast((here, told)), clients))
        combined = drjax.reduce_sum(sent._replace(peak={}))
        peak = jax.tree.map(lambda x: x.max(0), sent.peak)  # DrJAX reduces by sums alone
        combined = combined._replace(peak=peak)
        return updated(method, constants, server, combined)

    step = jax.jit(program, compiler_options=compiler_options(config.model.products))

    def one_round() -> Server:
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jax.block_until_ready(step(base, server, cohort))

    return one_round


ENGINES: dict[str, Callable[[Config, Federation], Round]] = {
    "tiered": partial(compiled, tiered=True),
    "masked": partial(compiled, tiered=False),
    "unchunked": partial(compiled, tiered=True, chunks=1),
    "chunked": chunked,
    "loop": python_loop,
    "drjax": drjax_map,
    "torch": partial(torch_engine, pad_to_max=False),
    "torch-padded": partial(torch_engine, pad_to_max=True),
}

ONE_BY_ONE = ("loop", *TORCH)
"""Engines whose clients take turns: each client has the whole machine, as one device with all its cores."""


def engine_round(engine: str, config: Config) -> tuple[Federation, Round]:
    """What an engine computes with, and its round.

    Raises:
      UserError: it cannot do the config; before anything is loaded.
    """
    check_engine(engine, config)
    alone = engine in ONE_BY_ONE
    federation = federation_of(config, load_task(config, None), None) if alone else set_up(config)
    return federation, ENGINES[engine](config, federation)
