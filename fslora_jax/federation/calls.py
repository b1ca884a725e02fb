"""Calls of the device: which rounds make one, their arrays, and the compiled program."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.config import Config
from fslora_jax.federation.feed import make_cohort
from fslora_jax.federation.round import SERVER, Cohort, Constants, make_round, several_rounds, several_runs
from fslora_jax.federation.setup import Federation
from fslora_jax.methods import Server
from fslora_jax.models import shifted
from fslora_jax.models.kernels import laid_out, narrowed

T = TypeVar("T")


class Call(NamedTuple):
    """Rounds that are one dispatch, and whether the server after them is evaluated and saved."""

    rounds: range
    evaluates: bool
    saves: bool


def calls_of(config: Config, done: int) -> list[Call]:
    """The calls that remain: ``rounds_per_call`` each, but none goes beyond an evaluation or a checkpoint."""
    calls, num_rounds = [], config.federation.num_rounds
    while done < num_rounds:
        evaluation, checkpoint = (
            min(done - done % every + every, num_rounds)
            for every in (config.evaluate_every, config.checkpoint_every)
        )
        stop = min(done + config.federation.rounds_per_call, evaluation, checkpoint)
        calls.append(Call(range(done, stop), stop == evaluation, stop == checkpoint))
        done = stop
    return calls


def cohort_of(federation: Federation, *rounds: int) -> Cohort:
    """The arrays of a round, or of the rounds of one call; several have a leading axis."""
    return make_cohort(federation.task.population, federation.feed, rounds, federation.mesh)


def by_round(rounds: range, values: T) -> Iterator[tuple[int, T]]:
    """Each round of a call with its part of the values."""
    if len(rounds) == 1:
        yield rounds.start, values
        return
    for i, t in enumerate(rounds):
        yield t, jax.tree.map(lambda x, i=i: x[i], values)


class Programs:
    """The compiled calls, one for each number of rounds and shape of batches, and the seconds that they took.

    There is one shape, unless a round's batches need more rows than were planned. ``runs``: of so many in one program.
    ``base`` is what they take as the base.
    """

    def __init__(self, config: Config, federation: Federation, runs: int = 1):
        self._config, self._federation, self._runs = config, federation, runs
        self._by_shape: dict[tuple[int, ...], Any] = {}
        started = time.perf_counter()
        self.base = training_base(config, federation)
        self.seconds = time.perf_counter() - started

    def of(self, server: Server, constants: Constants, cohort: Cohort) -> Any:
        """The program for a cohort's shape."""
        shape = (*cohort.batches.tokens.shape, *cohort.batches.places.shape)
        if shape not in self._by_shape:
            program, seconds = compile_round(
                self._config, self._federation, self.base, server, constants, cohort, self._runs
            )
            self._by_shape[shape] = program
            self.seconds += seconds
        return self._by_shape[shape]


def training_base(config: Config, federation: Federation) -> PyTree:
    """The base as the products of a run's rounds want it; a method that moves it makes it so anew in each round."""
    base = federation.task.base
    if federation.method.traits.moves_base:
        return base
    return arranged(config, federation.mesh, base)


def arranged(config: Config, mesh: Mesh | None, base: PyTree) -> PyTree:
    """A base with kernels as precise, and as they lie in memory, as products want them; the rest is not copied."""
    return laid_out(narrowed(base, config.model.products), mesh, config.model.remat)


def compile_round(
    config: Config,
    federation: Federation,
    base: PyTree,
    server: Server,
    constants: Constants,
    cohort: Cohort,
    runs: int = 1,
):
    """The executable of all rounds of this shape, or of all calls of so many, and the seconds that it took.

    ``base`` is a `training_base`. The executable takes the place of the server that it is given, which is no longer
    there afterwards. Of several ``runs`` all but the base has a leading axis.
    """
    started = time.perf_counter()
    one_round = make_round(
        federation.task.model.score,
        federation.method,
        federation.optimizer,
        federation.feed.layout,
        local_steps=config.federation.local_steps,
        dropout=config.lora.lora_dropout > 0,
        passes=federation.feed.steps.passes,
        mesh=federation.mesh,
        shift=lambda base, delta: arranged(config, federation.mesh, shifted(base, delta)),
    )
    if cohort.clients.id.ndim - (runs > 1) > 3:  # (rounds, groups, chunks, slots)
        one_round = several_rounds(one_round)
    if runs > 1:
        one_round = several_runs(one_round)
    program = jax.jit(
        one_round, donate_argnums=SERVER, compiler_options=compiler_options(config.model.products)
    )
    compiled = program.lower(base, server, constants, cohort).compile()
    return compiled, time.perf_counter() - started
