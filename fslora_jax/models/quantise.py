"""Frozen linear modules in 8 or 4 bits: packed when they are loaded, restored layer by layer where they are used.

A packed kernel stands in the base's tree where the kernel stood, as a dict of arrays. It takes part in products as
what ``restore`` gives; nothing here is differentiated.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from fslora_jax.errors import UserError
from fslora_jax.models.model import Model

BLOCK = 64
"""Input features that share one scale in 4 bits."""

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 4-bit NormalFloat (arXiv 2305.14314, appendix E): quantiles of a normal distribution, 0 among them."""

Packed = dict[str, Array]


class Quantisation(NamedTuple):
    """A number format; what ``pack`` gives has the format's name as the key of its codes."""

    pack: Callable[[Float[Array, "*N i o"]], Packed]
    restore: Callable[[Packed], Float[Array, "*N i o"]]


def _pack_int8(kernel: Float[Array, "*N i o"]) -> Packed:
    """Whole numbers of -127 to 127, with one scale for each output feature."""
    scale = jnp.abs(kernel).max(-2) / 127
    codes = jnp.round(kernel / _nonzero(scale)[..., None, :])
    return {"int8": codes.astype(jnp.int8), "scale": scale}


def _restore_int8(packed: Packed) -> Float[Array, "*N i o"]:
    return packed["int8"] * packed["scale"][..., None, :]


def _pack_nf4(kernel: Float[Array, "*N i o"]) -> Packed:
    """The nearest of 16 levels, with one scale for each block; the codes of its two halves share bytes."""
    *layers, i, o = kernel.shape
    blocks = kernel.reshape(*layers, i // BLOCK, BLOCK, o)
    absmax = jnp.abs(blocks).max(-2)
    relative = blocks / _nonzero(absmax)[..., None, :]
    borders = [(low + high) / 2 for low, high in pairwise(LEVELS)]
    codes = sum((relative > border).astype(jnp.uint8) for border in borders)
    low, high = jnp.split(jnp.asarray(codes), 2, axis=-2)
    return {"nf4": (low | high << 4).reshape(*layers, i // 2, o), "absmax": absmax}


def _restore_nf4(packed: Packed) -> Float[Array, "*N i o"]:
    *blocks, o = packed["absmax"].shape
    halves = packed["nf4"].reshape(*blocks, BLOCK // 2, o)
    codes = jnp.concatenate([halves & 15, halves >> 4], axis=-2)
    values = _level(codes) * packed["absmax"][..., None, :]
    return values.reshape(*blocks[:-1], blocks[-1] * BLOCK, o)


def _level(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Selection by bits: XLA fuses it into what follows, and a gather of single values it does not."""
    values: list[Any] = [jnp.float32(level) for level in LEVELS]
    for bit in (1, 2, 4, 8):
        values = [_select(codes & bit > 0, *pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _select(on: Bool[Array, "*shape"], zero: Array, one: Array) -> Array:
    return jnp.where(on, one, zero)


def _nonzero(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(scale > 0, scale, 1.0)


QUANTISATIONS = {
    "int8": Quantisation(_pack_int8, _restore_int8),
    "nf4": Quantisation(_pack_nf4, _restore_nf4),
}


def restore(weights: PyTree, dtype: jnp.dtype) -> PyTree:
    """``weights`` with every packed kernel as its values in ``dtype``."""

    def plain(node: Any) -> Any:
        return _format(node).restore(node).astype(dtype) if is_packed(node) else node

    return jax.tree.map(plain, weights, is_leaf=is_packed)


def is_packed(node: Any) -> bool:
    """Whether a node of a base's tree is a packed kernel."""
    return isinstance(node, dict) and not node.keys().isdisjoint(QUANTISATIONS)


def shape_of(packed: Packed) -> tuple[int, ...]:
    """The shape of what was packed."""
    return jax.eval_shape(_format(packed).restore, packed).shape


def pack_like(packed: Packed) -> Callable[[Float[Array, "*N i o"]], Packed]:
    """What packs other kernels in the format of ``packed``."""
    return _format(packed).pack


def quantise(model: Model, name: str) -> Model:
    """The model with the linear modules of its layers in this format; everything else stays as it is.

    Raises:
      UserError: the format's blocks do not fit a module.
    """
    for path, target in model.modules.items():
        if name == "nf4" and target.i % BLOCK:
            raise UserError(
                f"model.quantization: found nf4, which packs {BLOCK} input features at a time, but {path} has "
                f"{target.i}; choose int8 or none"
            )
    return model._replace(init_base=partial(_init_packed, QUANTISATIONS[name].pack, model.init_base))


def _init_packed(
    pack: Callable[[Array], Packed], init: Callable[[Key[Array, ""]], dict[str, Any]], key: Key[Array, ""]
) -> dict[str, Any]:
    base = init(key)
    linear = {
        path: module | {"kernel": pack(module["kernel"].astype(jnp.float32))}
        for path, module in base["layers"]["linear"].items()
    }
    return base | {"layers": base["layers"] | {"linear": linear}}


def _format(packed: Packed) -> Quantisation:
    return next(QUANTISATIONS[name] for name in packed if name in QUANTISATIONS)
