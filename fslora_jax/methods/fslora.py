"""FSLoRA: every client trains a random k of the r rank components (Fang et al., arXiv 2501.19389)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key

from fslora_jax.methods.base import Client, Method, Server, fedavg_lora, hold
from fslora_jax.methods.spec import Spec
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

    The draws of all modules of one rank are one vectorised operation, which keeps the compiled round small.
    """
    layers = {m: target.layers for m, target in spec.targets.items()}
    total = sum(layers.values())
    keys = jnp.broadcast_to(key, (total,)) if spec.share_sketch else jax.random.split(key, total)
    by_module = dict(zip(layers, jnp.split(keys, np.cumsum([*layers.values()])[:-1]), strict=True))
    full, held, caps = spec.ranks(), spec.ranks(k), spec.ranks(cap)
    sketches = {}
    for r in sorted(set(full.values())):
        alike = [m for m in layers if full[m] == r]
        draws = jax.vmap(lambda key, r=r, m=alike[0]: draw(key, r, held[m], caps[m]))(
            jnp.concatenate([by_module[m] for m in alike])
        )
        starts = np.cumsum([layers[m] for m in alike])[:-1]
        parts = zip(*(jnp.split(x, starts) for x in draws), strict=True)
        sketches |= {m: Sketch(*part) for m, part in zip(alike, parts, strict=True)}
    return {m: sketches[m] for m in layers}
