"""What of a client's upload travels, and where its values live: shared by the wrappers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fslora_jax.methods.base import Payload, Traits
from fslora_jax.methods.spec import Spec, drawn_indices
from fslora_jax.sketch import gather
from fslora_jax.types import Pair, Rows, Trainable


def personal_rows(spec: Spec, parts: Sequence[str], top_layers: int) -> dict[str, Rows]:
    """1 in the layers of each factor that are personal, ``(N, 1)``."""
    rows = {}
    for m, t in spec.targets.items():
        top = (jnp.arange(t.layers) >= t.layers - top_layers).astype(jnp.float32)[:, None]
        rows[m] = Rows(*(jnp.ones_like(top) if factor in parts else top for factor in "ab"))
    return rows


def shared(spec: Spec, traits: Traits, rows: dict[str, Rows], like: Trainable) -> Trainable:
    """``rows`` of components, ``(..., 1)`` beside the factors ``like``, and 1 for the head; 0 on what is personal."""
    own = personal_rows(spec, traits.personal, traits.personal_layers)
    adapter = {
        m: Pair(*(jnp.where(mine > 0, 0.0, x)[..., None] for x, mine in zip(rows[m], own[m], strict=True)))
        for m in like.adapter
    }
    return Trainable(adapter, jax.tree.map(lambda _: jnp.float32("head" not in traits.personal), like.head))


def sent(spec: Spec, traits: Traits, payload: Payload) -> Trainable:
    """1 beside what one client really sends: what it trained, without what is personal."""
    return shared(spec, traits, payload.trains, payload.delta)


def bytes_beside(spec: Spec, traits: Traits, k: Any) -> Any:
    """Bytes up that are no values of adapter or head: which components were drawn, further numbers."""
    return 4 * (drawn_indices(spec, k) * traits.sends_indices + traits.sends_numbers)


def count_of(values: Trainable, mask: Trainable) -> Float[Array, ""]:
    """How many values a mask lets through."""
    each = jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape).sum(), values, mask)
    return jnp.float32(0) + sum(jax.tree.leaves(each))


def held_from(payload: Payload, source: Trainable) -> Trainable:
    """The components of a payload, and the head, out of something in the shape of the global weights."""
    return Trainable(
        {m: gather(source.adapter[m], payload.index[m]) for m in payload.delta.adapter}, source.head
    )


def put_back(payload: Payload, values: Trainable, mask: Trainable, into: Trainable) -> Trainable:
    """``into`` with a payload's components, and the head, replaced by ``values`` where ``mask`` is 1."""

    def placed(old: Array, new: Array, rows: Array, index: Array) -> Array:
        layers = jnp.arange(index.shape[0])[:, None]
        return old.at[layers, index].set(jnp.where(rows > 0, new, old[layers, index]))

    adapter = {
        m: Pair(
            *(
                placed(*parts, payload.index[m])
                for parts in zip(into.adapter[m], values.adapter[m], mask.adapter[m], strict=True)
            )
        )
        for m in values.adapter
    }
    head = jax.tree.map(
        lambda new, rows, old: jnp.where(rows > 0, new, old), values.head, mask.head, into.head
    )
    return Trainable(adapter, head)
