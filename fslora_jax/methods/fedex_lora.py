"""FedEx-LoRA: what the average of factors misses joins the base (Singhal et al., arXiv 2410.09432)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fslora_jax.methods.base import Client, Combined, Method, Server, Traits
from fslora_jax.methods.parts import (
    PRODUCTS,
    blank_kernels,
    fedavg_lora,
    kernel_of,
    per_contributor,
    sends,
    settle,
    value,
    with_products,
)
from fslora_jax.methods.spec import Spec, Traffic, factor_values
from fslora_jax.types import Head


def fedex_lora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedIT, and ``W0 += s (sum_i p_i B_i A_i - mean(B) mean(A))``, which makes the average exact.

    The residual has rank (C - 1) r at most. It goes down as the cohort's factors, or dense where that is less.
    """
    fedit = fedavg_lora(spec, server_optimizer)

    def init(key: Key[Array, ""], head: Head) -> Server:
        return fedit.init(key, head)._replace(base_delta=blank_kernels(spec))

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        mean, scales = per_contributor(combined).adapter, spec.scales()
        residual = {m: x - kernel_of(mean[m], scales[m]) for m, x in combined.extra[PRODUCTS].items()}
        merged = jax.tree.map(jnp.add, server.base_delta, residual)
        return settle(server, mean, combined)._replace(base_delta=merged)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        values = factor_values(spec, clients.k)
        dense = sum(t.layers * t.i * t.o for t in spec.targets.values())
        residual = min(int(values.sum()), dense)
        return Traffic(down=4 * (values + residual + head_values), up=4 * (values + head_values))

    return fedit._replace(
        init=init,
        upload=sends(value),
        combine=with_products(spec),
        update=update,
        traffic=sizes,
        traits=Traits(linear=False, moves_base=True, full_rank=True, own_step=True, sends_values=True),
    )
