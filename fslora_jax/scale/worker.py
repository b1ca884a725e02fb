"""One point of a curve in a process of its own: reads commands from stdin, answers with JSON lines on stdout."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fslora_jax.bench.worker import mistakes_told, peak_bytes, say
from fslora_jax.config import make_config
from fslora_jax.data.batches import BatchShape
from fslora_jax.federation.calls import cohort_of, compile_round, training_base
from fslora_jax.federation.memories import remembering
from fslora_jax.federation.setup import initial_server, open_memories, run_constants
from fslora_jax.models import Model
from fslora_jax.plan import compiled as plan
from fslora_jax.plan.abstract import abstract_model
from fslora_jax.plan.search import moved
from fslora_jax.processes import ENVIRONMENT, join
from fslora_jax.program import Collective, collectives, memory_of
from fslora_jax.scale.curves import Point
from fslora_jax.scale.made import LABELS, made_federation
from fslora_jax.sharding import AXES, CLIENTS


def read_point(path: Path) -> Point:
    """A point as `measure` writes it."""
    point = Point(**json.loads(path.read_text(encoding="utf-8")))
    return point._replace(config=make_config(point.config, "point"))


def exchanged(found: list[Collective], sizes: dict[str, int]) -> int:
    """Bytes that a device sends to devices of other clients in a round, at the least."""
    return round(sum(moved(one, sizes) for one in found if CLIENTS in one.axes))


def sizes_of(values: Any) -> int:
    """Numbers in all arrays, abstract or not."""
    return sum(x.size for x in jax.tree.leaves(values))


def analysed(point: Point, model: Model) -> dict[str, Any]:
    """What the compiler says, from abstract arrays alone."""
    config, length = point.config, point.config.data.max_length
    shape = BatchShape(config.federation.batch_size, length, 0)
    found = plan.compile_abstract(config, model, shape, jax.devices())
    parts = {name: getattr(found, name) for name in ("arguments", "temporaries", "outputs", "flops")}
    return parts | {
        "compile_seconds": found.seconds,
        "exchanged": exchanged(list(found.exchanges), found.sizes),
    }


def ready_round(point: Point, model: Model, folder: Path) -> tuple[dict[str, Any], Any]:
    """What the compiler says of the round, and a function that does it: seconds in all, and of these to feed it.

    What clients remember lies in ``folder``.
    """
    config, federation = point.config, made_federation(point.config, model)
    server, constants = initial_server(config, federation), run_constants(config, federation.mesh)
    memories = open_memories(config, federation, server, folder / "memories")
    base, cohort = training_base(config, federation), remembering(cohort_of(federation, 0), memories)
    program, seconds = compile_round(config, federation, base, server, constants, cohort)
    mesh = federation.mesh
    sizes = {axis: 1 if mesh is None else int(mesh.shape[axis]) for axis in AXES}
    facts = {
        "compile_seconds": seconds,
        **memory_of(program)._asdict(),
        "exchanged": exchanged(collectives(program.as_text() or "", sizes), sizes),
    }

    def one_round() -> dict[str, float]:
        before = jax.block_until_ready(jax.tree.map(jnp.copy, server))
        started = time.perf_counter()
        cohort = jax.block_until_ready(remembering(cohort_of(federation, 0), memories))
        fed = time.perf_counter()
        jax.block_until_ready(program(base, before, constants, cohort))
        return {"seconds": time.perf_counter() - started, "feed_seconds": fed - started}

    return facts, one_round


def main() -> None:
    """``python -m fslora_jax.scale.worker POINT.json``; commands: ``run``, ``peak``."""
    sys.stdout = sys.stderr
    with mistakes_told():
        point = read_point(Path(sys.argv[1]))
        if ENVIRONMENT[0] in os.environ:
            join()
        model = abstract_model(point.config, LABELS, point.fields)
        parameters = {"parameters": sizes_of(jax.eval_shape(model.init_base, jax.random.key(0)))}
        if not point.runs:
            say(analysed(point, model) | parameters)
            return
        facts, one_round = ready_round(point, model, Path(sys.argv[1]).parent)
        say(facts | parameters)
        for command in sys.stdin:
            say({"peak_bytes": peak_bytes()} if command.strip() == "peak" else one_round())


if __name__ == "__main__":
    main()
