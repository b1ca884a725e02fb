"""One engine in a process of its own: reads commands from stdin, answers with JSON lines on stdout."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fslora_jax.bench.engines import ONE_BY_ONE, engine_round
from fslora_jax.bench.limits import TORCH
from fslora_jax.bench.torch_loop import torch_device
from fslora_jax.bench.work import fill_of, work_of
from fslora_jax.chips import peak_rate
from fslora_jax.config import Config, ModelConfig, load_config
from fslora_jax.errors import UserError, memory_told
from fslora_jax.federation.setup import Federation, settle_devices

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


def devices_here() -> list[Any]:
    """The devices that JAX computes on.

    Raises:
      UserError: there are none of the kind that was asked for.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # some versions of JAX assert that there is one
        reason = (str(error).splitlines() or ["it finds none"])[0]
        raise UserError(f"--device: JAX cannot use what it names: {reason}; choose another") from None


def peak_of(engine: str, config: Config, federation: Federation) -> float | None:
    """The data sheets' operations a second of all devices that an engine computes on; None where one is not known."""
    rate = peak_rate(devices_here()[0].device_kind, config.model.dtype)
    if rate is None or (engine in TORCH and torch_device() != "cuda"):
        return None
    return rate * (federation.mesh.size if federation.mesh else 1)


def peak_bytes() -> int:
    """Most memory that this process held: the device's where it counts, else the host's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(answer: dict[str, Any]) -> None:
    """One answer; nothing else is written to the real stdout."""
    print(json.dumps(answer), file=sys.__stdout__, flush=True)


@contextmanager
def mistakes_told() -> Iterator[None]:
    """Answers with a user's mistake, and ends."""
    try:
        with memory_told():
            yield
    except UserError as error:
        say({"error": str(error)})


def main() -> None:
    """``python -m fslora_jax.bench.worker ENGINE CONFIG.yaml``; commands: ``rate``, ``run``, ``peak``."""
    sys.stdout = sys.stderr
    engine, path = sys.argv[1:]
    with mistakes_told():
        config = load_config(Path(path))
        if engine not in ONE_BY_ONE:
            settle_devices(config)
        kind = devices_here()[0].device_kind
        federation, one_round = engine_round(engine, config)
        work, peak = work_of(federation), peak_of(engine, config, federation)
        fill = fill_of(federation)
        say({"work": work._asdict(), "fill": fill, "device": kind, "peak_flops_per_second": peak})
        for command in sys.stdin:
            if command.strip() == "rate":
                say({"flops_per_second": matmul_rate(config.model)})
            elif command.strip() == "peak":
                say({"peak_bytes": peak_bytes()})
            else:
                started = time.perf_counter()
                one_round()
                say({"seconds": time.perf_counter() - started})


if __name__ == "__main__":
    main()
