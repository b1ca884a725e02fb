"""FSLoRA: every client trains a random k of the r rank components (Fang et al., arXiv 2501.19389)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from fslora_jax.methods.base import Client, Method, Server, Spec, fedavg_lora, hold
from fslora_jax.sketch import Sketch, draw
from fslora_jax.types import Local


def fslora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedIT with one function replaced: ``download`` hands out a sketch of the global adapter.

    A client holds ``B[:, I]`` and ``A[I, :]`` with forward scale ``s r/k`` over all local steps of the round; the
    average runs over all clients of the cohort, not over those that trained a component (Algorithm 1).
    """

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        sketch = draw_all(key, spec, client.k, cap)
        index = {module: s.index for module, s in sketch.items()}
        gain = {module: s.gain for module, s in sketch.items()}
        return hold(spec, server.weights, index, gain)

    return fedavg_lora(spec, server_optimizer)._replace(download=download)


def draw_all(key: Key[Array, ""], spec: Spec, k: Int[Array, ""], cap: int) -> dict[str, Sketch]:
    """A sketch for every layer of every adapted module: independent draws, or one for all (``share_sketch``).

    All draws are one vectorised operation, which keeps the compiled round small.
    """
    layers = [target.layers for target in spec.targets.values()]
    keys = jnp.broadcast_to(key, (sum(layers),)) if spec.share_sketch else jax.random.split(key, sum(layers))
    every = jax.vmap(lambda key: draw(key, spec.r, k, cap))(keys)
    starts = np.cumsum(layers)[:-1]
    parts = zip(*(jnp.split(x, starts) for x in every), strict=True)
    return {module: Sketch(*part) for module, part in zip(spec.targets, parts, strict=True)}
