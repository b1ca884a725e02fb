"""Fed-PLoRA: train a random k of r rank-1 modules and fold the rest into the local base (arXiv 2602.16936)."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from fslora_jax.methods.base import Client, Combined, Method, Server, Traits
from fslora_jax.methods.fslora import draw_all, in_place
from fslora_jax.methods.parts import fedavg_lora, only, per_contributor, take_step, whole
from fslora_jax.methods.spec import Spec, Traffic, drawn_indices, factor_values
from fslora_jax.sketch import draw
from fslora_jax.types import Local


def fed_plora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """Every client sees the whole adapter and trains a random k of its components; each is averaged over its trainers.

    Folding what does not train into the frozen base is the same as holding it still, so nothing is materialised.
    Against FSLoRA: full ``B A`` in the forward pass, no gain r/k, and a mean over contributors instead of all clients.
    """

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del cap
        drawn = draw_all(key, spec, client.k, spec.r, draw)
        moves = {m: (in_place(sketch) > 0).astype(jnp.float32) for m, sketch in drawn.items()}
        return only(whole(spec, server.weights), a=moves, b=moves)

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        return take_step(server_optimizer, server, per_contributor(combined), combined.mass)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        values, everything = factor_values(spec, clients.k), factor_values(spec, spec.r)
        up = 4 * (values + drawn_indices(spec, clients.k) + head_values)
        return Traffic(down=0 * values + 4 * (everything + head_values), up=up)

    return fedavg_lora(spec, server_optimizer)._replace(
        download=download,
        update=update,
        traffic=sizes,
        traits=Traits(holds_all=True, sends_indices=True),
    )
