"""What a federated method is, and the pieces that most methods share."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from fslora_jax.lora import init_adapter
from fslora_jax.methods.spec import Spec
from fslora_jax.sketch import gather, scatter_sum
from fslora_jax.types import Head, Local, Pair, Trainable


class Server(NamedTuple):
    """All that survives a round: global weights, the server optimiser's state, the number of rounds done."""

    weights: Trainable
    opt_state: PyTree
    round: Int[Array, ""]


class Client(NamedTuple):
    """One client as the round sees it: who, how many components it trains, its share of the average."""

    id: Int[Array, "*C"]
    k: Int[Array, "*C"]
    weight: Float[Array, "*C"]


class Payload(NamedTuple):
    """What a client sends: the change of the components it holds, where they live, the change of the head."""

    delta: Trainable
    index: dict[str, Int[Array, "*C N k"]]
    trains: dict[str, Float[Array, "*C N k"]]


class Combined(NamedTuple):
    """What the network hands to the server: the weighted sum, and by how many each component was trained."""

    delta: Trainable
    trained_by: dict[str, Float[Array, "N r"]]


class Method(NamedTuple):
    """A federated method as pure functions, as optax has gradient transformations.

    ``download`` and ``upload`` are written for one client. ``combine`` is the only place where clients
    meet: it sums over the clients at hand, and the round adds these sums over chunks and devices.
    """

    init: Callable[[Key[Array, ""], Head], Server]
    download: Callable[[Key[Array, ""], Server, Client, int], Local]
    upload: Callable[[Local, Local], Payload]
    combine: Callable[[Sequence[Payload], Sequence[Float[Array, " C"]]], Combined]
    update: Callable[[Server, Combined], Server]


def hold(spec: Spec, weights: Trainable, index: dict[str, Array], gain: dict[str, Array]) -> Local:
    """What a client holds that was given the components ``index`` with forward gains ``gain``."""
    scales = spec.scales()
    return Local(
        weights=Trainable({m: gather(pair, index[m]) for m, pair in weights.adapter.items()}, weights.head),
        scale={m: scales[m] * g for m, g in gain.items()},
        trains={m: (g > 0).astype(jnp.float32) for m, g in gain.items()},
        index=index,
    )


def whole(spec: Spec, weights: Trainable) -> Local:
    """The global adapter with ``S = I``: what is evaluated, and what a client of plain LoRA holds."""
    index, gain = {}, {}
    for m, r in spec.ranks().items():
        shape = (spec.targets[m].layers, r)
        index[m] = jnp.broadcast_to(jnp.arange(r, dtype=jnp.int32), shape)
        gain[m] = jnp.ones(shape)
    return hold(spec, weights, index, gain)


def upload_delta(before: Local, after: Local) -> Payload:
    """The change of what the client held: exactly its components, never the whole adapter."""
    return Payload(jax.tree.map(jnp.subtract, after.weights, before.weights), before.index, before.trains)


def weighted_sum(
    ranks: Mapping[str, int], payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]
) -> Combined:
    """``sum_i w_i scatter(delta_i)`` over the tiers at hand; weights sum to 1 over the whole cohort."""

    def of_tier(payload: Payload, weight: Float[Array, " C"]) -> Combined:
        adapter = {
            m: Pair(*(scatter_sum(x, payload.index[m], weight, ranks[m]) for x in pair))
            for m, pair in payload.delta.adapter.items()
        }
        head = jax.tree.map(lambda x: jnp.einsum("c,c...->...", weight, x), payload.delta.head)
        taken = (weight > 0).astype(jnp.float32)
        trained_by = {
            m: scatter_sum(trains[..., None], payload.index[m], taken, ranks[m])[..., 0]
            for m, trains in payload.trains.items()
        }
        return Combined(Trainable(adapter, head), trained_by)

    tiers = [of_tier(p, w) for p, w in zip(payloads, weights, strict=True)]
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *tiers)


def apply_server_optimizer(
    optimizer: optax.GradientTransformation, server: Server, combined: Combined
) -> Server:
    """One step of the server optimiser on the averaged change, taken as a negative gradient (arXiv 2003.00295).

    ``optax.sgd(1.0)`` is plain averaging. A component that nobody trained in this round stays bit-identical,
    whatever momentum or decay the server optimiser has.
    """
    gradient = jax.tree.map(jnp.negative, combined.delta)
    updates, opt_state = optimizer.update(gradient, server.opt_state, server.weights)
    moved = jax.tree.map(jnp.add, server.weights, updates)
    adapter = {
        m: Pair(
            *(
                jnp.where(combined.trained_by[m][..., None] > 0, new, old)
                for new, old in zip(moved.adapter[m], server.weights.adapter[m], strict=True)
            )
        )
        for m in moved.adapter
    }
    return Server(Trainable(adapter, moved.head), opt_state, server.round + 1)


def fedavg_lora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedAvg of LoRA factors and head: the parts that `fedit` and `fslora` share."""

    def init(key: Key[Array, ""], head: Head) -> Server:
        weights = Trainable(init_adapter(key, spec.targets, spec.ranks()), head)
        return Server(weights, server_optimizer.init(weights), jnp.int32(0))

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del key, client, cap  # everybody gets everything
        return whole(spec, server.weights)

    return Method(
        init=init,
        download=download,
        upload=upload_delta,
        combine=lambda payloads, weights: weighted_sum(spec.ranks(), payloads, weights),
        update=lambda server, combined: apply_server_optimizer(server_optimizer, server, combined),
    )
