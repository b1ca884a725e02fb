"""Classification heads: one vector for each example, and each client's own dense layers on it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fslora_jax.types import Batch, Head


def init_head(
    names: Sequence[str], width: int, num_labels: int, std: float, key: Key[Array, ""], bias: bool = True
) -> Head:
    """Linear modules in order, all but the last of ``width`` outputs; normal weights, zero biases."""
    sizes = [width] * len(names) + [num_labels]
    keys = jax.random.split(key, len(names))
    return {
        name: {"kernel": std * jax.random.normal(k, (i, o))} | ({"bias": jnp.zeros(o)} if bias else {})
        for name, k, i, o in zip(names, keys, sizes[:-1], sizes[1:], strict=True)
    }


def places_of(batch: Batch, pooling: str) -> Int[Array, "C B E"] | None:
    """Where in each row each example has its "first" or "last" token, -1 where it has none; None for the "mean".

    >>> segments = jnp.array([[[1, 1, 2], [3, 3, 0]]])
    >>> batch = Batch(segments, segments, segments, segments, jnp.zeros((1, 3)), jnp.ones((1, 3)), segments)
    >>> places_of(batch, "last").tolist()
    [[[1, 2, -1], [-1, -1, 1]]]
    """
    if pooling == "mean":
        return None
    mine = batch.segments[..., None, :] == jnp.arange(1, batch.labels.shape[-1] + 1)[:, None]  # (C, B, E, L)
    length = mine.shape[-1]
    place = mine.argmax(-1) if pooling == "first" else length - 1 - mine[..., ::-1].argmax(-1)
    return jnp.where(mine.any(-1), place, -1)


def pool(
    x: Float[Array, "C B T D"], batch: Batch, places: Int[Array, "C B E"] | None = None
) -> Float[Array, "C E D"]:
    """One float32 vector per example, 0 for an empty filler: the mean over its tokens' states.

    With ``places`` (`places_of`) it is that of the one token of each example that ``x`` has.
    """
    if places is not None:
        return jnp.where((places >= 0)[..., None], x, 0).sum(1, dtype=jnp.float32)
    mine = batch.segments[..., None] == jnp.arange(1, batch.labels.shape[-1] + 1)
    total = jnp.einsum("cble,cbld->ced", mine.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return total / jnp.maximum(mine.sum((1, 2)), 1)[..., None]


def classify(
    names: Sequence[str], head: Head, x: Float[Array, "E D"], between: Callable[[Array], Array] = jnp.tanh
) -> Float[Array, "E labels"]:
    """One client's head: linear modules in order, with ``between`` applied in between."""
    for n, name in enumerate(names):
        x = (between(x) if n else x) @ head[name]["kernel"] + head[name].get("bias", 0.0)
    return x
