"""The moments of sketched gradients in the theorem, from replicates: pure functions of a gradient function and keys.

One replicate ``b`` is a sketch for every client, drawn independently, with Q minibatches each; ``g_ib`` is the mean
gradient of client i over them. All quantities are means over pairs of replicates, so they are U-statistics.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.theory.estimate import Estimate, mean, u_statistic

Gradients = Callable[[Key[Array, ""], PyTree], tuple[Float[Array, " Q"], PyTree]]
"""``(key of a sketch, Q minibatches) -> `` their losses and gradients under this sketch, leaves ``(Q, ...)``."""

Losses = Callable[[PyTree], Float[Array, " Q"]]
"""The losses of Q minibatches with ``S = I``."""


class Sums(NamedTuple):
    """Sums over clients, for each replicate: mean gradients, their inner products, variances and losses.

    ``within`` is the sample variance of a gradient over minibatches, ``gram`` sums ``<g_ib, g_ib'>`` over i.
    """

    total: PyTree
    gram: Float[Array, "R R"]
    within: Float[Array, " R"]
    sketched: Float[Array, " R"]
    plain: Float[Array, " R"]


def products(x: PyTree) -> Float[Array, "R R"]:
    """Inner products of the replicates of a gradient, leaves ``(R, ...)``."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(x)]
    exact = jax.lax.Precision.HIGHEST
    return jax.tree.reduce(jnp.add, [jnp.einsum("ax,bx->ab", f, f, precision=exact) for f in flat])


def client_sums(gradients: Gradients, losses: Losses, keys: Key[Array, " R"], batches: PyTree) -> Sums:
    """One client's part of the sums; ``batches`` are ``(R, Q, ...)`` with Q >= 2."""

    def replicate(inputs: tuple[Key[Array, ""], PyTree]) -> tuple[PyTree, Array, Array, Array]:
        found, each = gradients(*inputs)
        centre = jax.tree.map(lambda g: g.mean(0), each)
        apart = jax.tree.map(lambda g, c: jnp.square(g - c).sum() / (g.shape[0] - 1), each, centre)
        within = jax.tree.reduce(jnp.add, apart)
        return centre, within, found.mean(), losses(inputs[1]).mean()

    centre, *rest = jax.lax.map(replicate, (keys, batches))
    return Sums(centre, products(centre), *rest)


def moments(sums: Sums, batches: int, clients: int, population: int) -> dict[str, Estimate]:
    """What the theorem speaks of, from the sums over ``clients`` of a ``population``, of which they are a sample.

    - ``f_S``, ``f``, ``f_S - f``: losses with sketches and with ``S = I``, on the same minibatches;
    - ``grad_f_S^2``: ``|grad f_S|^2``;
    - ``sigma_s^2``, ``sigma_g^2``: variance of a client's gradient by the sketch and by the minibatch, mean of the
      clients; ``sigma_h^2``: mean of ``|grad f_S,i - grad f_S|^2``.

    Estimates are unbiased for the population; the intervals are those of draws and minibatches, not of clients.
    """
    own = sums.gram / clients
    average = products(jax.tree.map(lambda x: x / clients, sums.total))
    spread = jnp.zeros_like(own) if clients == 1 else (own - average) * clients / (clients - 1)
    size, within = jnp.diagonal(own), sums.within / clients
    sketched, plain = sums.sketched / clients, sums.plain / clients
    noise = (within[:, None] + within) / 2
    return {
        "f": mean(plain),
        "f_S": mean(sketched),
        "f_S - f": mean(sketched - plain),
        "grad_f_S^2": u_statistic(average - (1 / clients - 1 / population) * spread),
        "sigma_s^2": u_statistic((size[:, None] + size) / 2 - own - noise / batches),
        "sigma_g^2": mean(within),
        "sigma_h^2": u_statistic((1 - 1 / population) * spread),
    }
