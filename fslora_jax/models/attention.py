"""Multi-head attention over packed rows."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fslora_jax.errors import UserError

LOW = -1e9
"""So low that softmax gives exactly 0, and finite: padding sees nothing, hence everything equally."""

SOFTMAX = "softmax"
"""What the gradient of attention has from the forward pass, by the name that checkpoint policies know."""

ATTENTIONS = ("auto", "xla", "cudnn")


def attention_bias(
    segments: Int[Array, "*C B L"],
    positions: Int[Array, "*C B L"] | None = None,
    window: int | None = None,
    asked: tuple[Int[Array, "*C B Q"], Int[Array, "*C B Q"]] | None = None,
    two_sided: bool = False,
) -> Float[Array, "*C B 1 Q L"]:
    """0 between tokens of one example, else ``LOW``.

    With ``positions``, a token sees only itself and earlier ones: the last ``window``, or all. ``asked`` are
    segments and positions of the tokens that look, by default all. ``two_sided`` shows later tokens as well.
    """
    by, at = (segments, positions) if asked is None else asked
    seen = (by[..., :, None] == segments[..., None, :]) & (by > 0)[..., None]
    if positions is not None and at is not None:
        distance = at[..., :, None] - positions[..., None, :]
        distance = jnp.abs(distance) if two_sided else distance
        seen &= (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    # XLA computes a logarithm once. Comparisons it would repeat in the softmax of every layer, at ten times its cost.
    return jnp.maximum(jnp.log(seen.astype(jnp.float32)), LOW)[..., None, :, :]


def attention(
    q: Float[Array, "C B Q D"],
    k: Float[Array, "C B L G"],
    v: Float[Array, "C B L G"],
    bias: Float[Array, "C B h Q L"],
    head_dim: int,
    *,
    scale: float | None = None,
    cap: float | None = None,
    implementation: str = "xla",
    places: Int[Array, "C B Q"] | None = None,
) -> Float[Array, "C B Q D"]:
    """Attention of queries on keys; where these have fewer heads, consecutive queries' heads share one.

    Args:
      q: queries, all heads side by side.
      k: keys.
      v: values.
      bias: added to the scores; one for all heads, or one for each.
      head_dim: width of a head.
      scale: of the scores, by default ``1 / sqrt(head_dim)``.
      cap: scores are squashed to ``cap * tanh(scores / cap)`` (Gemma 2).
      implementation: one of ``ATTENTIONS``.
      places: columns of the queries' tokens, where these are not all that the bias is about; -1 is as good as 0.
    """
    if places is not None:
        columns = jnp.maximum(places, 0)[:, :, None, :, None]
        bias, implementation = jnp.take_along_axis(bias, columns, axis=-2, mode="clip"), "xla"
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if _uses_cudnn(implementation, q.dtype, cap):
        return _cudnn(q, k, v, bias, head_dim, scale)
    return _xla(q, k, v, bias, head_dim, scale, cap)


def _uses_cudnn(implementation: str, dtype: jnp.dtype, cap: float | None) -> bool:
    """cuDNN's flash attention is for GPUs and halves, and has no cap."""
    backend = jax.default_backend()
    if implementation == "auto":
        return backend == "gpu" and dtype == jnp.bfloat16 and cap is None
    if implementation == "cudnn" and (dtype != jnp.bfloat16 or cap is not None):
        raise UserError(
            "model.attention is 'cudnn', which needs model.dtype: bfloat16 and a model that does not cap its "
            f"scores; found {dtype} and a cap of {cap}; set model.attention: auto"
        )
    if implementation == "cudnn" and backend != "gpu":
        raise UserError(
            f"model.attention is 'cudnn', which needs a GPU; found {backend}; set model.attention: auto"
        )
    return implementation == "cudnn"


def _cudnn(
    q: Float[Array, "C B Q D"],
    k: Float[Array, "C B L G"],
    v: Float[Array, "C B L G"],
    bias: Float[Array, "C B h Q L"],
    head_dim: int,
    scale: float,
) -> Float[Array, "C B Q D"]:
    heads = (m.reshape(-1, m.shape[-2], m.shape[-1] // head_dim, head_dim) for m in (q, k, v))
    flat = bias.astype(q.dtype).reshape(-1, *bias.shape[2:])
    mixed = jax.nn.dot_product_attention(*heads, bias=flat, scale=scale, implementation="cudnn")
    return mixed.reshape(q.shape)


def _xla(
    q: Float[Array, "C B Q D"],
    k: Float[Array, "C B L G"],
    v: Float[Array, "C B L G"],
    bias: Float[Array, "C B h Q L"],
    head_dim: int,
    scale: float,
    cap: float | None,
) -> Float[Array, "C B Q D"]:
    """Scores and softmax in float32.

    Heads go before positions first: products of contiguous matrices are twice as fast on a CPU. So are those with
    one axis of rows, for which XLA transposes no factor: queries' heads that share keys are rows of one matrix.
    """
    k, v = (jnp.swapaxes(m.reshape(*m.shape[:-1], -1, head_dim), -3, -2) for m in (k, v))
    *rows, length, _ = q.shape
    heads = k.shape[-3]
    by_head = q.reshape(*rows, length, heads, -1, head_dim)
    shared = jnp.moveaxis(by_head, 2, -2)  # (C, B, g, queries' heads, Q, d)
    if bias.shape[2] == 1:
        bias = jnp.broadcast_to(bias[:, :, None], (*rows, 1, shared.shape[3], *bias.shape[3:]))
    bias = bias.reshape(*rows, -1, shared.shape[3] * length, bias.shape[-1])
    mixed: Any = _mixed(scale, cap, shared.reshape(*rows, heads, -1, head_dim), k, v, bias)
    return jnp.moveaxis(mixed.reshape(shared.shape), -2, 2).reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed(
    scale: float,
    cap: float | None,
    q: Float[Array, "C B g n d"],
    k: Float[Array, "C B g L d"],
    v: Float[Array, "C B g L d"],
    bias: Float[Array, "C B #g n L"],
) -> Float[Array, "C B g n d"]:
    """The values that queries see. Its gradient keeps the exponentials of a softmax; the bias has none."""
    return _mixed_forward(scale, cap, q, k, v, bias)[0]


def _mixed_forward(scale: float, cap: float | None, q: Array, k: Array, v: Array, bias: Array):
    scores = scale * jnp.einsum("cbgnd,cbgkd->cbgnk", q, k, preferred_element_type=jnp.float32)
    slopes = None
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
        slopes = 1 - (scores / cap) ** 2
    scores += bias
    # As jnp.max, but four times as fast on a CPU, since it does not look for NaN; the exponentials have them anyway.
    largest = jax.lax.reduce(scores, -jnp.inf, lambda x, y: jnp.where(x > y, x, y), (scores.ndim - 1,))
    shares = jnp.exp(scores - checkpoint_name(largest, SOFTMAX)[..., None])
    factors = checkpoint_name(1 / shares.sum(-1, keepdims=True), SOFTMAX)
    # The softmax is shares * factors, and its factors wait for what is narrower than shares.
    summed = jnp.einsum("cbgnk,cbgkd->cbgnd", shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
    mixed = checkpoint_name(factors * summed, SOFTMAX)  # in float32, for its gradient's small differences
    return mixed.astype(v.dtype), (q, k, v, shares, factors, slopes, mixed)


def _mixed_backward(scale: float, _: float | None, kept: tuple[Any, ...], gradient: Array):
    q, k, v, shares, factors, slopes, mixed = kept
    # Small factors are transposed, and not the shares.
    to_v = jnp.einsum("cbgnd,cbgnk->cbgdk", (factors * gradient).astype(v.dtype), shares.astype(v.dtype))
    to_weights = jnp.einsum("cbgnd,cbgkd->cbgnk", gradient, v, preferred_element_type=jnp.float32)
    along = (gradient * mixed).sum(-1, keepdims=True)  # of the softmax with its gradient
    to_scores = shares * (scale * factors) * (to_weights - along)
    to_scores = (to_scores if slopes is None else to_scores * slopes).astype(q.dtype)
    to_q = jnp.einsum("cbgnk,cbgkd->cbgnd", to_scores, k)
    to_k = jnp.einsum("cbgnd,cbgnk->cbgdk", q, to_scores)
    return to_q, jnp.swapaxes(to_k, -1, -2), jnp.swapaxes(to_v, -1, -2), None


_mixed.defvjp(_mixed_forward, _mixed_backward)
