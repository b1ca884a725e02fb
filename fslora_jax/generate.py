"""Generation for any number of prompts: batches of similar lengths, few programs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.errors import UserError
from fslora_jax.models import NOTHING, Model
from fslora_jax.types import Local

ROWS = 16
"""Prompts that are continued at a time."""

STEP = 64
"""Widths of batches are multiples of it, so that few programs serve all lengths."""


def write_on(
    model: Model,
    base: PyTree,
    held: Local,
    prompts: Sequence[Int32[np.ndarray, " n"]],
    ends: Sequence[int],
    count: int,
) -> list[Int32[np.ndarray, " new"]]:
    """What the model writes greedily after each prompt: at most ``count`` tokens, without the end's.

    Args:
      model: a language model.
      base: its weights.
      held: the adapter, of one client (without a client axis).
      prompts: tokens.
      ends: tokens that end a text.
      count: the most tokens to write.

    Raises:
      UserError: the model is a classifier, or a prompt leaves no room for ``count`` tokens.
    """
    if model.generate is None:
        raise UserError(
            f"generation: found a {model.naming.architecture}; expected a language model among the decoders"
        )
    longest = max(map(len, prompts), default=0)
    if longest + count > model.max_length:
        raise UserError(
            f"generation: a prompt of {longest} tokens and {count} new ones are more than the model's "
            f"{model.max_length}; lower data.max_length or the new tokens"
        )
    run = jax.jit(model.generate, static_argnums=5, compiler_options=compiler_options())
    tier = [jax.tree.map(lambda x: x[None], held)]
    written: list[Int32[np.ndarray, " new"]] = [np.zeros(0, np.int32)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), ROWS):
        mine = order[start : start + ROWS]
        width = -(-max(len(prompts[mine[0]]), 1) // STEP) * STEP
        tokens = np.zeros((1, ROWS, width), np.int32)
        lengths = np.zeros((1, ROWS), np.int32)
        for row, i in enumerate(mine):
            lengths[0, row] = len(prompts[i])
            tokens[0, row, width - len(prompts[i]) :] = prompts[i]
        found = np.asarray(run(base, tier, tokens, lengths, jnp.asarray(ends, jnp.int32), count))
        for row, i in enumerate(mine):
            written[i] = found[0, row][~np.isin(found[0, row], [NOTHING, *ends])]
    return written
