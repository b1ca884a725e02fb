"""Rounds of any method with its wrappers on the toy, without training: what clients change is made up, and eager."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toy

from fslora_jax.methods import Client, Combined, Method, Payload, Server, build
from fslora_jax.types import Local, Rows

SPEC = toy.SPEC._replace(r=4)
"""Narrow enough for methods with orthonormal factors."""
WEIGHTS = (0.5, 0.3, 0.2)


def make(name: str, wrappers: dict[str, dict[str, Any]] | None = None, **options: Any) -> Method:
    """A method of the catalogue on the toy's modules, plain averaging at the server."""
    return build(name, options, wrappers or {}, SPEC, optax.sgd(1.0))


def start(method: Method) -> Server:
    """A server whose adapter does something from the first round on, also where its B is fixed and elsewhere."""
    head = {"classifier": {"kernel": 0.3 * jnp.ones((toy.D, toy.LABELS)), "bias": jnp.zeros(toy.LABELS)}}
    server = method.init(jax.random.key(0), head)
    adapter = {
        m: pair._replace(b=0.4 * jax.random.normal(jax.random.key(n), pair.b.shape))
        for n, (m, pair) in enumerate(server.weights.adapter.items())
    }
    return server._replace(weights=server.weights._replace(adapter=adapter))


def pretend(client: Client, before: Local) -> Local:
    """What a client holds after local steps that go its own way, in what it may move."""
    key = jax.random.fold_in(jax.random.key(77), client.id)
    leaves, tree = jax.tree.flatten(before.weights)
    pulls = [
        0.2 * jnp.tanh(x + jax.random.normal(jax.random.fold_in(key, n), x.shape))
        for n, x in enumerate(leaves)
    ]
    pulls = jax.tree.unflatten(tree, pulls)
    adapter = {
        m: type(pair)(*(x * rows[..., None] for x, rows in zip(pair, before.trains[m], strict=True)))
        for m, pair in pulls.adapter.items()
    }
    return before._replace(weights=jax.tree.map(jnp.add, before.weights, pulls._replace(adapter=adapter)))


class Sent(NamedTuple):
    """A round: what clients were given and sent, what they remember, what arrived, the server after it."""

    clients: Client
    before: Local
    after: Local
    payload: Payload
    memory: Any
    combined: Combined
    server: Server


def one_round(
    method: Method,
    server: Server,
    memory: Any = None,
    *,
    ks: tuple[int, ...] = (1, 2, 4),
    weights: tuple[float, ...] = WEIGHTS,
    train: Callable[[Client, Local], Local] = pretend,
    seed: int = 0,
    r: int = SPEC.r,
) -> Sent:
    """Clients 0, 1, ... in one tier; one that trains all r components holds them all."""
    count = len(weights)
    if memory is None:
        first = {} if method.first_memory is None else method.first_memory(server)
        memory = jax.tree.map(lambda x: jnp.stack([x] * count), first)
    ks = (r,) * count if method.traits.full_rank else ks
    clients = Client(jnp.arange(count), jnp.array(ks), jnp.array(weights), memory)
    key = jax.random.fold_in(jax.random.key(seed), server.round)
    keys = jax.random.split(key, count + 1)
    if method.announce is not None:
        said = jax.vmap(method.announce)(clients)
        total = jax.tree.map(lambda x: jnp.einsum("c,c...->...", clients.weight, x), said)
        server = server._replace(announced=total)
    before = jax.vmap(lambda key, client: method.download(key, server, client, r))(keys[:-1], clients)
    after = jax.vmap(train)(clients, before)
    upload = jax.vmap(method.upload, in_axes=(0, None, 0, 0, 0))
    payload, memory = upload(keys[:-1], server, before, after, clients)
    combined = method.combine([payload], [clients.weight])
    new = method.update(keys[-1], server._replace(announced=()), combined)
    return Sent(clients, before, after, payload, memory, combined, new)


def rounds(method: Method, count: int, **options: Any) -> list[Sent]:
    """So many rounds one after the other."""
    server, memory, found = start(method), None, []
    for _ in range(count):
        found.append(one_round(method, server, memory, **options))
        server, memory = found[-1].server, found[-1].memory
    return found


def end(sent: Sent) -> dict[str, np.ndarray]:
    """All that a server is worth, by name."""
    kept = jax.tree_util.tree_leaves_with_path((sent.server.weights, sent.server.base_delta))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in kept}


def everything(server: Server) -> dict[str, Rows]:
    """A mass of 1 everywhere."""
    return {m: Rows(*(jnp.ones(x.shape[:-1]) for x in pair)) for m, pair in server.weights.adapter.items()}
