"""Runs that share one program: which ones may, and how their federations are made alike."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from fslora_jax.config import Config
from fslora_jax.data.batches import BatchShape
from fslora_jax.federation.calls import cohort_of
from fslora_jax.federation.feed import shape_of
from fslora_jax.federation.round import Cohort
from fslora_jax.federation.setup import Federation, with_feed
from fslora_jax.federation.shapes import plan_shape, planned_rounds
from fslora_jax.rundir import settings_of

T = TypeVar("T")
FREE = (
    "seed",
    "client_optimizer.learning_rate",
    "client_optimizer.head_learning_rate",
    "partition.dirichlet_alpha",
)
"""Settings that are no part of a program, or only by the shape of its batches."""


def program_of(config: Config) -> str | None:
    """What all configs have in common whose runs can share one program; None of a run that has to be alone.

    Dropout draws masks in the shape of the rows, and the head that is frozen is part of the base: such runs would
    find something else beside others than alone. Where there are several devices, one run has them all.
    """
    if jax.device_count() > 1 or config.lora.lora_dropout or config.lora.modules_to_save is not None:
        return None
    return settings_of(config, but=FREE)


def start_of(config: Config) -> tuple[int, float]:
    """What decides data and first weights of runs that share a program: where it is equal, only rates differ."""
    return config.seed, config.partition.dirichlet_alpha


def alike(configs: Sequence[Config], federations: Sequence[Federation]) -> list[Federation]:
    """The same federations with slots, rows and batches of one shape, the smallest that holds all of them."""
    if len(federations) == 1:
        return list(federations)
    feeds = [f.feed for f in federations]
    caps = tuple(map(max, zip(*(feed.layout.caps for feed in feeds), strict=True)))
    row_length = max(feed.steps.row_length for feed in feeds)
    config = configs[0]
    rounds = planned_rounds(feeds[0].steps, config.federation.num_rounds, config.clients_per_round)

    def aligned(f: Federation) -> Federation:
        layout, steps = f.feed.layout._replace(caps=caps), f.feed.steps._replace(row_length=row_length)
        return with_feed(f, layout=layout, steps=steps)

    # Runs that differ in their rates alone are one federation, laid out once.
    once = {id(f): aligned(f) for f in federations}
    shapes = [plan_shape(f.task.population, f.feed.steps, f.feed.cohort, rounds) for f in once.values()]
    shape = BatchShape(*map(max, zip(*shapes, strict=True)))
    return [with_feed(once[id(f)], shape=shape) for f in federations]


def cohorts_together(federations: Sequence[Federation], rounds: range) -> list[Cohort]:
    """Each run's arrays of some rounds, in one shape even where one of them needs more rows than were planned."""
    made = [cohort_of(f, *rounds) for f in federations]
    shapes = list(map(shape_of, made))
    if len(set(shapes)) == 1:
        return made
    # They are of one series, so the largest holds all.
    return [cohort_of(with_feed(f, shape=max(shapes)), *rounds) for f in federations]


def joined(parts: Sequence[T]) -> T:
    """Values of several runs on a leading axis; those of one as they are."""
    return parts[0] if len(parts) == 1 else _join(parts)


def parted(values: T, runs: int) -> list[T]:
    """The inverse of `joined`."""
    return [values] if runs == 1 else _part(values, runs)


def parted_here(values: T, runs: int) -> list[T]:
    """`parted` of arrays on the host, which no device is asked for."""
    return [values] if runs == 1 else _each(values, runs)


@jax.jit
def _join(parts: Sequence[T]) -> T:
    return jax.tree.map(lambda *of_run: jnp.stack(of_run), *parts)


def _each(values: T, runs: int) -> list[T]:
    return [jax.tree.map(lambda x, i=i: x[i], values) for i in range(runs)]


_part = jax.jit(_each, static_argnums=1)
