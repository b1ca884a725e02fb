"""Differential privacy of clients: clipped uploads and noise on their sum (DP-FedAvg, arXiv 1710.06963)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.methods.base import Client, Combined, Method, Payload, Server
from fslora_jax.methods.spec import Spec
from fslora_jax.methods.wrappers.over_the_air import gaussian
from fslora_jax.settings import Fraction, NonNegative, Positive
from fslora_jax.types import Local, Pair, Trainable

NAME = "clip_and_noise"
PURPOSE = 3


def clip_and_noise(
    method: Method,
    spec: Spec,
    *,
    clip: Positive = 1.0,
    noise_multiplier: NonNegative = 1.0,
    delta: Fraction = 1e-5,
    epsilon: Positive | None = None,
) -> Method:
    """Each upload is scaled down to L2 norm ``clip``, and the sum gets noise of ``noise_multiplier clip`` per client.

    The norm is over adapter and head together, the noise ``N(0, (noise_multiplier clip w)^2)`` for the common weight w
    of the average. With these, what a run publishes of its rounds is (epsilon, ``delta``)-private for the replacement
    of one client by another (`fslora_jax.federation.privacy`); a run whose planned rounds exceed ``epsilon`` is
    refused. ``noise_multiplier: 0`` clips alone and promises nothing.

    Noise goes to all components that the cohort drew, never to others. That is enough since the draw does not look at
    data: which components have noise tells nothing. Where it goes by the server's weights (importance), these are
    private already. The averages of personal parts count as sent. Clients' losses (``train/loss``), their number in a
    round and the server's evaluation are not covered.
    """
    del spec, delta, epsilon  # accounting, on the host

    def upload(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        payload, memory = method.upload(key, server, before, after, client)
        return payload._replace(delta=clipped(payload.delta, clip)), memory

    def combine(payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]) -> Combined:
        combined = method.combine(payloads, weights)
        heaviest = jnp.concatenate(list(weights)).max()
        return combined._replace(peak=combined.peak | {NAME: heaviest})

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        std = noise_multiplier * clip * combined.peak[NAME]
        stds = jax.tree.map(lambda _: std, combined.delta)
        noise = gaussian(jax.random.fold_in(key, PURPOSE), combined.delta, stds)
        adapter = {
            m: Pair(
                *(
                    x + jnp.where(rows[..., None] > 0, z, 0.0)
                    for x, z, rows in zip(pair, noise.adapter[m], combined.mass[m], strict=True)
                )
            )
            for m, pair in combined.delta.adapter.items()
        }
        head = jax.tree.map(jnp.add, combined.delta.head, noise.head)
        return method.update(key, server, combined._replace(delta=Trainable(adapter, head)))

    return method._replace(
        upload=upload,
        combine=combine,
        update=update,
        traits=method.traits._replace(wrapped=(*method.traits.wrapped, NAME)),
    )


def clipped(x: Trainable, clip: float) -> Trainable:
    """The same direction, with an L2 norm of at most ``clip`` over everything."""
    norm = jnp.sqrt(sum(((v**2).sum() for v in jax.tree.leaves(x)), jnp.float32(0)))
    factor = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda v: v * factor, x)
