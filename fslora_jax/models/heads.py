"""Classification heads: one vector for each example, and each client's own dense layers on it."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

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


def pool(x: Float[Array, "C B L D"], batch: Batch, pooling: str) -> Float[Array, "C E D"]:
    """One float32 vector per example, 0 for an empty filler.

    It is the "mean" over the example's tokens, or its "first" or "last" token.
    """
    examples = jnp.arange(1, batch.labels.shape[-1] + 1)
    mine = batch.segments[..., None] == examples
    if pooling == "first":
        mine &= (batch.positions == 0)[..., None]
    elif pooling == "last":
        longest = jnp.where(mine, batch.positions[..., None], -1).max((1, 2), keepdims=True)
        mine &= batch.positions[..., None] == longest
    total = jnp.einsum("cble,cbld->ced", mine.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return total / jnp.maximum(mine.sum((1, 2)), 1)[..., None]


def classify(
    names: Sequence[str], head: Head, x: Float[Array, "E D"], between: Callable[[Array], Array] = jnp.tanh
) -> Float[Array, "E labels"]:
    """One client's head: linear modules in order, with ``between`` applied in between."""
    for n, name in enumerate(names):
        x = (between(x) if n else x) @ head[name]["kernel"] + head[name].get("bias", 0.0)
    return x
