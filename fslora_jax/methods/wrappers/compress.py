"""Fewer bits up: the largest values alone, with error feedback, and quantised (arXiv 1809.07599, 1610.02132)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.errors import UserError
from fslora_jax.methods.base import Client, Method, Payload, Server
from fslora_jax.methods.spec import Spec, Traffic
from fslora_jax.methods.wrappers.uploads import bytes_beside, count_of, held_from, put_back, sent
from fslora_jax.settings import Ratio
from fslora_jax.types import Local, Trainable

NAME = "compress"
PURPOSE = 2

Bits = Literal[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 32]


def compress(
    method: Method,
    spec: Spec,
    *,
    ratio: Ratio = 0.1,
    bits: Bits = 8,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    error_feedback: bool | None = None,
) -> Method:
    """A client sends the ``ratio`` largest of its values, in ``bits`` bits each; 1.0 and 32 are the method itself.

    What changed is coded, also where a method sends factors. Values are multiples of ``scale / (2^(bits-1) - 1)``,
    with the largest magnitude of a tensor (the head counts as one) as its scale; ``stochastic`` rounding has the
    right mean. ``error_feedback``: what was not sent waits in the client's memory, in its place in the global
    adapter, and joins the next upload that holds the component; by default wherever components keep their meaning
    from round to round. ``traffic`` counts values, scales of 32 bits (one for each factor of each module, moved or
    not) and, below ratio 1, which values they are: their numbers or one bit for each, whichever is shorter.

    Raises:
      UserError: error feedback for a method whose components do not last.
    """
    traits = method.traits
    lasts = traits.linear and not traits.moves_base and not traits.sends_values
    if error_feedback and not lasts:
        raise UserError(
            "federation.wrappers.compress.error_feedback: found true, but components of this method do not mean the "
            "same from round to round; set false"
        )
    if ratio == 1 and bits == 32:
        return method
    remember = lasts if error_feedback is None else error_feedback

    def first_memory(server: Server) -> PyTree:
        inner = {} if method.first_memory is None else method.first_memory(server)
        return inner | {NAME: jax.tree.map(jnp.zeros_like, server.weights)}

    def upload(
        key: Key[Array, ""], server: Server, before: Local, after: Local, client: Client
    ) -> tuple[Payload, PyTree]:
        payload, memory = method.upload(key, server, before, after, client)
        mask = sent(spec, traits, payload)
        known = jax.tree.map(jnp.zeros_like, payload.delta)
        if traits.sends_values:
            known = known._replace(adapter=before.weights.adapter)
        wanted = jax.tree.map(lambda x, k: x - k, payload.delta, known)
        waiting = client.memory[NAME] if remember else server.weights
        if remember:
            wanted = jax.tree.map(jnp.add, wanted, held_from(payload, waiting))
        coded = largest(wanted, mask, ratio) if ratio < 1 else wanted
        if bits < 32:
            coded = quantised(jax.random.fold_in(key, PURPOSE), coded, mask, bits, rounding)
        delta = jax.tree.map(lambda k, c, m, x: jnp.where(m > 0, k + c, x), known, coded, mask, payload.delta)
        if remember:
            left = put_back(payload, jax.tree.map(jnp.subtract, wanted, coded), mask, waiting)
            lost = client.weight == 0  # an upload that nobody got
            kept = jax.tree.map(lambda new, old: jnp.where(lost, old, new), left, waiting)
            memory = memory | {NAME: kept}
        return payload._replace(delta=delta), memory

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        down, up = method.traffic(round, clients, head_values)
        beside = bytes_beside(spec, traits, clients.k)
        tensors = 2 * len(spec.targets) + (head_values > 0 and "head" not in traits.personal)
        return Traffic(down, beside + coded_bytes((up - beside) // 4, tensors, ratio, bits))

    return method._replace(
        upload=upload,
        traffic=sizes,
        first_memory=first_memory if remember else method.first_memory,
        traits=traits._replace(remembers=traits.remembers or remember, wrapped=(*traits.wrapped, NAME)),
    )


def coded_bytes(values: Any, tensors: int, ratio: float, bits: int) -> Any:
    """Bytes of the largest ``ratio`` of so many values, rounded up to whole bytes.

    >>> int(coded_bytes(1000, tensors=2, ratio=0.01, bits=8))  # 10 values of 8 bits, their numbers of 10, 2 scales
    31
    """
    count = np.ceil(np.float32(ratio) * np.float32(values)).astype(np.int64)
    which = np.minimum(count * np.ceil(np.log2(np.maximum(values, 2))).astype(np.int64), values)
    total = count * bits + (which if ratio < 1 else 0) + (32 * tensors if bits < 32 else 0)
    return -(-total // 8)


def largest(values: Trainable, mask: Trainable, ratio: float) -> Trainable:
    """The ``ceil(ratio n)`` largest of the n values that a mask lets through, all tensors together; 0 elsewhere."""
    flat, restore = ravel_pytree(values)
    through, _ = ravel_pytree(jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape), values, mask))
    count = jnp.ceil(jnp.float32(ratio) * count_of(values, mask))
    order = jnp.argsort(jnp.where(through > 0, -jnp.abs(flat), jnp.inf))
    chosen = jnp.zeros(flat.size, bool).at[order].set(jnp.arange(flat.size) < count)
    return restore(jnp.where(chosen, flat, 0.0))


def quantised(key: Key[Array, ""], values: Trainable, mask: Trainable, bits: int, rounding: str) -> Trainable:
    """Every value as a whole multiple of its tensor's scale over ``2^(bits-1) - 1``."""
    steps = 2 ** (bits - 1) - 1
    tops = jax.tree.map(lambda x, m: jnp.max(jnp.abs(x) * m, initial=0.0), values, mask)
    if heads := jax.tree.leaves(tops.head):
        tops = tops._replace(head=jax.tree.map(lambda _: jnp.stack(heads).max(), tops.head))

    def one(key: Key[Array, ""], x: Float[Array, "..."], top: Float[Array, ""]) -> Float[Array, "..."]:
        unit = jnp.where(top > 0, top / steps, 1.0)
        shift = jax.random.uniform(key, x.shape) if rounding == "stochastic" else 0.5
        return unit * jnp.clip(jnp.floor(x / unit + shift), -steps, steps)

    leaves, tree = jax.tree.flatten(values)
    keys = jax.random.split(key, max(len(leaves), 1))
    coded = [one(*parts) for parts in zip(keys, leaves, jax.tree.leaves(tops), strict=False)]
    return jax.tree.unflatten(tree, coded)
