"""The pieces that methods are put together from."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fslora_jax.lora import init_adapter
from fslora_jax.methods.base import Client, Combined, Method, Payload, Server, Traits
from fslora_jax.methods.spec import Spec, Traffic, factor_values, traffic
from fslora_jax.sketch import gather, scatter_sum
from fslora_jax.types import Head, Local, Pair, Rows, Trainable

EXACT = jax.lax.Precision.HIGHEST


# --- What a client is given ------------------------------------------------------------------------------------------


def hold(spec: Spec, weights: Trainable, index: Mapping[str, Array], gain: Mapping[str, Array]) -> Local:
    """What a client holds that was given the components ``index`` with forward gains ``gain``; gain 0 stays still."""
    scales = spec.scales()
    moves = {m: (g > 0).astype(jnp.float32) for m, g in gain.items()}
    return Local(
        weights=Trainable({m: gather(pair, index[m]) for m, pair in weights.adapter.items()}, weights.head),
        scale={m: scales[m] * g for m, g in gain.items()},
        trains={m: Rows(moves[m], moves[m]) for m in gain},
        index=dict(index),
    )


def hold_first(spec: Spec, weights: Trainable, k: Int[Array, ""] | int, cap: int) -> Local:
    """The first ``k`` components of each module with gain 1, in ``cap`` places."""
    index, gain = {}, {}
    ks, caps = spec.ranks(k), spec.ranks(cap)
    for m, target in spec.targets.items():
        places, shape = jnp.arange(caps[m], dtype=jnp.int32), (target.layers, caps[m])
        index[m] = jnp.broadcast_to(places, shape)
        gain[m] = jnp.broadcast_to(jnp.where(places < ks[m], 1.0, 0.0), shape)
    return hold(spec, weights, index, gain)


def whole(spec: Spec, weights: Trainable) -> Local:
    """The global adapter with ``S = I``: what is evaluated, and what a client of plain LoRA holds."""
    return hold_first(spec, weights, spec.r, spec.r)


def only(local: Local, a: Mapping[str, Array] | float = 1.0, b: Mapping[str, Array] | float = 1.0) -> Local:
    """The same with fewer moving rows: times a number, or times the rows of each module, for each factor."""

    def of(factor: Mapping[str, Array] | float, m: str) -> Array | float:
        return factor[m] if isinstance(factor, Mapping) else factor

    trains = {m: Rows(rows.a * of(a, m), rows.b * of(b, m)) for m, rows in local.trains.items()}
    return local._replace(trains=trains)


# --- What a client sends ---------------------------------------------------------------------------------------------


def change(before: Local, after: Local) -> Payload:
    """The change of what the client held: exactly its components, never the whole adapter."""
    delta = jax.tree.map(jnp.subtract, after.weights, before.weights)
    return Payload(delta, before.index, before.trains)


def value(before: Local, after: Local) -> Payload:
    """The factors that the client holds afterwards, zero where it could not train them, and the change of its head."""
    sent = change(before, after)
    adapter = {
        m: Pair(
            *(jnp.where(rows[..., None] > 0, x, 0.0) for x, rows in zip(pair, before.trains[m], strict=True))
        )
        for m, pair in after.weights.adapter.items()
    }
    return sent._replace(delta=sent.delta._replace(adapter=adapter))


def sends(payload_of: Callable[[Local, Local], Payload]) -> Callable[..., tuple[Payload, PyTree]]:
    """An ``upload`` that leaves the client's memory as it is."""

    def upload(key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client):
        del key, server
        return payload_of(before, after), client.memory

    return upload


# --- Where clients meet ----------------------------------------------------------------------------------------------


def weighted_sum(
    ranks: Mapping[str, int], payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]
) -> Combined:
    """``sum_i w_i scatter(x_i)`` over the tiers at hand, and the mass ``sum_i w_i`` of those that trained each row."""

    def of_tier(payload: Payload, weight: Float[Array, " C"]) -> Combined:
        adapter = {
            m: Pair(*(scatter_sum(x, payload.index[m], weight, ranks[m]) for x in pair))
            for m, pair in payload.delta.adapter.items()
        }
        head = jax.tree.map(lambda x: jnp.einsum("c,c...->...", weight, x), payload.delta.head)
        mass = {
            m: Rows(*(scatter_sum(x[..., None], payload.index[m], weight, ranks[m])[..., 0] for x in rows))
            for m, rows in payload.trains.items()
        }
        return Combined(Trainable(adapter, head), mass)

    return reduce(merge, [of_tier(p, w) for p, w in zip(payloads, weights, strict=True)])


def merge(one: Combined, other: Combined) -> Combined:
    """What two groups of clients give together: sums, and maxima of ``peak``."""
    added = jax.tree.map(jnp.add, one._replace(peak={}), other._replace(peak={}))
    return added._replace(peak=jax.tree.map(jnp.maximum, one.peak, other.peak))


PRODUCTS = "products"
"""The name of the ideal average among a cohort's sums."""


def with_products(spec: Spec) -> Callable[..., Combined]:
    """A ``combine`` that sums the clients' factors and also their products."""

    def combine(payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]) -> Combined:
        return weighted_sum(spec.ranks(), payloads, weights)._replace(
            extra={PRODUCTS: weighted_products(spec, payloads, weights)}
        )

    return combine


def weighted_products(
    spec: Spec, payloads: Sequence[Payload], weights: Sequence[Float[Array, " C"]]
) -> dict[str, Float[Array, "N i o"]]:
    """``sum_i w_i s B_i A_i`` of uploaded factors, in the orientation of a kernel: the ideal average.

    It is a sum over clients as any other, so it needs no stack of their factors; it is dense, one kernel's size.
    """

    def of_tier(payload: Payload, weight: Float[Array, " C"]) -> dict[str, Array]:
        return {
            m: spec.scales()[m] * jnp.einsum("c,cnki,cnko->nio", weight, *pair, precision=EXACT)
            for m, pair in payload.delta.adapter.items()
        }

    tiers = [of_tier(p, w) for p, w in zip(payloads, weights, strict=True)]
    return reduce(lambda x, y: jax.tree.map(jnp.add, x, y), tiers)


def kernel_of(pair: Pair, scale: float | Float[Array, "N k"] = 1.0) -> Float[Array, "N i o"]:
    """``scale B A`` of every layer, in the orientation of a kernel; a scale for each component, or one for all."""
    scaled = pair.a * jnp.asarray(scale)[..., None]
    return jnp.einsum("nki,nko->nio", scaled, pair.b, precision=EXACT)


# --- What the server makes of it -------------------------------------------------------------------------------------


def take_step(
    optimizer: optax.GradientTransformation, server: Server, delta: Trainable, mass: Mapping[str, Rows]
) -> Server:
    """One step of the server optimiser on a change, taken as a negative gradient (arXiv 2003.00295).

    ``optax.sgd(1.0)`` is plain averaging. For a component that nobody trained in this round there was none: it stays
    bit-identical, whatever momentum or decay the server optimiser has, and so do its moments. Of a round in which
    nobody trained anything nothing is left at all, neither in the head nor in the optimiser's count of steps.
    """

    def kept(new: PyTree, old: PyTree) -> PyTree:
        if isinstance(new, Trainable):
            return where_trained(mass, new, old)
        return jnp.where(anything_trained(mass), new, old)

    gradient = jax.tree.map(jnp.negative, delta)
    updates, opt_state = optimizer.update(gradient, server.opt_state, server.weights)
    moved = jax.tree.map(jnp.add, server.weights, updates)
    return server._replace(
        weights=where_trained(mass, moved, server.weights),
        # The moments of an optax state are trees like the weights.
        opt_state=jax.tree.map(kept, opt_state, server.opt_state, is_leaf=lambda x: isinstance(x, Trainable)),
        round=server.round + 1,
    )


def where_trained(mass: Mapping[str, Rows], new: Trainable, old: Trainable) -> Trainable:
    """``new`` in the components that somebody trained, and in the head if anybody did; ``old`` elsewhere."""
    anything = anything_trained(mass)

    def chosen(rows: Float[Array, "N r"], new: Array, old: Array) -> Array:
        if new.shape[:2] != rows.shape:  # not kept by component, such as Adafactor's means over them
            return jnp.where(anything, new, old)
        return jnp.where(rows.reshape(*rows.shape, *[1] * (new.ndim - 2)) > 0, new, old)

    adapter = {
        m: Pair(
            *(
                jax.tree.map(partial(chosen, rows), *parts)
                for rows, *parts in zip(mass[m], pair, old.adapter[m], strict=True)
            )
        )
        for m, pair in new.adapter.items()
    }
    head = jax.tree.map(partial(jnp.where, anything), new.head, old.head)
    return Trainable(adapter, head)


def anything_trained(mass: Mapping[str, Rows]) -> Bool[Array, ""]:
    """Whether anybody trained any component."""
    return jnp.array([x.sum() for x in jax.tree.leaves(mass)]).sum() > 0


def per_contributor(combined: Combined) -> Trainable:
    """The sums of the factors over those that trained each component, as means; 0 where nobody did."""
    adapter = {
        m: Pair(
            *(
                jnp.where(rows > 0, 1 / jnp.where(rows > 0, rows, 1.0), 0.0)[..., None] * x
                for x, rows in zip(pair, combined.mass[m], strict=True)
            )
        )
        for m, pair in combined.delta.adapter.items()
    }
    return combined.delta._replace(adapter=adapter)


def settle(server: Server, adapter: Mapping[str, Pair], combined: Combined) -> Server:
    """New factors as they are, where somebody trained anything at all, and the head's average."""
    anything = anything_trained(combined.mass)
    kept = jax.tree.map(partial(jnp.where, anything), dict(adapter), server.weights.adapter)
    head = jax.tree.map(jnp.add, server.weights.head, combined.delta.head)
    return server._replace(weights=Trainable(kept, head), round=server.round + 1)


def blank_kernels(spec: Spec) -> dict[str, Float[Array, "N i o"]]:
    """Nothing yet, to be added to the frozen kernels."""
    return {m: jnp.zeros((t.layers, t.i, t.o)) for m, t in spec.targets.items()}


def factorised(kernel: Float[Array, "N i o"], r: int, scale: float) -> Pair:
    """The ``r`` largest singular components of a kernel, as factors at ``scale``: A orthonormal, B with the values.

    Components beyond the kernel's smaller side are zero.
    """
    u, sizes, vt = jnp.linalg.svd(kernel, full_matrices=False)
    pair = Pair(jnp.swapaxes(u, -1, -2), sizes[..., None] * vt / scale)
    missing = max(r - sizes.shape[-1], 0)
    return Pair(*(jnp.pad(x[..., :r, :], ((0, 0), (0, missing), (0, 0))) for x in pair))


# --- FedAvg, which most methods change in one place or two -----------------------------------------------------------


def prefix(spec: Spec) -> Callable[..., Local]:
    """A ``download`` of the first k components."""

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del key
        return hold_first(spec, server.weights, client.k, cap)

    return download


def prefix_traffic(spec: Spec) -> Callable[..., Traffic]:
    """What the first k components of every module take, each way; no indices."""

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        each = 4 * (factor_values(spec, clients.k) + head_values)
        return Traffic(each, each)

    return sizes


def fedavg_lora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedAvg of LoRA factors and head: everybody gets, trains and sends everything."""

    def init(key: Key[Array, ""], head: Head) -> Server:
        weights = Trainable(init_adapter(key, spec.targets, spec.ranks()), head)
        return Server(weights, server_optimizer.init(weights), jnp.int32(0))

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        del key, client, cap
        return whole(spec, server.weights)

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        return take_step(server_optimizer, server, combined.delta, combined.mass)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        return traffic(spec, clients.k, head_values)

    return Method(
        init=init,
        download=download,
        upload=sends(change),
        combine=lambda payloads, weights: weighted_sum(spec.ranks(), payloads, weights),
        update=update,
        traffic=sizes,
        traits=Traits(full_rank=True),
    )
