"""FFA-LoRA: A stays as it was drawn, B is trained and averaged (Sun et al., arXiv 2403.12313)."""

import optax
from jaxtyping import Array, Key

from fslora_jax.methods.base import Client, Method, Server
from fslora_jax.methods.parts import fedavg_lora, only
from fslora_jax.methods.spec import Spec, Traffic, factor_values
from fslora_jax.types import Local


def ffa_lora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedIT with A frozen at one random value for all: ``mean(B_i) A = mean(B_i A)``, and noise on B stays linear."""
    fedit = fedavg_lora(spec, server_optimizer)

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        return only(fedit.download(key, server, client, cap), a=0.0)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        each = 4 * (factor_values(spec, clients.k, "b") + head_values)
        return Traffic(each, each)

    return fedit._replace(download=download, traffic=sizes)
