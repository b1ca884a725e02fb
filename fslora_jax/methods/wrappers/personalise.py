"""Personalisation: some parts of the adapter stay with each client."""

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from fslora_jax.errors import UserError
from fslora_jax.methods.base import Client, Method, Payload, Server
from fslora_jax.methods.spec import Spec, Traffic
from fslora_jax.methods.wrappers.uploads import personal_rows
from fslora_jax.settings import Whole
from fslora_jax.sketch import gather
from fslora_jax.types import Local, Pair, Rows, Trainable

NAME = "personal"


def personalise(
    method: Method,
    spec: Spec,
    *,
    parts: Sequence[Literal["a", "b", "head"]] = ("head",),
    top_layers: Whole = 0,
) -> Method:
    """``parts`` of the adapter, and both factors in the ``top_layers`` last layers, never leave the client.

    A client begins with the server's values, trains all of it as before, and sends the rest. What the server holds of
    a personal part is the average over the cohort; it serves the evaluation of the global model, which needs something
    there, and is not counted as traffic, since nothing would send it.

    Raises:
      UserError: factors shall be personal, but those of the method do not last from round to round.
    """
    traits = method.traits
    if (set(parts) - {"head"} or top_layers) and (traits.moves_base or not traits.linear):
        raise UserError(
            f"federation.wrappers.personalise: found parts {list(parts)}, top_layers {top_layers}, but this method "
            "makes new factors in every round, so that only the head can be personal; set parts: [head]"
        )
    own = personal_rows(spec, parts, top_layers)

    def first_memory(server: Server) -> PyTree:
        inner = {} if method.first_memory is None else method.first_memory(server)
        return inner | {NAME: server.weights}

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        given = method.download(key, server, client, cap)
        return given._replace(weights=with_parts(given, given.weights, client.memory[NAME], own, parts))

    def upload(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        as_server = with_parts(before, before.weights, server.weights, own, parts)
        payload, memory = method.upload(key, server, before._replace(weights=as_server), after, client)
        return payload, memory | {NAME: kept(before, after, client.memory[NAME])}

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        down, up = method.traffic(round, clients, 0 if "head" in parts else head_values)
        stays = 4 * personal_values(spec, clients.k, own)
        return Traffic(down - stays, up - stays)

    return method._replace(
        download=download,
        upload=upload,
        traffic=sizes,
        first_memory=first_memory,
        traits=traits._replace(
            remembers=True,
            personal=tuple(parts),
            personal_layers=top_layers,
            wrapped=(*traits.wrapped, "personalise"),
        ),
    )


def with_parts(
    local: Local, weights: Trainable, source: Trainable, own: dict[str, Rows], parts: Sequence[str]
) -> Trainable:
    """Weights that a client holds, with the personal parts from ``source``, a whole adapter and head."""
    adapter = {}
    for m, pair in weights.adapter.items():
        there = gather(source.adapter[m], local.index[m])
        adapter[m] = Pair(
            *(jnp.where(rows[..., None] > 0, s, x) for x, s, rows in zip(pair, there, own[m], strict=True))
        )
    return Trainable(adapter, source.head if "head" in parts else weights.head)


def kept(before: Local, after: Local, memory: Trainable) -> Trainable:
    """A client's memory after training: what it moved, each component in its place."""

    def placed(old: Array, new: Array, index: Array, rows: Array) -> Array:
        layers = jnp.arange(index.shape[0])[:, None]
        return old.at[layers, index].set(jnp.where(rows[..., None] > 0, new, old[layers, index]))

    adapter = {
        m: Pair(
            *(
                placed(old, new, before.index[m], rows)
                for old, new, rows in zip(memory.adapter[m], pair, before.trains[m], strict=True)
            )
        )
        for m, pair in after.weights.adapter.items()
    }
    return Trainable(adapter, after.weights.head)


def personal_values(spec: Spec, k: Any, own: dict[str, Rows]) -> Any:
    """How many values of a client's k components stay with it."""
    ranks = spec.ranks(k)
    return sum(
        ranks[m] * round(float(rows.a.sum()) * t.i + float(rows.b.sum()) * t.o)
        for (m, t), rows in zip(spec.targets.items(), own.values(), strict=True)
    )
