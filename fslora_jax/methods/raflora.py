"""raFLoRA: each rank component is averaged over those that trained it (arXiv 2602.13486)."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.methods.base import Client, Combined, Method, Payload, Server, Traits
from fslora_jax.methods.parts import (
    PRODUCTS,
    change,
    factorised,
    fedavg_lora,
    kernel_of,
    per_contributor,
    prefix,
    prefix_traffic,
    sends,
    settle,
    take_step,
    value,
    with_products,
)
from fslora_jax.methods.spec import Spec
from fslora_jax.types import Local, Pair


def raflora(spec: Spec, server_optimizer: optax.GradientTransformation, *, factors: bool = False) -> Method:
    """FlexLoRA with weights ``p_i / sum of the p_j that trained the component``, against the collapse of high ranks.

    A component that nobody trained keeps its old product. ``factors`` (ours): the same weights on the factors
    themselves, without an SVD; linear in the uploads, with FedIT's bias.
    """
    plain = fedavg_lora(spec, server_optimizer)._replace(download=prefix(spec), traffic=prefix_traffic(spec))
    if factors:

        def average(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
            del key
            return take_step(server_optimizer, server, per_contributor(combined), combined.mass)

        return plain._replace(upload=sends(change), update=average, traits=Traits())

    def announce(client: Client) -> dict[str, Float[Array, " r"]]:
        ks = spec.ranks(client.k)
        return {m: (jnp.arange(r) < ks[m]).astype(jnp.float32) for m, r in spec.ranks().items()}

    def upload(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        del key
        payload = value(before, after)
        adapter = {}
        for m, pair in payload.delta.adapter.items():
            contributors = server.announced[m][: pair.a.shape[-2]]
            share = jnp.where(contributors > 0, 1 / jnp.where(contributors > 0, contributors, 1.0), 0.0)
            adapter[m] = Pair(pair.a * share[:, None], pair.b)
        return payload._replace(delta=payload.delta._replace(adapter=adapter)), client.memory

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        ranks, scales, adapter = spec.ranks(), spec.scales(), {}
        for m, product in combined.extra[PRODUCTS].items():
            untrained = scales[m] * (combined.mass[m].a == 0)
            kept = kernel_of(server.weights.adapter[m], untrained)
            adapter[m] = factorised(product + kept, ranks[m], scales[m])
        return settle(server, adapter, combined)

    return plain._replace(
        announce=announce,
        upload=upload,
        combine=with_products(spec),
        update=update,
        traits=Traits(linear=False, own_step=True, sends_values=True),
    )
