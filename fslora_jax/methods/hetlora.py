"""HetLoRA: clients of unequal ranks, weighted by the size of their products, that prune themselves.

Cho et al., arXiv 2401.06432. Also zero padding, its plain sibling, under its own name.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.methods.base import Client, Combined, Method, Payload, Server, Traits
from fslora_jax.methods.parts import (
    EXACT,
    fedavg_lora,
    hold_first,
    only,
    prefix,
    prefix_traffic,
    sends,
    take_step,
    value,
    weighted_sum,
)
from fslora_jax.methods.spec import Spec, Traffic
from fslora_jax.settings import Count, NonNegative, Ratio
from fslora_jax.types import Adapter, Local, Pair, Trainable

NAME = "hetlora"
EPS = 1e-12


def zero_padding(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """Clients train and send the first k components; the server averages them padded with zeros to rank r.

    Padding damps a component by the share of those that did not train it, in every round and in each factor.
    """

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        return take_step(server_optimizer, server, padded_change(server, combined, 1.0), combined.mass)

    return fedavg_lora(spec, server_optimizer)._replace(
        download=prefix(spec),
        upload=sends(value),
        update=update,
        traffic=prefix_traffic(spec),
        traits=Traits(sends_values=True),
    )


def hetlora(
    spec: Spec,
    server_optimizer: optax.GradientTransformation,
    *,
    decay: Ratio = 0.99,
    tail_penalty: NonNegative = 1e-3,
    least_rank: Count = 5,
) -> Method:
    """Zero padding with weights ``|B_i A_i| / sum``, and ranks that clients cut down by themselves.

    ``decay`` (the paper's gamma) says which components are the tail, those from ``floor(decay k)`` on; the norm of the
    tail's B times that of its A joins the loss with ``tail_penalty``. Where it has shrunk in a round, the client drops
    the tail for good, down to ``least_rank``. Norms are over all modules jointly. Traffic is counted at the rank with
    which a client begins the round.
    """

    def rank_of(client: Client) -> Array:
        return client.memory[NAME]["rank"]

    def first_memory(server: Server) -> PyTree:
        del server
        return {NAME: {"rank": jnp.int32(-1)}}  # not yet known: the client's k

    def known(client: Client) -> Client:
        rank = rank_of(client)
        return client._replace(k=jnp.where(rank < 0, client.k, rank))

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del key
        return hold_first(spec, server.weights, known(client).k, cap)

    def upload(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        del key, server
        k, tail = known(client).k, tail_rows(before, decay)
        shrunk = tail_norm(after.weights.adapter, tail) < tail_norm(
            before.weights.adapter, tail
        )  # never at B = 0
        cut = jnp.minimum(k, jnp.maximum(jnp.minimum(least_rank, k), jnp.floor(decay * k).astype(k.dtype)))
        k = jnp.where(shrunk, cut, k)
        left = {
            m: (jnp.arange(x.a.shape[-1]) < spec.ranks(k)[m]).astype(x.a.dtype)
            for m, x in before.trains.items()
        }
        payload = value(only(before, a=left, b=left), after)
        norm = product_norm(payload.delta.adapter)
        return payload._replace(extra={NAME: norm}), client.memory | {NAME: {"rank": k}}

    def combine(payloads: list[Payload], weights: list[Float[Array, " C"]]) -> Combined:
        by_norm = [jnp.where(w > 0, p.extra[NAME] + EPS, 0.0) for p, w in zip(payloads, weights, strict=True)]
        combined = weighted_sum(spec.ranks(), payloads, by_norm)
        return combined._replace(extra={NAME: sum(w.sum() for w in by_norm)})

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        delta = padded_change(server, combined, combined.extra[NAME])
        return take_step(server_optimizer, server, delta, combined.mass)

    def penalty(local: Local) -> Float[Array, ""]:
        return tail_penalty * tail_norm(local.weights.adapter, tail_rows(local, decay), EPS)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        down, up = prefix_traffic(spec)(round, known(clients) if clients.memory else clients, head_values)
        return Traffic(down, up + 4)  # and its norm

    return fedavg_lora(spec, server_optimizer)._replace(
        download=download,
        upload=upload,
        combine=combine,
        update=update,
        traffic=sizes,
        first_memory=first_memory,
        penalty=penalty if tail_penalty else None,
        traits=Traits(linear=False, remembers=True, sends_values=True, sends_numbers=1),
    )


def padded_change(server: Server, combined: Combined, total: float | Array) -> Trainable:
    """From the sum of padded factors, whose weights add up to ``total``, the change of server and head."""
    total = jnp.where(jnp.asarray(total) > 0, total, 1.0)
    mean = jax.tree.map(lambda x: x / total, combined.delta)
    return Trainable(jax.tree.map(jnp.subtract, mean.adapter, server.weights.adapter), mean.head)


def tail_rows(local: Local, decay: float) -> dict[str, Float[Array, "N k"]]:
    """1 for the components from ``floor(decay k)`` to k of each module."""
    rows = {}
    for m, (a, _) in local.trains.items():
        count = a.sum(-1, keepdims=True)
        rows[m] = a * (jnp.arange(a.shape[-1]) >= jnp.floor(decay * count))
    return rows


def tail_norm(
    adapter: Adapter, tail: dict[str, Float[Array, "N k"]], offset: float = 0.0
) -> Float[Array, ""]:
    """``|B_tail| |A_tail|``, each over all modules; an offset keeps the gradient finite at B = 0."""

    def norm(which: int) -> Float[Array, ""]:
        squares = [(tail[m][..., None] * pair[which] ** 2).sum() for m, pair in adapter.items()]
        return jnp.sqrt(sum(squares) + offset)

    return norm(0) * norm(1)


def product_norm(adapter: Adapter) -> Float[Array, ""]:
    """``|B A|`` over all modules by r x r Gram matrices: ``|BA|^2 = sum (B^T B) o (A A^T)``."""

    def square(pair: Pair) -> Float[Array, ""]:
        grams = [jnp.einsum("nkd,njd->nkj", x, x, precision=EXACT) for x in pair]
        return (grams[0] * grams[1]).sum()

    return jnp.sqrt(jnp.maximum(sum(square(pair) for pair in adapter.values()), 0.0))
