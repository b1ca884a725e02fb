"""FSLoRA: every client trains a random k of the r rank components (Fang et al., arXiv 2501.19389)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from fslora_jax.methods.base import Client, Method, Server, Traits
from fslora_jax.methods.parts import fedavg_lora, hold, whole
from fslora_jax.methods.spec import Spec, Traffic, traffic
from fslora_jax.settings import Ratio
from fslora_jax.sketch import Draw, Sketch, draw, draw_by_importance
from fslora_jax.types import Adapter, Local, Rows


def fslora(
    spec: Spec,
    server_optimizer: optax.GradientTransformation,
    *,
    importance: bool = False,
    uniform_part: Ratio = 0.2,
    redraw: bool = False,
) -> Method:
    """FedIT with one function replaced: ``download`` hands out a sketch of the global adapter.

    A client holds ``B[:, I]`` and ``A[I, :]`` with forward scale ``s r/k`` over all local steps of the round; the
    average runs over all clients of the cohort, not over those that trained a component (Algorithm 1).

    ``importance``: components are drawn in proportion to ``|b_j| |a_j|`` (mixed with ``uniform_part`` of a uniform
    draw), with gain 1/p for the exact inclusion probability p, so that ``E[S] = I`` still. ``redraw``: a new sketch in
    every local step, as the paper's proof assumes; a client then holds all r components and its traffic is that of r.
    """

    def sketches(key: Key[Array, ""], adapter: Adapter, client: Client, cap: int) -> dict[str, Sketch]:
        if not importance:
            return draw_all(key, spec, client.k, cap, draw)
        by_strength = partial(draw_by_importance, uniform_part)
        return draw_all(key, spec, client.k, cap, by_strength, strengths(adapter))

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        if redraw:
            return whole(spec, server.weights)
        drawn = sketches(key, server.weights.adapter, client, cap)
        index = {module: s.index for module, s in drawn.items()}
        gain = {module: s.gain for module, s in drawn.items()}
        return hold(spec, server.weights, index, gain)

    def at_step(key: Key[Array, ""], client: Client, local: Local) -> Local:
        drawn = sketches(key, local.weights.adapter, client, spec.r)
        gains = {m: in_place(s) for m, s in drawn.items()}
        moves = {m: (g > 0).astype(jnp.float32) for m, g in gains.items()}
        return local._replace(
            scale={m: spec.scales()[m] * g for m, g in gains.items()},
            trains={m: Rows(g, g) for m, g in moves.items()},
        )

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        return traffic(spec, clients.k * 0 + spec.r if redraw else clients.k, head_values)

    return fedavg_lora(spec, server_optimizer)._replace(
        download=download,
        traffic=sizes,
        at_step=at_step if redraw else None,
        traits=Traits(holds_all=redraw),
    )


def strengths(adapter: Adapter) -> dict[str, Float[Array, "N r"]]:
    """``|b_j| |a_j|`` of every component: how much of ``B A`` it makes."""
    return {m: jnp.linalg.norm(p.a, axis=-1) * jnp.linalg.norm(p.b, axis=-1) for m, p in adapter.items()}


def in_place(sketch: Sketch) -> Float[Array, "N r"]:
    """The gain of every component where it lives in the global adapter."""
    rows = jnp.arange(sketch.index.shape[0])[:, None]
    return jnp.zeros_like(sketch.gain).at[rows, sketch.index].set(sketch.gain)


def draw_all(
    key: Key[Array, ""],
    spec: Spec,
    k: Int[Array, ""],
    cap: int,
    drawing: Draw,
    weight: dict[str, Float[Array, "N r"]] | None = None,
) -> dict[str, Sketch]:
    """A sketch for every layer of every adapted module: independent draws, or one for all (``share_sketch``).

    The draws of all modules of one rank are one vectorised operation, which keeps the compiled round small. A
    ``drawing`` that goes by ``weight`` gets it as its last argument.
    """
    layers = {m: target.layers for m, target in spec.targets.items()}
    total = sum(layers.values())
    keys = jnp.broadcast_to(key, (total,)) if spec.share_sketch else jax.random.split(key, total)
    by_module = dict(zip(layers, jnp.split(keys, np.cumsum([*layers.values()])[:-1]), strict=True))
    full, held, caps = spec.ranks(), spec.ranks(k), spec.ranks(cap)
    sketches = {}
    for r in sorted(set(full.values())):
        alike = [m for m in layers if full[m] == r]
        given = [jnp.concatenate([by_module[m] for m in alike])]
        if weight is not None:
            given.append(jnp.concatenate([weight[m] for m in alike]))
        draws = jax.vmap(lambda key, *weight, r=r, m=alike[0]: drawing(key, r, held[m], caps[m], *weight))(
            *given
        )
        starts = np.cumsum([layers[m] for m in alike])[:-1]
        parts = zip(*(jnp.split(x, starts) for x in draws), strict=True)
        sketches |= {m: Sketch(*part) for m, part in zip(alike, parts, strict=True)}
    return {m: sketches[m] for m in layers}
