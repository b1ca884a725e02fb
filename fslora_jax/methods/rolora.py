"""RoLoRA: the two factors take turns (Chen et al., arXiv 2502.01755)."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fslora_jax.methods.base import Client, Method, Server
from fslora_jax.methods.parts import fedavg_lora, only
from fslora_jax.methods.spec import Spec, Traffic, factor_values
from fslora_jax.types import Local


def rolora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedIT in which even rounds train B and odd ones A; B comes first, since at B = 0 the gradient of A is zero.

    In each round one factor is the same for all, so the average is exact, and the other is all that travels. The idle
    factor keeps its bits, and a server optimiser's moments of it, whose bias correction counts all rounds.
    """
    fedit = fedavg_lora(spec, server_optimizer)

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        odd = (server.round % 2).astype(jnp.float32)
        return only(
            fedit.download(key, server, client, cap),
            a=dict.fromkeys(spec.targets, odd),
            b=dict.fromkeys(spec.targets, 1 - odd),
        )

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        each = 4 * (factor_values(spec, clients.k, "ba"[round % 2]) + head_values)
        return Traffic(each, each)

    return fedit._replace(download=download, traffic=sizes)
