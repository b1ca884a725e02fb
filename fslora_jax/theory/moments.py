"""The moments of sketched gradients in the theorem, from replicates: pure functions of a gradient function and keys.

One replicate ``b`` is a sketch for every client, drawn independently, with Q minibatches each; ``g_ib`` is the mean
gradient of client i over them. All quantities are means over pairs of replicates, so they are U-statistics.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from scipy import stats

from fslora_jax.theory.estimate import LEVEL, Estimate, mean, u_statistic

Gradients = Callable[[Key[Array, ""], PyTree], tuple[Float[Array, " Q"], PyTree]]
"""``(key of a sketch, Q minibatches) -> `` their losses and gradients under this sketch, leaves ``(Q, ...)``."""

Losses = Callable[[PyTree], Float[Array, " Q"]]
"""The losses of Q minibatches with ``S = I``."""


EXACT = jax.lax.Precision.HIGHEST

FEWEST_CLIENTS = 3
"""Of a larger population: with fewer, the variance of a variance between clients is not known."""


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
    return jax.tree.reduce(jnp.add, [jnp.einsum("ax,bx->ab", f, f, precision=EXACT) for f in flat])


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

    Estimates are unbiased for the population; the intervals are those of draws and minibatches for these clients alone,
    see `for_population`.
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


class Own(NamedTuple):
    """One client alone, or several on a leading axis C: means over replicates of gradient and losses.

    ``square`` of the gradient's expectation and the variances ``sketch`` and ``within`` are without bias.
    """

    slope: PyTree
    square: Float[Array, "*C"]
    sketch: Float[Array, "*C"]
    within: Float[Array, "*C"]
    sketched: Float[Array, "*C"]
    plain: Float[Array, "*C"]


def own_part(sums: Sums, batches: int) -> Own:
    """One client's part, from its sums alone."""
    R = sums.within.shape[0]
    size, within = jnp.trace(sums.gram) / R, sums.within.mean()
    square = (sums.gram.sum() - R * size) / (R * (R - 1))
    slope = jax.tree.map(lambda x: x.mean(0), sums.total)
    return Own(
        slope, square, size - square - within / batches, within, sums.sketched.mean(), sums.plain.mean()
    )


def sampling_variances(each: Own, population: int) -> dict[str, Float[Array, ""]]:
    """The variance of every estimate of `moments` over samples of C >= 3 clients with replacement, and over draws.

    By the jackknife (Efron & Stein 1981): from the estimates with one client left out. Gradients of different clients
    are independent, so that all their replicates may be multiplied.
    """
    clients = each.square.shape[0]
    count = clients - 1
    gram = jnp.fill_diagonal(products(each.slope), each.square, inplace=False)

    def without(weight: Float[Array, " C"]) -> dict[str, Float[Array, ""]]:
        def mean_of(x: Float[Array, " C"]) -> Float[Array, ""]:
            return (weight * x).sum() / count

        average = jnp.einsum("i,ij,j->", weight, gram, weight, precision=EXACT) / count**2
        spread = (mean_of(each.square) - average) * count / (count - 1)
        return {
            "f": mean_of(each.plain),
            "f_S": mean_of(each.sketched),
            "f_S - f": mean_of(each.sketched - each.plain),
            "grad_f_S^2": average - (1 / count - 1 / population) * spread,
            "sigma_s^2": mean_of(each.sketch),
            "sigma_g^2": mean_of(each.within),
            "sigma_h^2": (1 - 1 / population) * spread,
        }

    found = jax.vmap(without)(1 - jnp.eye(clients))
    return {name: (clients - 1) * jnp.var(x) for name, x in found.items()}


def for_population(
    found: Mapping[str, Estimate],
    variances: Mapping[str, Any],
    replicates: int,
    clients: int,
    population: int,
) -> dict[str, Estimate]:
    """The estimates with intervals for a population of clients, of which some were drawn without replacement.

    With the part ``p`` of them drawn, a variance is ``(1 - p)`` that of `sampling_variances` and ``p`` that of the
    draws (two-stage sampling; Cochran 1977, chapter 11); Satterthwaite's degrees of freedom.
    """
    part, inside = clients / population, stats.t.ppf(0.5 + LEVEL / 2, replicates - 1)
    wide = {}
    for name, (value, _, high) in found.items():
        within = part * np.square(np.subtract(high, value, dtype=float) / inside)
        among = (1 - part) * np.asarray(variances[name], float)
        share = among / np.maximum(among + within, np.finfo(float).tiny)
        freedom = 1 / (share**2 / (clients - 1) + (1 - share) ** 2 / (replicates - 1))
        half = stats.t.ppf(0.5 + LEVEL / 2, freedom) * np.sqrt(among + within)
        wide[name] = Estimate(value, value - half, value + half)
    return wide
