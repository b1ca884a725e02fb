"""What a model's answers are worth: cross-entropy and hits, summed for each client."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from fslora_jax.types import Batch, Local, Score


def score_labels(
    apply: Callable[..., Float[Array, "C E labels"]],
    base: PyTree,
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Score:
    """The score of a classifier, from ``apply``'s logits; fillers do not count."""
    return count(apply(base, tiers, batch, dropout), batch.labels, batch.weights)


def count(
    logits: Float[Array, "C *answers V"],
    labels: Int[Array, "C *answers"],
    weights: Float[Array, "C *answers"],
) -> Score:
    """Weighted sums over each client's answers.

    >>> count(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]]), jnp.array([[1.0, 1.0, 0.0]])).count.tolist()
    [2.0]
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = (logits.argmax(-1) == labels).astype(losses.dtype)
    axes = tuple(range(1, weights.ndim))
    return Score(*((x * weights).sum(axes) for x in (losses, hits, jnp.ones_like(losses))))
