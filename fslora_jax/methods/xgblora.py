"""XGBLoRA: every round boosts some layers with a fresh low-rank step (Zhang et al., arXiv 2410.19694), federated."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fslora_jax.lora import init_adapter
from fslora_jax.methods.base import Client, Combined, Method, Server, Traits
from fslora_jax.methods.parts import (
    PRODUCTS,
    blank_kernels,
    fedavg_lora,
    only,
    sends,
    settle,
    value,
    whole,
    with_products,
)
from fslora_jax.methods.spec import Spec, Traffic, factor_values
from fslora_jax.settings import NonNegative, Positive, Ratio
from fslora_jax.types import Head, Local

NAME = "xgblora"


def xgblora(
    spec: Spec,
    server_optimizer: optax.GradientTransformation,
    *,
    layers: Ratio = 0.5,
    ridge: NonNegative = 1e-4,
    step: Positive = 1.0,
) -> Method:
    """A round trains fresh factors in a random part of the layers, the same for all, and merges them into the base.

    The paper boosts one machine's model with rank 1 (set ``lora.r: 1``). Federated (ours): the server merges ``step``
    times the exact average ``sum_i p_i B_i A_i``, of rank C r. ``ridge`` times ``|A|^2 + |B|^2`` joins the loss.
    """
    fedit, count = (
        fedavg_lora(spec, server_optimizer),
        max((t.layers for t in spec.targets.values()), default=1),
    )
    picked_count = max(1, round(layers * count))

    def pick(key: Key[Array, ""]) -> Float[Array, " layers"]:
        return (jax.random.permutation(key, count) < picked_count).astype(jnp.float32)

    def init(key: Key[Array, ""], head: Head) -> Server:
        pick_key, start_key = jax.random.split(key)
        server = fedit.init(start_key, head)
        return server._replace(base_delta=blank_kernels(spec), memory={NAME: pick(pick_key)})

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del key, client, cap
        rows = {m: server.memory[NAME][: t.layers, None] for m, t in spec.targets.items()}
        held = only(whole(spec, server.weights), a=rows, b=rows)
        return held._replace(scale={m: s * rows[m] for m, s in held.scale.items()})

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        pick_key, fresh_key = jax.random.split(key)
        boosted = jax.tree.map(lambda x, y: x + step * y, server.base_delta, combined.extra[PRODUCTS])
        fresh = init_adapter(fresh_key, spec.targets, spec.ranks())
        after = settle(server, fresh, combined)._replace(base_delta=boosted)
        return after._replace(memory=server.memory | {NAME: pick(pick_key)})

    def penalty(local: Local) -> Float[Array, ""]:
        squares = [
            (rows[..., None] * x**2).sum()
            for m, pair in local.weights.adapter.items()
            for x, rows in zip(pair, local.trains[m], strict=True)
        ]
        return ridge * sum(squares, jnp.float32(0))

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        values = factor_values(spec, clients.k) * picked_count // count
        return Traffic(down=0 * values + 4 * (values.sum() + head_values), up=4 * (values + head_values))

    return fedit._replace(
        init=init,
        download=download,
        upload=sends(value),
        combine=with_products(spec),
        update=update,
        traffic=sizes,
        penalty=penalty if ridge else None,
        traits=Traits(linear=False, moves_base=True, full_rank=True, own_step=True, sends_values=True),
    )
