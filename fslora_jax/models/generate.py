"""Greedy generation: what a language model with adapters writes after prompts of any lengths."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fslora_jax.types import Local

NOTHING = -1
"""What stands in a row after its end."""


class Span(NamedTuple):
    """Some columns of a batch's rows, as ``types.Batch`` has them."""

    tokens: Int[Array, "C B L"]
    segments: Int[Array, "C B L"]
    positions: Int[Array, "C B L"]


def generate(
    recall: Callable[..., tuple[Float[Array, "C B Q D"], PyTree]],
    logits: Callable[..., Float[Array, "C B Q V"]],
    no_memory: Callable[[int, int, int], PyTree],
    base: PyTree,
    tiers: Sequence[Local],
    tokens: Int[Array, "C B P"],
    lengths: Int[Array, "C B"],
    ends: Int[Array, " ends"],
    count: int,
) -> Int[Array, "C B count"]:
    """The most likely next token, again and again, at most ``count`` times or until all rows have ended.

    Keys and values of earlier tokens are kept, so a step computes one token of each row.

    Args:
      recall: ``(base, tiers, text, new, memory, at) -> (states, memory)``, as ``decoder.recall``.
      logits: ``(base, states)``, what the model expects next.
      no_memory: room for the memory of ``(clients, rows, tokens)``.
      base: the frozen model.
      tiers: what clients hold; each client has rows of its own.
      tokens: prompts, filled up on the left.
      lengths: tokens of each prompt.
      ends: tokens that end a row; they are part of what is written.
      count: the most tokens to write.

    Returns:
      What is new; ``NOTHING`` behind the end.
    """
    clients, rows, width = tokens.shape
    text = _text(lengths, width, width + count)

    def step(new: Span, memory: PyTree, at: Any) -> tuple[Int[Array, "C B"], PyTree]:
        states, memory = recall(base, tiers, text, new, memory, at)
        return logits(base, states[..., -1:, :]).argmax(-1)[..., 0].astype(jnp.int32), memory

    def write(carry: Any) -> Any:
        written, ended, memory, n = carry
        at = width + n - 1
        last = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, 1, axis=-1), text)
        before = jnp.maximum(jax.lax.dynamic_slice_in_dim(written, n - 1, 1, axis=-1), 0)
        token, memory = step(last._replace(tokens=before), memory, at)
        return *_put(written, token, ended, ends, n), memory, n + 1

    prompt = jax.tree.map(lambda x: x[..., :width], text)._replace(tokens=tokens)
    token, memory = step(prompt, no_memory(clients, rows, width + count), 0)
    nothing = jnp.full((clients, rows, count), NOTHING, jnp.int32)
    written, ended = _put(nothing, token, lengths == 0, ends, 0)
    carry = written, ended, memory, 1
    return jax.lax.while_loop(lambda carry: (carry[-1] < count) & ~carry[1].all(), write, carry)[0]


def _put(
    written: Int[Array, "C B count"],
    token: Int[Array, "C B"],
    ended: Bool[Array, "C B"],
    ends: Int[Array, " ends"],
    n: Any,
) -> tuple[Int[Array, "C B count"], Bool[Array, "C B"]]:
    """What is written, and which rows have ended, with the n-th token."""
    written = written.at[..., n].set(jnp.where(ended, NOTHING, token))
    return written, ended | (token[..., None] == ends).any(-1)


def _text(lengths: Int[Array, "C B"], width: int, whole: int) -> Span:
    """Rows of one example each, which begins so that its prompt ends before column ``width``."""
    positions = jnp.arange(whole) - (width - lengths)[..., None]
    real = (positions >= 0).astype(jnp.int32)
    return Span(jnp.zeros_like(real), real, jnp.maximum(positions, 0))
