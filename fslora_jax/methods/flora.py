"""FLoRA: stacked adapters are merged into the base, and every round starts afresh (Wang et al., arXiv 2409.05976)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fslora_jax.lora import init_adapter
from fslora_jax.methods.base import Client, Combined, Method, Server, Traits
from fslora_jax.methods.parts import (
    PRODUCTS,
    blank_kernels,
    fedavg_lora,
    prefix,
    sends,
    settle,
    value,
    with_products,
)
from fslora_jax.methods.spec import Spec, Traffic, factor_values
from fslora_jax.types import Head


def flora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """Clients train fresh factors of rank k; ``[B_1 .. B_C] [p_1 A_1; ..]`` joins the base, which is exact.

    The product of the stacks is ``sum_i p_i B_i A_i``, so it is summed as such. Every client downloads the stack of the
    whole cohort; fresh factors come from a seed and cost nothing.
    """
    fedit = fedavg_lora(spec, server_optimizer)

    def init(key: Key[Array, ""], head: Head) -> Server:
        return fedit.init(key, head)._replace(base_delta=blank_kernels(spec))

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        fresh = init_adapter(key, spec.targets, spec.ranks())
        merged = jax.tree.map(jnp.add, server.base_delta, combined.extra[PRODUCTS])
        return settle(server, fresh, combined)._replace(base_delta=merged)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        values = factor_values(spec, clients.k)
        return Traffic(down=0 * values + 4 * (values.sum() + head_values), up=4 * (values + head_values))

    return fedit._replace(
        init=init,
        download=prefix(spec),
        upload=sends(value),
        combine=with_products(spec),
        update=update,
        traffic=sizes,
        traits=Traits(linear=False, moves_base=True, own_step=True, sends_values=True),
    )
