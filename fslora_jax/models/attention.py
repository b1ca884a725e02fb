"""Multi-head attention over packed rows."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOW = -1e9
"""So low that softmax gives exactly 0, and finite: padding sees nothing, hence everything equally."""


def attention_bias(
    segments: Int[Array, "*C B L"], positions: Int[Array, "*C B L"] | None = None
) -> Float[Array, "*C B 1 L L"]:
    """0 between tokens of one example, else ``LOW``; with ``positions``, only to the token itself and earlier ones."""
    same = (segments[..., :, None] == segments[..., None, :]) & (segments > 0)[..., None]
    if positions is not None:
        same &= positions[..., :, None] >= positions[..., None, :]
    return jnp.where(same, 0.0, LOW)[..., None, :, :]


def attention(
    q: Float[Array, "C B L D"],
    k: Float[Array, "C B L G"],
    v: Float[Array, "C B L G"],
    bias: Float[Array, "C B h L L"],
    head_dim: int,
) -> Float[Array, "C B L D"]:
    """Scores and softmax in float32; where keys have fewer heads than queries, consecutive queries share one.

    Heads go before positions first: products of contiguous matrices are twice as fast on a CPU.
    """
    q, k, v = (jnp.swapaxes(m.reshape(*m.shape[:-1], -1, head_dim), -3, -2) for m in (q, k, v))
    q = q.reshape(*q.shape[:-3], k.shape[-3], -1, *q.shape[-2:])
    scores = jnp.einsum("cbgsqd,cbgkd->cbgsqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores / math.sqrt(head_dim) + bias[:, :, :, None]).astype(v.dtype)
    mixed = jnp.einsum("cbgsqk,cbgkd->cbgsqd", weights, v)
    mixed = jnp.moveaxis(mixed, -2, 2)
    return mixed.reshape(*mixed.shape[:3], -1)
