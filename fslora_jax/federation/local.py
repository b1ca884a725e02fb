"""Local training: H optimiser steps of every client at once."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from fslora_jax.sharding import own_like
from fslora_jax.types import Batch, Local, Pair, Rows, Score, Trainable

ScoreFn = Callable[[PyTree, Sequence[Local], Batch, Key[Array, " C"] | None], Score]
"""A model: (base, tiers, batch, dropout keys) -> the score of each client's examples."""


class Passes(NamedTuple):
    """How a minibatch goes through the model: ``rows`` packed rows of each client at a time.

    ``skip``: passes in which no client has examples are not run.
    """

    rows: int
    skip: bool = True


class Sums(NamedTuple):
    """Over the examples of each client: the loss, and how much was asked."""

    loss: Float[Array, " C"]
    count: Float[Array, " C"]


class ClientOptimizer(NamedTuple):
    """Direction and size of a local step.

    ``schedule`` gives the factor on the learning rates at a global step ``round * H + h``; clients keep no optimiser
    state between rounds, so it cannot live inside the transformation.
    """

    direction: optax.GradientTransformation
    schedule: optax.Schedule


class Rates(NamedTuple):
    """Learning rates at the schedule's peak, of the parts of `Trainable`."""

    adapter: float | Float[Array, ""] = 1.0
    head: float | Float[Array, ""] = 1.0


UNIT = Rates()
"""Where the schedule has the rates themselves."""


def masked(updates: Trainable, trains: dict[str, Rows]) -> Trainable:
    """Gradients or updates of the rows that may move, exact zeros elsewhere.

    Of gradients, since what is frozen shall not count in their norm; of updates, since decay moves whatever is there.
    """
    adapter = {
        m: Pair(*(jnp.where(rows[..., None] > 0, u, 0.0) for u, rows in zip(pair, trains[m], strict=True)))
        for m, pair in updates.adapter.items()
    }
    return Trainable(adapter, updates.head)


def at_rates(rates: Rates, direction: Trainable) -> Trainable:
    """A step against a direction, adapter and head each at their rate."""
    adapter, head = (
        jax.tree.map(lambda x, rate=rate: -rate * x, part)
        for rate, part in zip(rates, direction, strict=True)
    )
    return Trainable(adapter, head)


def train(
    score: ScoreFn,
    optimizer: ClientOptimizer,
    base: PyTree,
    tiers: Sequence[Local],
    batches: Batch,
    first_step: Int[Array, ""],
    dropout_keys: Key[Array, " C"] | None,
    *,
    rates: Rates = UNIT,
    penalty: Callable[[Local], Float[Array, ""]] | None = None,
    at_step: Callable[[Int[Array, ""]], list[Local]] | None = None,
    passes: Passes | None = None,
) -> tuple[list[Local], Float[Array, "C H"]]:
    """H steps of every client on its own batches; returns what each holds after, and the losses before each step.

    ``batches`` leaves are ``(C, H, ...)``, clients in the order of ``tiers``. The gradient of the summed loss is
    every client's own gradient, since no trained value is shared; whatever is a client's own runs under ``vmap``.
    A step without examples is no step: it moves nothing, not even the optimiser's state. ``penalty`` of what a
    client holds is minimised with its loss, and not reported; ``at_step`` gives scales and moving rows for a step.
    With ``passes`` the gradients of a minibatch are added up over parts of its rows.
    """

    def total(weights: list[Trainable], tiers: list[Local], batch: Batch, keys: Key[Array, " C"] | None):
        held = [tier._replace(weights=w) for tier, w in zip(tiers, weights, strict=True)]
        scores = score(base, held, batch, keys)
        sums = Sums(scores.loss.sum(-1), scores.count.sum(-1))
        return sums.loss.sum(), sums

    gradients = jax.grad(total, has_aux=True) if passes is None else adding_up(passes, total)

    def one_client(
        rates: Rates, weights: Trainable, state: PyTree, summed: Trainable, local: Local, count: Array
    ):
        active, grads = count > 0, jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), summed)
        if penalty is not None:
            pull = jax.grad(lambda w, of=penalty: of(local._replace(weights=w)))(weights)
            grads = jax.tree.map(jnp.add, grads, pull)
        found, moved = optimizer.direction.update(masked(grads, local.trains), state, weights)
        updates = masked(at_rates(rates, cast(Trainable, found)), local.trains)
        new = jax.tree.map(jnp.add, weights, updates), moved
        return jax.tree.map(partial(jnp.where, active), new, (weights, state))

    def step(carry, inputs):
        weights, states = carry
        batch, h = inputs
        keys = (
            None if dropout_keys is None else jax.vmap(lambda key: jax.random.fold_in(key, h))(dropout_keys)
        )
        now = list(tiers) if at_step is None else at_step(h)
        grads, sums = gradients(weights, now, batch, keys)
        factor = jnp.asarray(optimizer.schedule(first_step + h))
        of_step = Rates(*(factor * rate for rate in rates))
        by_tier = jnp.split(sums.count, ends[:-1])
        moved = [
            jax.vmap(partial(one_client, of_step))(*parts)
            for parts in zip(weights, states, grads, now, by_tier, strict=True)
        ]
        return ([w for w, _ in moved], [s for _, s in moved]), sums.loss / jnp.maximum(sums.count, 1.0)

    weights = [tier.weights for tier in tiers]
    ends = list(accumulate(jax.tree.leaves(tier)[0].shape[0] for tier in tiers))
    states = [own_like(jax.vmap(optimizer.direction.init)(w), jax.tree.leaves(w)[0]) for w in weights]
    by_step = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)
    num_steps = batches.labels.shape[1]
    (weights, _), losses = jax.lax.scan(step, (weights, states), (by_step, jnp.arange(num_steps)))
    return [tier._replace(weights=w) for tier, w in zip(tiers, weights, strict=True)], losses.T


def adding_up(passes: Passes, total: Callable[..., tuple[Array, Sums]]) -> Callable[..., tuple[PyTree, Sums]]:
    """``jax.grad`` of a sum over a batch's examples, a few of its rows at a time."""

    def gradients(weights: PyTree, tiers: list[Local], batch: Batch, keys: Key[Array, " C"] | None):
        def one_pass(i: Array, so_far: tuple[PyTree, Sums]) -> tuple[PyTree, Sums]:
            own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            part = rows_of(batch, i * passes.rows, passes.rows)
            return jax.tree.map(jnp.add, so_far, jax.grad(total, has_aux=True)(weights, tiers, part, own))

        count = batch.tokens.shape[1] // passes.rows
        if passes.skip:
            count = -(-rows_taken(batch) // passes.rows)
        zeros = jnp.zeros(len(batch.weights))
        nothing = own_like((jax.tree.map(jnp.zeros_like, weights), Sums(zeros, zeros)), batch.weights)
        return jax.lax.fori_loop(0, count, one_pass, nothing)

    return gradients


def rows_of(batch: Batch, first: Int[Array, ""], rows: int) -> Batch:
    """Some rows of every client's batch; examples in other rows have no weight."""

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, rows, axis=1)

    segments = cut(batch.segments)
    examples = jnp.arange(1, batch.weights.shape[1] + 1)
    there = (segments[..., None] == examples).any((1, 2))
    return Batch(
        tokens=cut(batch.tokens),
        segments=segments,
        positions=cut(batch.positions),
        types=cut(batch.types),
        labels=batch.labels,
        weights=jnp.where(there, batch.weights, 0.0),
        places=cut(batch.places),
    )


def rows_taken(batch: Batch) -> Int[Array, ""]:
    """The rows, from the first one on, in which any client has a token."""
    rows = jnp.arange(1, batch.segments.shape[1] + 1)
    return jnp.where((batch.segments > 0).any(-1), rows, 0).max()
