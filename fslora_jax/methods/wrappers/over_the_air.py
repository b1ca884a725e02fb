"""Over-the-air aggregation: clients send at once, and the channel adds up (AirFedAvg, arXiv 2310.10089)."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from fslora_jax.errors import UserError
from fslora_jax.methods.base import Client, Combined, Method, Payload, Server
from fslora_jax.methods.spec import Spec
from fslora_jax.methods.wrappers.uploads import count_of, held_from, sent, shared
from fslora_jax.settings import NonNegative, Positive
from fslora_jax.types import Local, Rows, Trainable

NAME = "over_the_air"
PURPOSE = 1
"""Folded into the keys, which other wrappers use too."""


def over_the_air(
    method: Method,
    spec: Spec,
    *,
    noise_std: NonNegative = 0.1,
    power: Positive = 1.0,
    threshold: NonNegative = 0.0,
    csi_error: NonNegative = 0.0,
    upload: Literal["difference", "model"] = "difference",
    gain: Literal["all", "leaf"] = "all",
) -> Method:
    """The server hears ``sum_k p_k x_k`` plus noise, through a fading channel that every client inverts.

    ``y = sum_k h_k b_k x_k + z`` with ``h_k ~ CN(0, 1)`` drawn anew for each client and round, ``z ~ CN(0,
    noise_std^2)`` and ``b_k = sqrt(eta) p_k / h_k``; the server takes ``Re(y) / sqrt(eta)``. The largest gain that
    leaves everybody's ``|b_k|^2 rms(x_k)^2`` within ``power`` is ``eta = min_k power |h_k|^2 / (p_k^2 rms(x_k)^2)``, so
    each received value has the error variance ``noise_std^2 / (2 eta)``.

    ``threshold``: clients with a smaller ``|h_k|`` are silent (truncated inversion) and the weights are those among the
    others, which is biased where clients differ; in a round without any the server keeps what it has. ``csi_error``:
    standard deviation of what clients know of ``h_k``, of which ``Re(h_k / known)`` remains. ``upload``: what the
    method sends, or the factors that clients hold (``model``), whose size does not shrink with training. ``gain``: one
    eta for all values, or one for each tensor (``leaf``). Noise reaches only components that somebody sent.
    ``traffic`` goes on counting 4 bytes a value, though all clients share one use of the channel.

    Raises:
      UserError: ``upload`` is model, but the method sends its factors already.
    """
    traits = method.traits
    if upload == "model" and traits.sends_values:
        raise UserError(
            "federation.wrappers.over_the_air.upload: found model, but this method sends its factors anyway; "
            "leave it out"
        )

    def transmit(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        payload, memory = method.upload(key, server, before, after, client)
        mask, x = sent(spec, traits, payload), payload.delta
        if upload == "model":
            held = held_from(payload, server.weights)
            x = jax.tree.map(lambda d, h, m: d + m * h, x, held, mask)
        left, strength, active = fading(jax.random.fold_in(key, PURPOSE), csi_error, threshold)
        heard = jax.tree.map(lambda d, m: d * jnp.where(m > 0, left, 1.0), x, mask)
        needs = jax.tree.map(lambda square: square / strength, mean_squares(x, mask, gain))
        return payload._replace(delta=heard, extra=payload.extra | {NAME: (active, needs)}), memory

    def combine(payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]) -> Combined:
        heard = [jnp.where(p.extra[NAME][0], w, 0.0) for p, w in zip(payloads, weights, strict=True)]
        combined = method.combine(payloads, heard)
        costs = [
            jax.tree.map(lambda need, w=w: jnp.max(w**2 * need), p.extra[NAME][1])
            for p, w in zip(payloads, heard, strict=True)
        ]
        worst = jax.tree.map(lambda *xs: jnp.stack(xs).max(), *costs)
        total = sum((w.sum() for w in heard), jnp.float32(0))
        return combined._replace(extra=combined.extra | {NAME: total}, peak=combined.peak | {NAME: worst})

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        total, costs = combined.extra[NAME], combined.peak[NAME]
        share = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1.0), 0.0)
        mass = {m: Rows(*(x * share for x in rows)) for m, rows in combined.mass.items()}
        reached = shared(spec, traits, mass, combined.delta)
        stds = jax.tree.map(lambda cost: noise_std * jnp.sqrt(cost / (2 * power)) * share, costs)
        noise = gaussian(jax.random.fold_in(key, PURPOSE), combined.delta, stds)
        delta = jax.tree.map(
            lambda x, z, m: x * share + jnp.where(m > 0, z, 0.0), combined.delta, noise, reached
        )
        if upload == "model":
            delta = jax.tree.map(lambda x, m, old: x - m * old, delta, reached, server.weights)
        after = method.update(key, server, combined._replace(delta=delta, mass=mass))
        kept = jax.tree.map(lambda new, old: jnp.where(total > 0, new, old), after, server)
        return kept._replace(round=after.round)

    return method._replace(
        upload=transmit,
        combine=combine,
        update=update,
        traits=traits._replace(wrapped=(*traits.wrapped, NAME)),
    )


def fading(
    key: Key[Array, ""], csi_error: float, threshold: float
) -> tuple[Float[Array, ""], Float[Array, ""], Bool[Array, ""]]:
    """What inversion leaves of a client's Rayleigh channel, ``|h|^2`` as it knows it, and whether it sends."""
    h_key, error_key = jax.random.split(key)
    h = jax.random.normal(h_key, (), jnp.complex64)
    known = h + csi_error * jax.random.normal(error_key, (), jnp.complex64) if csi_error else h
    left = jnp.real(h / known) if csi_error else jnp.float32(1)
    return left, jnp.maximum(jnp.abs(known) ** 2, 1e-12), jnp.abs(known) >= threshold


def mean_squares(x: Trainable, mask: Trainable, gain: Literal["all", "leaf"]) -> Trainable:
    """``rms(x)^2`` over what is sent of each tensor, or the same over all for each."""
    squares = jax.tree.map(lambda v, m: (m * v**2).sum(), x, mask)
    if gain == "all":
        mean = sum(jax.tree.leaves(squares), jnp.float32(0)) / jnp.maximum(count_of(x, mask), 1)
        return jax.tree.map(lambda _: mean, squares)
    return jax.tree.map(
        lambda s, v, m: s / jnp.maximum(jnp.broadcast_to(m, v.shape).sum(), 1), squares, x, mask
    )


def gaussian(key: Key[Array, ""], like: PyTree, stds: PyTree) -> PyTree:
    """Independent noise in the shape of ``like``, each tensor with its own standard deviation."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=False)]
    return jax.tree.map(lambda z, std: z * std, jax.tree.unflatten(tree, drawn), stds)
