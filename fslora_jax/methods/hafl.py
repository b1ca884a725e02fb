"""HAFL: clients train the most important rank components (Su et al., arXiv 2411.06581)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fslora_jax.methods.base import Client, Combined, Method, Server, Traits
from fslora_jax.methods.parts import fedavg_lora, hold, only, per_contributor, take_step, whole
from fslora_jax.methods.spec import Spec, Traffic, drawn_indices, factor_values
from fslora_jax.settings import Fraction
from fslora_jax.types import Head, Local, Pair, Trainable

NAME = "hafl"


def hafl(
    spec: Spec,
    server_optimizer: optax.GradientTransformation,
    *,
    freeze: bool = True,
    b1: Fraction = 0.85,
    b2: Fraction = 0.85,
) -> Method:
    """The server ranks components by smoothed sensitivity, and a client of rank k trains the first k of the ranking.

    ``freeze``: it receives all r and holds the rest still; else it receives those k alone (truncation). Each component
    is averaged over its trainers. Importance (ours, after AdaLoRA): ``|w dw|`` of the round's average change, its mean
    over time with ``b1`` times its spread with ``b2``, averaged over the entries of a column of B and a row of A.
    What nobody trained keeps importance 0, the least: with all k below r the components beyond the largest k never
    train, so let some client have k = r.
    """
    fedit = fedavg_lora(spec, server_optimizer)

    def init(key: Key[Array, ""], head: Head) -> Server:
        server = fedit.init(key, head)
        nothing = jax.tree.map(jnp.zeros_like, server.weights.adapter)
        return server._replace(memory={NAME: {"mean": nothing, "spread": nothing}})

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del key
        best = {m: jnp.argsort(-score, axis=-1) for m, score in scores(server).items()}
        ks, caps = spec.ranks(client.k), spec.ranks(cap)
        if freeze:
            moves = {
                m: (jnp.argsort(order, axis=-1) < ks[m]).astype(jnp.float32) for m, order in best.items()
            }
            return only(whole(spec, server.weights), a=moves, b=moves)
        index = {m: order[:, : caps[m]].astype(jnp.int32) for m, order in best.items()}
        gain = {m: jnp.broadcast_to(jnp.arange(caps[m]) < ks[m], x.shape) * 1.0 for m, x in index.items()}
        return hold(spec, server.weights, index, gain)

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        delta = per_contributor(combined)
        kept = smoothed(server, delta, combined, b1, b2)
        after = take_step(server_optimizer, server, delta, combined.mass)
        return after._replace(memory=server.memory | {NAME: kept})

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        values = factor_values(spec, clients.k)
        indices = drawn_indices(spec._replace(share_sketch=False), clients.k)  # a ranking for each layer
        held = 0 * values + factor_values(spec, spec.r) if freeze else values
        return Traffic(down=4 * (held + indices + head_values), up=4 * (values + head_values))

    return fedit._replace(
        init=init, download=download, update=update, traffic=sizes, traits=Traits(holds_all=freeze)
    )


def scores(server: Server) -> dict[str, Float[Array, "N r"]]:
    """Importance of every component: the mean score of its row of A plus that of its column of B."""
    kept = server.memory[NAME]
    each = jax.tree.map(lambda mean, spread: (mean * spread).mean(-1), kept["mean"], kept["spread"])
    return {m: rows.a + rows.b for m, rows in each.items()}


def smoothed(
    server: Server, delta: Trainable, combined: Combined, b1: float, b2: float
) -> dict[str, dict[str, Pair]]:
    """The running mean of ``|w dw|`` and of its distance from that mean, where somebody trained."""
    kept = server.memory[NAME]

    def of(w: Array, d: Array, mean: Array, spread: Array, mass: Array) -> tuple[Array, Array]:
        now, trained = jnp.abs(w * d), mass[..., None] > 0
        new_mean = jnp.where(trained, b1 * mean + (1 - b1) * now, mean)
        return new_mean, jnp.where(trained, b2 * spread + (1 - b2) * jnp.abs(now - new_mean), spread)

    found = {
        m: [
            of(*parts)
            for parts in zip(
                *(
                    server.weights.adapter[m],
                    delta.adapter[m],
                    kept["mean"][m],
                    kept["spread"][m],
                    combined.mass[m],
                ),
                strict=True,
            )
        ]
        for m in delta.adapter
    }
    mean, spread = ({m: Pair(*(one[n] for one in pair)) for m, pair in found.items()} for n in (0, 1))
    return {"mean": mean, "spread": spread}
