"""What engines cannot do, told before anything is loaded."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from fslora_jax.config import Config
from fslora_jax.data.tasks import TASKS
from fslora_jax.errors import UserError
from fslora_jax.federation.cohort import steps_done
from fslora_jax.federation.method import make_method
from fslora_jax.federation.setup import cohort_sampler
from fslora_jax.methods import Spec

OURS = ("tiered", "masked", "unchunked", "chunked")
"""This package's round, which does all that a config may say."""

TORCH = ("torch", "torch-padded")

PACKAGES = {"drjax": ("drjax",)} | dict.fromkeys(TORCH, ("torch", "transformers", "peft"))
"""What an engine needs beside this package."""


class Limit(NamedTuple):
    """A setting, its value, and what an engine takes there; ``met`` says whether the value is such."""

    met: bool
    field: str
    found: object
    expected: str


def default_engines(config: Config) -> tuple[str, ...]:
    """This package's ways with a cohort, and all peers; the first is what the ratios are to."""
    other = "unchunked" if config.federation.cohort_chunks > 1 else "chunked"
    return ("tiered", "masked", other, "loop", "drjax", *TORCH)


def check_engine(engine: str, config: Config) -> None:
    """Refuses a config that an engine cannot do, and an engine whose packages are not there.

    Raises:
      UserError: names the setting.
    """
    if missing := [package for package in PACKAGES.get(engine, ()) if find_spec(package) is None]:
        raise UserError(
            f"engine {engine!r}: {', '.join(missing)} not found; pip install 'fslora_jax[bench]', or leave it out"
        )
    for limit in limits_of(engine, config):
        if not limit.met:
            raise UserError(
                f"engine {engine!r}: {limit.field}: found {limit.found}, expected {limit.expected}; "
                "change that, or leave out the engine"
            )


def limits_of(engine: str, config: Config) -> Iterator[Limit]:
    """What an engine takes of a config.

    The peers written in JAX train as this package does, one client at a time, so that they lack its memories alone.
    That in PyTorch is a program of its own, with what it was written for.
    """
    f, c = config.federation, config.client_optimizer
    method = make_method(config, Spec({}, config.lora.r, 1.0))
    yield Limit(anybody(config), "federation.failure_rate", f.failure_rate, "one at which a client reports")
    if engine in OURS:
        return
    chosen = " in ".join((f.method, *f.wrappers))
    yield Limit(method.first_memory is None, "federation.method", chosen, "one whose clients keep no memory")
    if engine not in TORCH:
        return
    yield Limit(f.method in ("fslora", "fedit"), "federation.method", f.method, "fslora or fedit")
    yield Limit(not f.method_options, "federation.method_options", f.method_options, "none")
    yield Limit(not f.wrappers, "federation.wrappers", ", ".join(f.wrappers), "none")
    plain, server = config.server_optimizer.is_plain, config.server_optimizer.name
    yield Limit(plain, "server_optimizer", server, "plain averaging (sgd at 1)")
    decay = "0 with momentum, where PyTorch's decay is another"
    decoupled = c.name == "adamw" or not c.momentum or not c.weight_decay
    yield Limit(decoupled, "client_optimizer.weight_decay", c.weight_decay, decay)
    packed = config.model.quantization
    yield Limit(packed == "none", "model.quantization", packed, "none")
    numbers = TASKS[config.data.task].kind == "regression"
    yield Limit(not numbers, "data.task", config.data.task, "labels or texts to predict, no numbers")


def anybody(config: Config) -> bool:
    """Whether a client of round 0 does a step."""
    f = config.federation
    done = steps_done(
        config.seed,
        0,
        config.population,
        local_steps=f.local_steps,
        min_local_steps=f.min_local_steps or f.local_steps,
        failure_rate=f.failure_rate,
    )
    return bool(done[cohort_sampler(config)(0)].any())
