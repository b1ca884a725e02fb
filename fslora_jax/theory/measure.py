"""A run's objective as the theory sees it, and the measurement of its quantities at the run's checkpoints."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.checkpoint import Checkpoints
from fslora_jax.config import Config
from fslora_jax.data.batches import make_batch, shape_for
from fslora_jax.errors import UserError
from fslora_jax.federation.results import load_round
from fslora_jax.federation.setup import Federation, initial_server
from fslora_jax.methods import Client, build, whole
from fslora_jax.random import Purpose, device_key, host_rng
from fslora_jax.rundir import CHECKPOINTS, load_run_config
from fslora_jax.theory.estimate import Estimate, mean, u_statistic
from fslora_jax.theory.growth import update_spread
from fslora_jax.theory.moments import client_sums, for_population, moments, own_part, sampling_variances
from fslora_jax.theory.smoothness import along, hessian_product, largest_eigenvalue
from fslora_jax.types import Batch, Trainable

HELD_OUT = 4
"""Replicates on which curvature along a direction is measured; the direction is found on another one."""


class Sizes(NamedTuple):
    """How much is measured: sketches of each client, minibatches of each sketch, clients, Lanczos and local steps."""

    draws: int
    batches: int
    clients: int
    lanczos: int
    steps: int


class Sample(NamedTuple):
    """Clients, keys of sketches ``(C, R)`` and minibatches ``(C, R, Q, ...)``, the same at every point of a run."""

    clients: Client
    keys: Key[Array, "C R"]
    batches: Batch


class Run(NamedTuple):
    """A run, its ``objective``, and its global weights by round, in units in which one learning rate serves all."""

    config: Config
    federation: Federation
    loss: Callable[..., Float[Array, ""]]
    points: dict[int, Trainable]


def open_run(run_dir: Path, rounds: Sequence[int] | None) -> Run:
    """A run at the rounds that have a checkpoint, or some of them, and at its start, round 0.

    Raises:
      UserError: no FSLoRA run, or no checkpoint of a round.
    """
    method = load_run_config(run_dir).federation.method
    if method != "fslora":
        raise UserError(f"{run_dir}: federation.method is {method}; expected a run of fslora")
    checkpoints = Checkpoints(run_dir / CHECKPOINTS)
    saved = checkpoints.rounds()
    if unknown := sorted({*(rounds or ())} - {0, *saved}):
        raise UserError(f"rounds: no checkpoint of round {unknown[0]}; there are {[0, *saved]}")
    config, federation, _, _ = load_round(run_dir, None)
    start, c = initial_server(config, federation), config.client_optimizer
    wanted = sorted({0, *(saved if rounds is None else rounds)})
    found = {t: checkpoints.restore(t, start).weights if t else start.weights for t in wanted}
    checkpoints.close()
    ratio = 1.0 if c.head_learning_rate is None else c.head_learning_rate / c.learning_rate
    points = {t: scale_head(weights, ratio**-0.5) for t, weights in found.items()}
    return Run(config, federation, objective(config, federation, ratio**0.5), points)


def scale_head(weights: Trainable, factor: float) -> Trainable:
    """The head in other units. Descent on ``u = x / sqrt(c)`` is descent on ``x`` at ``c`` times the learning rate."""
    return weights._replace(head=jax.tree.map(lambda x: factor * x, weights.head))


def objective(config: Config, federation: Federation, unit: float = 1.0) -> Callable[..., Float[Array, ""]]:
    """``(base, weights, key, client, batch) -> loss`` of one minibatch under the sketch that a client draws by ``key``.

    Sketches are the method's own, in the places of the global adapter; a client with ``k = r`` has ``S = I``.
    """
    spec, options = federation.spec, config.federation.method_options | {"redraw": True}
    at_step: Any = build("fslora", options, {}, spec, optax.sgd(1.0)).at_step

    def loss(
        base: PyTree, weights: Trainable, key: Key[Array, ""], client: Client, batch: Batch
    ) -> Float[Array, ""]:
        held = whole(spec, scale_head(weights, unit))
        # A draw by importance looks at the weights, but clients have no gradient of it.
        held = at_step(key, client, jax.lax.stop_gradient(held))._replace(weights=held.weights)
        score = federation.task.model.score(base, *jax.tree.map(lambda x: x[None], ([held], batch)), None)
        return score.loss.sum() / jnp.maximum(score.count.sum(), 1.0)

    return loss


def draw_sample(run: Run, sizes: Sizes) -> Sample:
    """Clients, sketches and minibatches, all independent: a batch takes a client's examples without replacement."""
    config, steps, population = run.config, run.federation.feed.steps, run.federation.task.population
    everybody = len(population.ranks)
    rng = host_rng(config.seed, Purpose.THEORY)
    ids = np.sort(rng.choice(everybody, min(sizes.clients, everybody), replace=False))

    def minibatch(client: int) -> Int[np.ndarray, " E"]:
        own = population.examples[client]
        passes = [rng.permutation(own) for _ in range(math.ceil(steps.batch_size / len(own)))]
        return np.concatenate(passes)[: steps.batch_size]

    shape = len(ids), sizes.draws, sizes.batches
    chosen = np.array([minibatch(c) for c in ids.tolist() for _ in range(sizes.draws * sizes.batches)])
    chosen = chosen.reshape(*shape, steps.batch_size)
    fitting = shape_for(population.store, chosen, steps.row_length, steps.packing)
    batches = make_batch(population.store, population.labels, chosen, fitting, steps.packing)
    ranks = jnp.int32(population.ranks[ids])
    clients = Client(jnp.int32(ids), ranks, jnp.ones(len(ids)))
    keys = jax.random.split(device_key(config.seed, Purpose.THEORY), shape[:2])
    return Sample(clients, keys, jax.device_put(batches))


def measure_moments(run: Run, sample: Sample, told: Callable[[str], None]) -> dict[tuple[str, int], Estimate]:
    """``moments.moments`` at every point, client by client, with intervals that hold for all clients."""
    base, population = run.federation.task.base, len(run.federation.task.population.ranks)
    count, draws, batches = sample.batches.labels.shape[:3]

    def of_client(base: PyTree, weights: Trainable, one: Sample):
        def gradients(key: Key[Array, ""], batches: Batch):
            each = jax.value_and_grad(run.loss, argnums=1)
            return jax.vmap(each, (None, None, None, None, 0))(base, weights, key, one.clients, batches)

        def losses(batches: Batch):
            plain = one.clients._replace(k=jnp.int32(run.federation.spec.r))
            return jax.vmap(run.loss, (None, None, None, None, 0))(base, weights, one.keys[0], plain, batches)

        return client_sums(gradients, losses, one.keys, one.batches)

    program = jax.jit(of_client, compiler_options=compiler_options())
    finish = jax.jit(partial(moments, batches=batches, clients=count, population=population))
    add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)
    part, among = jax.jit(partial(own_part, batches=batches)), jax.jit(sampling_variances, static_argnums=1)
    found = {}
    for t, weights in run.points.items():
        sums, parts = None, []
        for i in range(count):
            told(f"round {t}: gradients of client {i + 1} of {count}")
            own = program(base, weights, jax.tree.map(lambda x, i=i: x[i], sample))
            parts += [part(own)] if count < population else []
            sums = jax.block_until_ready(own if sums is None else add(sums, own))
        values = finish(sums)
        if parts:
            variances = among(jax.tree.map(lambda *x: jnp.stack(x), *parts), population)
            values = for_population(values, variances, draws, count, population)
        found |= {(name, t): value for name, value in values.items()}
    return found


def measure_smoothness(
    run: Run, sample: Sample, steps: int, told: Callable[[str], None]
) -> dict[tuple[str, int], Estimate]:
    """The largest eigenvalues of the Hessians of f and f_S, between a value too small and one too large on average.

    ``eigenvalue``: of the sample's own Hessian, on one minibatch of each client (and one sketch). Largest eigenvalues
    of a sample are too large on average, so it has no interval. ``curvature``: along its vector, on other minibatches
    and sketches; unbiased for that direction, whose curvature is at most the largest. Both are of the sample's clients.
    """
    base = run.federation.task.base

    def of_replicate(base: PyTree, sample: Sample, b: Array, weights: Trainable) -> Trainable:
        def of_client(inputs: tuple[Client, Key[Array, ""], Batch]) -> Trainable:
            client, key, batch = inputs
            return jax.grad(run.loss, argnums=1)(base, weights, key, client, batch)

        batch = jax.tree.map(lambda x: x[:, b, 0], sample.batches)
        slopes = jax.lax.map(of_client, (sample.clients, sample.keys[:, b], batch))
        return jax.tree.map(lambda x: x.mean(0), slopes)

    def of_point(base: PyTree, sample: Sample, weights: Trainable):
        def product(b: Array):
            return hessian_product(partial(of_replicate, base, sample, b), weights)

        first = jnp.int32(0)
        slope = of_replicate(base, sample, first, weights)
        value, vector = largest_eigenvalue(product(first), slope, steps)
        return value, mean(jax.lax.map(lambda b: along(product(b), vector), 1 + jnp.arange(HELD_OUT)))

    program = jax.jit(of_point, compiler_options=compiler_options())
    everything = jnp.full_like(sample.clients.k, run.federation.spec.r)
    found = {}
    for t, weights in run.points.items():
        for name, k in (("f", everything), ("f_S", sample.clients.k)):
            told(f"round {t}: curvature of {name}")
            clients = sample.clients._replace(k=k)
            value, curvature = jax.block_until_ready(program(base, sample._replace(clients=clients), weights))
            found[f"eigenvalue {name}", t] = Estimate(value, *jnp.full(2, jnp.nan))
            found[f"curvature {name}", t] = curvature
    return found


def measure_growth(
    run: Run, sample: Sample, steps: int, rate: float, told: Callable[[str], None]
) -> dict[str, list[Estimate]]:
    """Variance of local updates by the sketch after 1 to ``steps`` steps from the last point; the mean of the clients.

    Descent on one minibatch of each client, so that nothing but the sketch is random.
    """
    base, weights = run.federation.task.base, run.points[max(run.points)]
    count = sample.keys.shape[0]

    def of_client(base: PyTree, weights: Trainable, one: Sample, redraw: Array) -> Float[Array, "H R R"]:
        batch = jax.tree.map(lambda x: x[0, 0], one.batches)

        def gradient(key: Key[Array, ""], weights: Trainable) -> Trainable:
            return jax.grad(run.loss, argnums=1)(base, weights, key, one.clients, batch)

        return update_spread(gradient, weights, one.keys, rate, steps, redraw=redraw)

    program = jax.jit(of_client, compiler_options=compiler_options())
    found = {}
    for name, redraw in (("fixed", False), ("redrawn", True)):
        spread: Any = 0.0
        for i in range(count):
            told(f"local updates with a {name} sketch, client {i + 1} of {count}")
            one = jax.tree.map(lambda x, i=i: x[i], sample)
            spread = spread + jax.block_until_ready(program(base, weights, one, redraw)) / count
        found[name] = [u_statistic(kernel) for kernel in spread]
    return found
