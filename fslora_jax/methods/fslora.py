"""FSLoRA: every client trains a random k of the r rank components (Fang et al., arXiv 2501.19389)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fslora_jax.methods.base import Client, Method, Server, Spec, fedavg_lora, hold
from fslora_jax.sketch import draw
from fslora_jax.types import Local


def fslora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedIT with one function replaced: ``download`` hands out a sketch of the global adapter.

    A client holds ``B[:, I]`` and ``A[I, :]`` with forward scale ``s r/k`` over all local steps of the round; the
    average runs over all clients of the cohort, not over those that trained a component (Algorithm 1).
    """

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        index, gain = {}, {}
        for number, (module, target) in enumerate(spec.targets.items()):
            if spec.share_sketch:
                keys = jnp.broadcast_to(key, (target.layers,))
            else:
                keys = jax.random.split(jax.random.fold_in(key, number), target.layers)
            index[module], gain[module] = jax.vmap(lambda key: draw(key, spec.r, client.k, cap))(keys)
        return hold(spec, server.weights, index, gain)

    return fedavg_lora(spec, server_optimizer)._replace(download=download)
