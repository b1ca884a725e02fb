"""What a model's answers are worth: loss and hits of each example."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Real, Shaped

from fslora_jax.types import Batch, Local, Score


def score_labels(
    apply: Callable[..., Float[Array, "C E labels"]],
    base: PyTree,
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Score:
    """The score of a model with ``apply``'s logits: a classifier, or a regression where there is one label."""
    logits = apply(base, tiers, batch, dropout)
    return of_numbers(logits, batch) if logits.shape[-1] == 1 else of_labels(logits, batch)


def of_labels(logits: Float[Array, "C E labels"], batch: Batch) -> Score:
    """Cross-entropy of each example's label, and the most likely one.

    >>> none = jnp.zeros((1, 0, 0), int)
    >>> batch = Batch(none, none, none, none, jnp.array([[0, 1]]), jnp.ones((1, 2)), none)
    >>> of_labels(jnp.array([[[9.0, 0.0], [9.0, 0.0]]]), batch).correct.tolist()
    [[1.0, 0.0]]
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    predicted = logits.argmax(-1)
    return _weighted(batch, losses, predicted == batch.labels, predicted)


def of_numbers(logits: Float[Array, "C E 1"], batch: Batch) -> Score:
    """Squared error of each example's number, as in Hugging Face; no number counts as correct."""
    predicted = logits[..., 0]
    return _weighted(batch, jnp.square(predicted - batch.labels), jnp.zeros_like(predicted), predicted)


def of_tokens(logits: Float[Array, "C B T V"], batch: Batch) -> Score:
    """Cross-entropy of the tokens that follow ``batch.places``, summed over each example's."""
    asked = batch.places >= 0
    places = jnp.maximum(batch.places, 0)
    targets = jnp.take_along_axis(batch.tokens, places + 1, axis=-1, mode="clip")
    segments = jnp.where(asked, jnp.take_along_axis(batch.segments, places, axis=-1), 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    # A place that is not asked is nobody's: its row is all zeros.
    mine = jax.nn.one_hot(segments - 1, batch.labels.shape[-1], dtype=losses.dtype)

    def by_example(values: Real[Array, "C B T"]) -> Float[Array, "C E"]:
        return jnp.einsum("cbt,cbte->ce", values.astype(losses.dtype), mine)

    count = by_example(asked)
    return Score(by_example(losses), by_example(logits.argmax(-1) == targets), count, jnp.zeros_like(count))


PIECE_BYTES = 2**28
"""Next-token logits that exist at a time, roughly, of all clients together."""


def score_next(
    hidden: Callable[..., Float[Array, "C B T D"]],
    logits: Callable[..., Float[Array, "C B t V"]],
    base: PyTree,
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Score:
    """The score of a language model on the tokens after ``batch.places``, piece by piece.

    ``hidden(base, tiers, batch, dropout, places)`` gives the states of tokens, ``logits(base, states)`` what they
    predict. The logits of a whole cohort would be far larger than all else, so they are made for some places at
    a time, and anew in the backward pass.
    """
    x = hidden(base, tiers, batch, dropout, batch.places)

    def piece(part: tuple[Int[Array, "C B t"], Float[Array, "C B t D"]]) -> Score:
        places, states = part
        return of_tokens(logits(base, states), batch._replace(places=places))

    vocab = jax.eval_shape(logits, base, x).shape[-1]
    size = max(1, PIECE_BYTES // (4 * vocab * x[:, :, 0, 0].size))
    pieces = in_pieces(batch.places, size, -1), in_pieces(x, size)
    if len(pieces[0]) == 1:
        return piece((batch.places, x))
    return jax.tree.map(
        lambda sums: sums.sum(0), jax.lax.map(jax.checkpoint(piece, prevent_cse=False), pieces)
    )


def in_pieces(x: Shaped[Array, "C B T *rest"], size: int, fill: int = 0) -> Shaped[Array, "P C B t *rest"]:
    """``x`` cut along T into the fewest equal pieces of at most ``size``, filled up.

    >>> in_pieces(jnp.array([[[4, 5, 6]]]), 2, -1).tolist()
    [[[[4, 5]]], [[[6, -1]]]]
    """
    count = x.shape[2]
    number = max(1, math.ceil(count / size))
    width = math.ceil(count / number)
    around = [(0, 0), (0, 0), (0, number * width - count)] + [(0, 0)] * (x.ndim - 3)
    filled = jnp.pad(x, around, constant_values=fill)
    return jnp.moveaxis(filled.reshape(*x.shape[:2], number, width, *x.shape[3:]), 2, 0)


def _weighted(batch: Batch, *sums: Array) -> Score:
    losses, hits, predicted = (x.astype(jnp.float32) * batch.weights for x in sums)
    return Score(losses, hits, batch.weights, predicted)
