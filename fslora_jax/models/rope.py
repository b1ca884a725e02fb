"""Rotary position embeddings (arXiv 2104.09864) and their scalings for long texts."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fslora_jax.errors import UserError
from fslora_jax.models.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"
"""What ``config.json`` calls the two kinds of layers."""


class Llama3(NamedTuple):
    """Llama 3.1's scaling: long waves are stretched, short ones stay, those between are blended."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


class Rope(NamedTuple):
    """The rotation's base; ``factor`` stretches all waves, or with ``llama3`` the long ones."""

    rope_theta: float
    factor: float = 1.0
    llama3: Llama3 | None = None


def read_rope(fields: Fields, *, theta: float = 10_000.0) -> Rope:
    """The rotation that ``config.json`` asks for, in today's form or the older one."""
    older = fields.read("rope_theta", float, theta)
    given = fields.child("rope_scaling") or fields.child("rope_parameters")
    fields.ignore("rope_scaling", "rope_parameters")
    return Rope(older) if given is None else read_parameters(given, older, fields)


def read_parameters(given: Fields, theta: float, fields: Fields) -> Rope:
    """One object of rotation parameters; ``theta`` where it has none."""
    kind = given.choose(
        "rope_type", ("default", "linear", "llama3"), given.optional("type", str) or "default"
    )
    given.require(partial_rotary_factor=1.0)
    rope = Rope(given.read("rope_theta", float, theta))
    if kind != "default":
        rope = rope._replace(factor=given.read("factor", float))
    if kind == "llama3":
        longest = fields.read("max_position_embeddings", int)
        rope = rope._replace(
            llama3=Llama3(
                given.read("low_freq_factor", float),
                given.read("high_freq_factor", float),
                given.read("original_max_position_embeddings", float, longest),
            )
        )
    given.finish()
    return rope


def read_two_ropes(fields: Fields, far: float, near: float) -> tuple[Rope, Rope] | None:
    """The rotations of full and of sliding layers, where ``rope_parameters`` has both.

    ``far`` and ``near`` are their bases where it does not say.
    """
    nested = fields.child("rope_parameters")
    if nested is None:
        return None
    given = nested.child(FULL), nested.child(SLIDING)
    nested.finish()
    fields.require(rope_scaling=None)
    if given[0] is None or given[1] is None:
        raise UserError(f"config.json: rope_parameters lacks {FULL} or {SLIDING}; take the file of the model")
    return read_parameters(given[0], far, fields), read_parameters(given[1], near, fields)


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of coordinates.

    >>> frequencies(Rope(100.0, factor=2.0), 4).tolist()
    [0.5, 0.05000000074505806]
    """
    plain = rope.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.llama3 is None:
        return (plain / rope.factor).astype(np.float32)
    low, high, original = rope.llama3
    turns = original * plain / (2 * math.pi)  # of this wave in the original context
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (plain * (blend + (1 - blend) / rope.factor)).astype(np.float32)


def rotations(
    positions: Int[Array, "*C B L"], frequency: Float[np.ndarray, " half"]
) -> Float[Array, "2 *C B L 1 half"]:
    """Cosine and sine of every position's angles, in float32."""
    angles = positions[..., None, None] * jnp.asarray(frequency)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def of_places(
    rotation: Float[Array, "2 C B L 1 half"], places: Int[Array, "C B T"] | None
) -> Float[Array, "2 C B T 1 half"]:
    """The rotations of some tokens of each row, by default all; for place -1 the first one's."""
    if places is None:
        return rotation
    return jnp.take_along_axis(rotation, jnp.maximum(places, 0)[None, ..., None, None], axis=3, mode="clip")


def rotate(
    x: Float[Array, "*C B L H d"], rotation: Float[Array, "2 *C B L 1 half"]
) -> Float[Array, "*C B L H d"]:
    """Turns coordinate n together with coordinate n + d/2; in float32."""
    cos, sin = rotation
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(x.dtype)
