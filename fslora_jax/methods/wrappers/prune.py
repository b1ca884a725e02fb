"""Adaptive pruning over wireless links: weak links send fewer components (arXiv 2309.01816)."""

import math
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from pydantic import Field

from fslora_jax.errors import UserError
from fslora_jax.methods.base import Client, Combined, Method, Server
from fslora_jax.methods.parts import only, per_contributor
from fslora_jax.methods.spec import Spec, Traffic
from fslora_jax.methods.wrappers.uploads import personal_rows
from fslora_jax.settings import Positive
from fslora_jax.types import Local

NAME = "prune"


def prune(
    method: Method,
    spec: Spec,
    *,
    deadline: Positive = 60.0,
    bandwidth: Positive = 1e6,
    efficiency: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 2.0, 4.0),
    compute_seconds: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,),
) -> Method:
    """A client trains and sends the most important of its shared components, as many as its link carries in time.

    ``efficiency`` (bit/s/Hz) and ``compute_seconds`` (of all local steps with all components) are dealt to the
    clients in turn, ``bandwidth`` (Hz) is that of a client on average, and `split_bandwidth` gives each kind its part
    of it and the ratio that it prunes, such that computing and sending take at most ``deadline`` seconds; the
    weakest may be left with nothing but the head. Components are ranked by ``|b_j| |a_j|`` in the server's adapter, so
    nothing need be said of which they are; the others rest in that round, out of the forward pass. Each is averaged
    over those that sent it. Personal parts and the head are not pruned, and the head's time is not counted.

    Raises:
      UserError: nobody could send even one component.
    """
    kinds = math.lcm(len(efficiency), len(compute_seconds))
    rates, compute = (np.resize(np.array(x, float), kinds) for x in (efficiency, compute_seconds))
    one = Client(jnp.zeros(1, int), jnp.full(1, spec.r), jnp.ones(1))
    bits = 8 * max(float(np.sum(method.traffic(t, one, 0).up)) for t in (0, 1))  # factors may take turns
    plan = split_bandwidth(compute, bits / rates, deadline, bandwidth * kinds)
    counts = np.floor((1 - plan.rho) * spec.r + 1e-9).astype(int)
    if bits and not counts.any():
        raise UserError(
            f"federation.wrappers.prune: with deadline {deadline:g} s and bandwidth {bandwidth:g} Hz no client can "
            f"compute and send even one of {spec.r} components ({bits / spec.r:g} bits each); raise them"
        )
    own = personal_rows(spec, method.traits.personal, method.traits.personal_layers)

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        given = method.download(key, server, client, cap)
        count = jnp.asarray(counts)[client.id % kinds]
        ks, keep = spec.ranks(count), {}
        for m, pair in server.weights.adapter.items():
            strength = jnp.linalg.norm(pair.a, axis=-1) * jnp.linalg.norm(pair.b, axis=-1)
            found = jnp.take_along_axis(strength, given.index[m], axis=-1)
            place = jnp.argsort(jnp.argsort(-found, axis=-1), axis=-1)
            keep[m] = ((place < ks[m]) & (count > 0)).astype(jnp.float32)
        moves = [{m: jnp.where(own[m][f] > 0, 1.0, keep[m]) for m in keep} for f in (0, 1)]
        scale = {m: s * keep[m] for m, s in given.scale.items()}
        return only(given, *moves)._replace(scale=scale)

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        return method.update(key, server, combined._replace(delta=per_contributor(combined)))

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        count = counts[clients.id % kinds]
        down, up = method.traffic(round, clients, head_values)
        head = up - method.traffic(round, clients, 0).up
        kept = method.traffic(round, clients._replace(k=count), 0).up
        return Traffic(down, np.where(count > 0, kept, 0) + head)

    return method._replace(
        download=download,
        update=update,
        traffic=sizes,
        traits=method.traits._replace(wrapped=(*method.traits.wrapped, NAME)),
    )


class Split(NamedTuple):
    """Of each client the part of its components that it prunes, and its bandwidth in Hz."""

    rho: Float[np.ndarray, " clients"]
    bandwidth: Float[np.ndarray, " clients"]


def split_bandwidth(
    compute: Float[np.ndarray, " clients"],
    load: Float[np.ndarray, " clients"],
    deadline: float,
    bandwidth: float,
) -> Split:
    """The split of a bandwidth with the least sum of pruned parts under ``(1 - rho) (a + c / b) <= deadline``.

    ``compute`` are the seconds a, ``load`` the bits over the spectral efficiency, c, both for all components. By the
    KKT conditions ``b = clip((sqrt(tau c / mu) - c) / a, 0, what makes rho 0)``, with mu such that the sum is the
    bandwidth, found by bisection.

    >>> split_bandwidth(np.ones(2), np.array([8.0, 8.0]), deadline=3.0, bandwidth=4.0).rho.round(2).tolist()
    [0.4, 0.4]
    """
    spare = deadline - compute
    enough = np.where(spare > 0, load / np.where(spare > 0, spare, 1.0), np.inf)

    def given(mu: float) -> Float[np.ndarray, " clients"]:
        return np.clip((np.sqrt(deadline * load / mu) - load) / compute, 0.0, enough)

    shares = enough
    if enough.sum() > bandwidth:
        low, high = -200.0, 200.0  # of log mu; the sum falls with it
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if given(np.exp(middle)).sum() > bandwidth else (low, middle)
        shares = given(np.exp(high))
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = compute + np.where(load > 0, load / shares, 0.0)
    return Split(np.maximum(0.0, 1 - deadline / seconds), shares)
