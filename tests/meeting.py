"""One server step of any method: clients hold random factors, nothing trains."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fslora_jax.lora import Target
from fslora_jax.methods import METHODS, Client, Combined, Method, Server, Spec
from fslora_jax.methods.parts import kernel_of
from fslora_jax.types import Local, Pair, Trainable

LAYERS, R = 2, 3
SPEC = Spec({"q": Target(9, 8, LAYERS), "v": Target(7, 10, LAYERS)}, R, scale=0.5, scale_pattern={"v": 0.8})
EXACT = ["ffa_lora", "rolora", "flora", "fedex_lora", "fed_sb", "rac_lora", "xgblora"]
SHARES = (0.2, 0.5, 0.3)
FULL, MIXED = (R, R, R), (1, 3, 2)


def make(name: str, spec: Spec = SPEC, **options) -> Method:
    return METHODS[name].make(spec, optax.sgd(1.0), **options)


def begin(method: Method, spec: Spec = SPEC) -> Server:
    """A server whose factors are all random, unless the method fixes them."""
    server = method.init(jax.random.key(0), {})
    rng = np.random.default_rng(0)
    if method.forward is not None or method.traits.moves_base:
        return server
    adapter = {
        m: Pair(*(jnp.float32(rng.normal(size=x.shape)) for x in pair))
        for m, pair in server.weights.adapter.items()
    }
    return server._replace(weights=Trainable(adapter, {}))


class Met(NamedTuple):
    """A server step: what the clients held at last, the ideal average of their products, the server afterwards."""

    held: list[Local]
    ideal: dict[str, np.ndarray]
    combined: Combined
    after: Server


def meet(
    method: Method,
    server: Server,
    ks: Sequence[int] = FULL,
    *,
    shares: Sequence[float] = SHARES,
    noise=1.0,
    seed=1,
) -> Met:
    """One server step after clients that moved what they may by random amounts."""
    rng, held, payloads = np.random.default_rng(seed), [], []
    clients = [Client(*map(jnp.asarray, (i, k, w))) for i, (k, w) in enumerate(zip(ks, shares, strict=True))]
    if method.announce is not None:
        said = [jax.tree.map(lambda x, w=c.weight: w * x, method.announce(c)) for c in clients]
        server = server._replace(announced=jax.tree.map(lambda *xs: sum(xs), *said))
    for client, k in zip(clients, ks, strict=True):
        if method.first_memory is not None:
            client = client._replace(memory=method.first_memory(server))
        before = method.download(
            jax.random.key(int(client.id)), server, client, R if method.traits.holds_all else k
        )
        after = moved(before, rng, noise)
        payload, _ = method.upload(jax.random.key(0), server, before, after, client)
        payloads.append(jax.tree.map(lambda x: x[None], payload))
        held.append(after if method.forward is None else method.forward(server, after))
    combined = method.combine(payloads, [jnp.array([w]) for w in shares])
    ideal = {
        m: sum(
            w * np.asarray(kernel_of(h.weights.adapter[m], h.scale[m]), np.float64)
            for w, h in zip(shares, held, strict=True)
        )
        for m in SPEC.targets
    }
    after = method.update(jax.random.key(7), server._replace(announced=()), combined)
    return Met(held, ideal, combined, after)


def moved(before: Local, rng: np.random.Generator, noise: float) -> Local:
    adapter = {
        m: Pair(
            *(
                x + noise * jnp.float32(rng.normal(size=x.shape)) * rows[..., None]
                for x, rows in zip(pair, before.trains[m], strict=True)
            )
        )
        for m, pair in before.weights.adapter.items()
    }
    return before._replace(weights=Trainable(adapter, {}))


def total(method: Method, server: Server) -> dict[str, np.ndarray]:
    """What the method has put on the frozen kernels."""
    adapter, scales = method.adapter(server).adapter, SPEC.scales()
    return {
        m: np.asarray(kernel_of(pair, scales[m]), np.float64) + np.asarray(server.base_delta.get(m, 0.0))
        for m, pair in adapter.items()
    }


def error(method: Method, met: Met) -> dict[str, np.ndarray]:
    """By how much the server's step misses the ideal average."""
    done = total(method, met.after)
    return {m: met.ideal[m] - done[m] for m in done}


def means(met: Met, m: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        sum(
            w * np.asarray(h.weights.adapter[m][f], np.float64) for w, h in zip(SHARES, met.held, strict=True)
        )
        for f in (0, 1)
    )
