"""How far the server's step is from the average of what the clients trained: the aggregation error of a method."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.methods.base import TOLD, Client, Combined, Method, Payload, Server
from fslora_jax.methods.parts import EXACT, kernel_of
from fslora_jax.methods.spec import Spec
from fslora_jax.types import Adapter, Head, Local, Pair

NAME = "observe"
NUMBERS = ("aggregation/error", "aggregation/from_mean")


class Seen(NamedTuple):
    """What a client put on the base before and after its local steps: factors whose scale is in ``a``."""

    before: Adapter
    after: Adapter


def observe(method: Method, spec: Spec) -> Method:
    """Every round tells, in ``metrics.jsonl``, how far the global model lands from plain averaging of whole weights.

    With ``W_i`` and ``W_i'`` the adapted weights of client i before and after its local steps, ``W`` and ``W'`` those
    of the global model, and ``D = sum_i w_i (W_i' - W_i)``, all modules taken together (Frobenius norm):

    - ``aggregation/error``: ``|W' - W - D| / |D|``, against the average of the clients' changes;
    - ``aggregation/from_mean``: ``|W' - sum_i w_i W_i'| / |D|``, against the average of their weights.

    Both are the same where every client begins with the global model. A sketch begins elsewhere, so ``from_mean`` has
    its noise, while ``error`` has only what averaging the factors apart does; 0 is exact. Nothing else changes. Takes
    two more sums of the size of the adapted kernels.
    """

    def init(key: Key[Array, ""], head: Head) -> Server:
        server = method.init(key, head)
        nothing = dict.fromkeys(NUMBERS, jnp.float32(0))
        return server._replace(memory=server.memory | {TOLD: told_so_far(server) | nothing})

    def upload(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        payload, memory = method.upload(key, server, before, after, client)
        seen = Seen(on_base(server, before), on_base(server, after))
        return payload._replace(extra=payload.extra | {NAME: seen}), memory

    def on_base(server: Server, local: Local) -> Adapter:
        held = local if method.forward is None else method.forward(server, local)
        return {
            m: pair._replace(a=pair.a * held.scale[m][..., None]) for m, pair in held.weights.adapter.items()
        }

    def combine(payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]) -> Combined:
        combined = method.combine(payloads, weights)
        tiers = [
            jax.tree.map(lambda pair, w=w: mean_kernel(pair, w), p.extra[NAME], is_leaf=is_pair)
            for p, w in zip(payloads, weights, strict=True)
        ]
        total = reduce(lambda x, y: jax.tree.map(jnp.add, x, y), tiers)
        return combined._replace(extra=combined.extra | {NAME: total})

    def weights_of(server: Server) -> dict[str, Float[Array, "N i o"]]:
        adapter = method.adapter(server).adapter
        return {
            m: kernel_of(pair, spec.scales()[m]) + server.base_delta.get(m, 0.0)
            for m, pair in adapter.items()
        }

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        after = method.update(key, server, combined)
        seen, old, new = combined.extra[NAME], weights_of(server), weights_of(after)
        trained = {m: seen.after[m] - seen.before[m] for m in old}
        mean = {m: seen.after[m] + server.base_delta.get(m, 0.0) for m in old}
        error = norm({m: new[m] - old[m] - trained[m] for m in old})
        away = norm({m: new[m] - mean[m] for m in old})
        size = norm(trained)
        found = [jnp.where(size > 0, x / jnp.where(size > 0, size, 1.0), 0.0) for x in (error, away)]
        told = told_so_far(after) | dict(zip(NUMBERS, found, strict=True))
        return after._replace(memory=after.memory | {TOLD: told})

    return method._replace(
        init=init,
        upload=upload,
        combine=combine,
        update=update,
        traits=method.traits._replace(wrapped=(*method.traits.wrapped, NAME)),
    )


def told_so_far(server: Server) -> dict[str, Float[Array, ""]]:
    """The numbers that a method tells already."""
    return dict(server.memory.get(TOLD, {}))


def mean_kernel(pair: Pair, weight: Float[Array, " C"]) -> Float[Array, "N i o"]:
    """``sum_c w_c B_c A_c`` of one tier, as a kernel."""
    return jnp.einsum("c,cnki,cnko->nio", weight, *pair, precision=EXACT)


def is_pair(x: PyTree) -> bool:
    """Where the factors of a module are."""
    return isinstance(x, Pair)


def norm(kernels: dict[str, Float[Array, "N i o"]]) -> Float[Array, ""]:
    """Over all modules together."""
    return jnp.sqrt(sum((jnp.square(x).sum() for x in kernels.values()), jnp.float32(0)))
