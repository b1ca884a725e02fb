"""Compilations in processes of their own: the TPU compiler may end its process without a word."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.errors import UserError
from fslora_jax.plan.abstract import abstract_model
from fslora_jax.plan.compiled import Compiled, compile_abstract
from fslora_jax.plan.topology import chip_of, devices_of, prepare

T = TypeVar("T")


class CompilerDied(UserError):
    """The process of a compilation has ended before it said anything."""


def compiler_for(topology: str, num_labels: int, shape: BatchShape) -> Callable[[Config], Compiled]:
    """What compiles the round of a config for a slice; for CPUs in this process, which has `prepare`d itself."""
    if chip_of(topology) is None:
        return partial(compile_for, topology, num_labels, shape)
    return partial(apart, compile_afresh, topology, num_labels, shape)


def compile_for(topology: str, num_labels: int, shape: BatchShape, config: Config) -> Compiled:
    """The round of a config, compiled for a slice."""
    return compile_abstract(config, abstract_model(config, num_labels), shape, devices_of(topology))


def compile_afresh(topology: str, num_labels: int, shape: BatchShape, config: Config) -> Compiled:
    """The same in a new process."""
    prepare(topology)
    return compile_for(topology, num_labels, shape, config)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns, or raises, in a process of its own.

    Raises:
      CompilerDied: the process did.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise CompilerDied(
                "the compiler died, its last words are above; another model.remat, or another release of libtpu, may do"
            ) from None
