"""LoRA factors as plain pytrees: initialise, apply, multiply out, scale and count them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fslora_jax.types import Adapter, Pair


class Target(NamedTuple):
    """One linear module that exists in every layer: features in and out, and the number of layers."""

    i: int
    o: int
    layers: int


def init_adapter(key: Key[Array, ""], targets: Mapping[str, Target], ranks: Mapping[str, int]) -> Adapter:
    """Factors of each module's rank: A Kaiming-uniform with a = sqrt(5), so U(-1/sqrt(i), 1/sqrt(i)); B zero.

    >>> pair = init_adapter(jax.random.key(0), {"q": Target(4, 6, 2)}, {"q": 3})["q"]
    >>> pair.a.shape, pair.b.shape
    ((2, 3, 4), (2, 3, 6))
    """
    keys = jax.random.split(key, len(targets))
    return {
        name: Pair(
            a=jax.random.uniform(k, (t.layers, ranks[name], t.i), minval=-1, maxval=1) / math.sqrt(t.i),
            b=jnp.zeros((t.layers, ranks[name], t.o)),
        )
        for k, (name, t) in zip(keys, targets.items(), strict=True)
    }


def lora_scale(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA (arXiv 2312.03732).

    >>> lora_scale(64, 16, use_rslora=True)
    2.0
    """
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def delta(pair: Pair, scale: Float[Array, " k"], x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
    """One client's LoRA output in one layer, ``((x a^T) * scale) b``; contracts to rank k first."""
    return ((x @ pair.a.T) * scale.astype(x.dtype)) @ pair.b


def per_client(
    fn: Callable[..., Array], tiers: Sequence[Any], x: Float[Array, "C ..."]
) -> Float[Array, "C ..."]:
    """Applies a function of one client to each client's part of ``x``: ``vmap`` inside each tier.

    ``tiers`` are pytrees stacked over their own clients, in the order of ``x``; clients of one tier have
    equal shapes, tiers may differ in rank. What all clients share (the frozen base) sees ``x`` whole.

    >>> tiers = (jnp.ones((2, 1)), 2 * jnp.ones((1, 1)))
    >>> per_client(lambda w, row: w * row, tiers, jnp.ones((3, 1))).ravel().tolist()
    [1.0, 1.0, 2.0]
    """
    ends = []
    for tier in tiers:
        ends.append((ends[-1] if ends else 0) + jax.tree.leaves(tier)[0].shape[0])
    parts = jnp.split(x, ends[:-1])
    return jnp.concatenate([jax.vmap(fn)(tier, part) for tier, part in zip(tiers, parts, strict=True)])


def product(pair: Pair, scale: float = 1.0) -> Float[Array, "N o i"]:
    """``scale * B A`` of every layer, in the orientation of a weight ``(out, in)``."""
    return scale * jnp.einsum("...ro,...ri->...oi", pair.b, pair.a)


def rank_unit(targets: Mapping[str, Target]) -> int:
    """Values that one unit of rank costs: the sum of (in + out) over all adapted modules (``q_rank``).

    >>> rank_unit({"query": Target(768, 768, 12), "value": Target(768, 768, 12)})  # RoBERTa-base
    36864
    """
    return sum(t.layers * (t.i + t.o) for t in targets.values())


def width(modules: Mapping[str, Target]) -> float:
    """The width d of an encoder whose layers, of 12 d^2 values, are as large as those with these linear modules.

    >>> width({"up": Target(8, 48, 2), "down": Target(48, 8, 2)})
    8.0
    """
    return math.sqrt(sum(t.i * t.o for t in modules.values()) / 12)
