"""One engine in a process of its own: reads commands from stdin, answers with JSON lines on stdout."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fslora_jax.bench.engines import engine_round
from fslora_jax.bench.work import fill_of, work_of
from fslora_jax.config import ModelConfig, load_config
from fslora_jax.errors import UserError

PRODUCTS = 8
"""Matrix products of a measurement of the machine's best rate."""


def matmul_rate(model: ModelConfig) -> float:
    """FLOP/s of a large matrix product in the model's precision: best of a few tries."""
    n = 8192 if jax.default_backend() != "cpu" else 2048
    factors, result = (model.dtype,) * 2 if model.products == "same" else (model.products, model.dtype)
    a = jax.random.normal(jax.random.key(0), (n, n), factors)  # a GPU is faster on numbers that are all alike
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.dtype(result))).lower(a).compile()
    product(a).block_until_ready()
    seconds = []
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def peak_bytes() -> int:
    """Most memory that this process held: the device's where it counts, else the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(answer: dict[str, Any]) -> None:
    """One answer; nothing else is written to the real stdout."""
    print(json.dumps(answer), file=sys.__stdout__, flush=True)


def main() -> None:
    """``python -m fslora_jax.bench.worker ENGINE CONFIG.yaml``; commands: ``rate``, ``run``, ``peak``."""
    sys.stdout = sys.stderr
    engine, path = sys.argv[1:]
    try:
        config = load_config(Path(path))
        federation, one_round = engine_round(engine, config)
        say({"work": work_of(federation)._asdict(), "fill": fill_of(config, federation)})
        for command in sys.stdin:
            if command.strip() == "rate":
                say({"flops_per_second": matmul_rate(config.model)})
            elif command.strip() == "peak":
                say({"peak_bytes": peak_bytes()})
            else:
                started = time.perf_counter()
                one_round()
                say({"seconds": time.perf_counter() - started})
    except UserError as error:
        say({"error": str(error)})


if __name__ == "__main__":
    main()
