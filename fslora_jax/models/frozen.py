"""A model whose head is not trained."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fslora_jax.models.model import Model
from fslora_jax.types import Head, Local

HEAD = "head"
"""Where a frozen head lies in the base."""


def freeze_head(model: Model) -> Model:
    """The model with its head at ``base["head"]``: shared by all clients, neither trained nor sent.

    What clients hold then has an empty head, so that optimisers, payloads and traffic need not know of it.
    """

    def held(answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(base: dict[str, Any], tiers: Sequence[Local], *rest: Any, **options: Any) -> Any:
            return answer(base, [_with_head(tier, base[HEAD]) for tier in tiers], *rest, **options)

        return call

    def init_base(key: jax.Array) -> dict[str, Any]:
        base_key, head_key = jax.random.split(key)
        return model.init_base(base_key) | {HEAD: model.init_head(head_key)}

    return model._replace(
        apply=held(model.apply), score=held(model.score), init_base=init_base, init_head=lambda _key: {}
    )


def _with_head(tier: Local, head: Head) -> Local:
    clients = jax.tree.leaves(tier.scale)[0].shape[0]
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), head)
    return tier._replace(weights=tier.weights._replace(head=own))
