"""Unbiased estimates with 95 % intervals from independent replicates."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from scipy import stats

LEVEL = 0.95
FEWEST = 4
"""Replicates: with fewer, the variance of an estimate cannot be estimated without bias."""


class Estimate(NamedTuple):
    """An unbiased value and the ends of its 95 % interval."""

    value: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]


def u_statistic(kernel: Float[Array, "R R"]) -> Estimate:
    """The mean of a symmetric ``kernel(b, b')`` over pairs of different replicates (Hoeffding 1948), R >= 4.

    The variance of a U-statistic is ``4 (R-2) z1 + 2 z2`` over ``R (R-1)``, with ``z1`` the covariance of pairs that
    share one replicate and ``z2`` the variance of a pair. Both are estimated without bias over triples and quadruples
    of different replicates; ``z1``, which is 0 for the square of a mean that is 0, is cut off there. The interval is
    Student's with R - 1 degrees of freedom. The diagonal of the kernel is not looked at.

    >>> x = jnp.array([1.0, 2.0, 3.0, 6.0])
    >>> round(float(u_statistic((x[:, None] - x) ** 2 / 2).value), 3)  # the sample variance
    4.667
    """
    R = kernel.shape[0]
    pairs, triples, quadruples = R * (R - 1), R * (R - 1) * (R - 2), R * (R - 1) * (R - 2) * (R - 3)
    apart = 1 - jnp.eye(R, dtype=kernel.dtype)
    value = (kernel * apart).sum() / pairs
    centred = (kernel - value) * apart
    square, by_row = jnp.square(centred).sum(), jnp.square(centred.sum(1)).sum()
    # Of centred pairs (a, b) and (c, d): all four different, and sharing one; their sum over all is 0.
    different = (2 * square - 4 * by_row) / quadruples
    z1 = jnp.maximum((by_row - square) / triples - different, 0.0)
    z2 = jnp.maximum(square / pairs - different, 0.0)
    half = stats.t.ppf(0.5 + LEVEL / 2, R - 1) * jnp.sqrt((4 * (R - 2) * z1 + 2 * z2) / pairs)
    return Estimate(value, value - half, value + half)


def mean(x: Float[Array, " R"]) -> Estimate:
    """The mean of independent values, with Student's interval.

    >>> [round(float(v), 3) for v in mean(jnp.array([1.0, 2.0, 3.0, 4.0]))]
    [2.5, 0.446, 4.554]
    """
    return u_statistic((x[:, None] + x) / 2)
