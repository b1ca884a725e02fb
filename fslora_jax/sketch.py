"""Random sketches of the rank axis: draw, gather what was drawn, scatter it back.

A sketch ``S = (r/k) sum_{j in I} e_j e_j^T`` keeps a uniformly random k-subset ``I`` of the r rank components
(arXiv 2501.19389, eq. 5), so ``E[S] = I``. It is diagonal: here it is a pair of vectors, never a matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fslora_jax.types import Pair


class Sketch(NamedTuple):
    """``index``: where the held components live in the global adapter, all distinct, the drawn ones first.

    ``gain``: ``r/k`` on the k drawn components, 0 on the spare ones that only fill a slot of rank ``cap``.
    """

    index: Int[Array, "*N cap"]
    gain: Float[Array, "*N cap"]


Draw = Callable[..., Sketch]
"""``(key, r, k, cap) -> Sketch``, or with a weight for each component behind."""


def draw(key: Key[Array, ""], r: int, k: Int[Array, ""] | int, cap: int) -> Sketch:
    """A uniformly random k-subset of r components, held in ``cap >= k`` places.

    ``k`` is data (one program serves every rank), ``cap`` is a shape. The subset depends on the key and on
    ``k``, not on ``cap``, so every layout of the cohort draws the same.

    >>> sketch = draw(jax.random.key(0), r=8, k=2, cap=4)
    >>> sketch.gain.tolist()
    [4.0, 4.0, 0.0, 0.0]
    """
    index = jax.random.permutation(key, r)[:cap].astype(jnp.int32)
    return Sketch(index, jnp.where(jnp.arange(cap) < k, r / k, 0.0))


def inclusion(weight: Float[Array, " r"], k: Int[Array, ""] | int) -> Float[Array, " r"]:
    """Probabilities that sum to ``k`` in proportion to ``weight``, none above 1.

    >>> inclusion(jnp.array([6.0, 1.0, 1.0]), 2).tolist()
    [1.0, 0.5, 0.5]
    """
    weight = jnp.maximum(weight / weight.max(), 1e-6)

    def spread(p: Float[Array, " r"], _: None) -> tuple[Float[Array, " r"], None]:
        full = p >= 1
        rest = jnp.where(full, 0.0, weight)
        left = jnp.maximum(k - full.sum(), 0)
        return jnp.where(full, 1.0, jnp.minimum(left * rest / jnp.maximum(rest.sum(), 1e-30), 1.0)), None

    start = jnp.minimum(k * weight / weight.sum(), 1.0)
    return jax.lax.scan(spread, start, None, length=weight.size)[0]  # each turn fills one more, or is done


def draw_by_importance(
    uniform_part: float,
    key: Key[Array, ""],
    r: int,
    k: Int[Array, ""] | int,
    cap: int,
    weight: Float[Array, " r"],
) -> Sketch:
    """A k-subset whose components are in it with probabilities by ``weight``, and have gain 1/p: ``E[S] = I``.

    Systematic sampling in random order (Madow 1949) has exactly these probabilities and exactly k components.
    ``uniform_part`` of every probability is that of a uniform draw, so no gain exceeds ``r / (k uniform_part)``.
    """
    order_key, start_key = jax.random.split(key)
    even = jnp.ones(r)
    some = weight.sum() > 0
    p = uniform_part * k / r + (1 - uniform_part) * inclusion(jnp.where(some, weight, even), k)
    order = jax.random.permutation(order_key, r)
    ends = jnp.cumsum(p[order]).at[-1].set(k)
    ticks = jnp.floor(
        ends - jax.random.uniform(start_key)
    )  # a component is drawn where a tick falls into its part
    chosen = ticks > jnp.concatenate([jnp.array([-1.0]), ticks[:-1]])
    first = jnp.argsort(~chosen, stable=True)
    index = order[first][:cap].astype(jnp.int32)
    return Sketch(index, jnp.where(jnp.arange(cap) < k, 1 / p[index], 0.0))


def gather(pair: Pair, index: Int[Array, "N k"]) -> Pair:
    """The rank components ``B[:, I]`` and ``A[I, :]`` of every layer; the same ``I`` for both factors."""
    return Pair(*(jnp.take_along_axis(x, index[:, :, None], axis=1) for x in pair))


def scatter_sum(
    parts: Float[Array, "C N k d"],
    index: Int[Array, "C N k"],
    weight: Float[Array, " C"],
    r: int,
) -> Float[Array, "N r d"]:
    """``sum_c weight_c scatter(parts_c)``: the components of every client back in their places.

    A one-hot matrix product: unlike a scatter-add it is deterministic on every device, and nobody's
    components come out as exact zeros.
    """
    place = jax.nn.one_hot(index, r, dtype=parts.dtype) * weight[:, None, None, None]
    return jnp.einsum("cnkr,cnkd->nrd", place, parts, precision=jax.lax.Precision.HIGHEST)
