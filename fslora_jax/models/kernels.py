"""Frozen kernels and products with them: their precision, and on a CPU how they lie in memory.

XLA's matrix product on a CPU packs a kernel anew in each pass. One that it must read transposed it packs value by
value, with 288 rows a third to two thirds of the product's own time. One whose rows begin a multiple of 2 KiB apart
it reads into a few sets of the first cache, which lose them before they are read again: products of 328 rows ran at
0.45 (RoBERTa-base's 768 x 3072) to 0.75 (MiniLM's 384 x 1536) of the rate that they have with a little room between.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from fslora_jax.models.quantise import is_packed
from fslora_jax.sharding import client_groups

TURNED = "turned"
"""In the layers of a base: the transposes of kernels, by the paths of their modules."""

ALIASED = 2048
"""Bytes between rows of which, and of whose multiples, a first cache of 64 sets has two places or one."""

ROOM = 32
"""Columns of zeros; 8 to 64 were as good, 128 were not."""

MOST_APART = 12
"""So many layers get arrays of their own, where ``model.remat`` is "none".

A loop over layers copies each one's kernels out of the stack, forward and backward, which takes a tenth of a round;
without it each layer takes most of a second to compile. And without it XLA merges what is to be computed anew with
what there is already, and keeps it, so rematerialisation needs the loop.
"""


def narrowed(base: dict[str, Any], products: str) -> dict[str, Any]:
    """The base with the kernels of its layers as ``model.products`` has them; packed kernels stay as they are."""
    if products == "same":
        return base
    layers = base["layers"]
    linear = {
        path: module
        if is_packed(module["kernel"])
        else module | {"kernel": module["kernel"].astype(products)}
        for path, module in layers["linear"].items()
    }
    return base | {"layers": layers | {"linear": linear}}


def laid_out(base: dict[str, Any], mesh: Mesh | None = None, remat: str = "frozen") -> dict[str, Any]:
    """The base with its kernels as a CPU multiplies by them fastest, and their transposes, as fast, beside them.

    Elsewhere, and of packed kernels, it stays as it is. Devices that share out a kernel keep no second one.
    Where ``remat`` (``model.remat``) is "none", up to ``MOST_APART`` layers come as a tuple, unstacked.
    """
    shared = mesh is not None and client_groups(mesh) < mesh.size
    if jax.default_backend() != "cpu" or shared:
        return base
    layers = base["layers"]
    plain = {path: m for path, m in layers["linear"].items() if not is_packed(m["kernel"])}
    roomy = {path: m | {"kernel": with_room(m["kernel"])} for path, m in plain.items()}
    turned = {path: with_room(jnp.swapaxes(m["kernel"], -1, -2)) for path, m in plain.items()}
    layers = layers | {"linear": layers["linear"] | roomy, TURNED: turned}
    if remat == "none" and jax.tree.leaves(layers)[0].shape[0] <= MOST_APART:
        layers = _apart(layers)
    return base | {"layers": layers}


@jax.jit
def _apart(layers: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda x, n=n: x[n], layers) for n in range(count))


def with_room(kernel: Float[Array, "*N i o"]) -> Float[Array, "*N i o+"]:
    """The kernel, with zeros behind its rows where in float32 they begin a multiple of ``ALIASED`` bytes apart."""
    if kernel.dtype != jnp.float32 or kernel.shape[-1] * kernel.itemsize % ALIASED:
        return kernel
    return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 1) + [(0, ROOM)])


@jax.custom_vjp
def frozen_product(
    x: Float[Array, "*B i"], kernel: Float[Array, "i o+"], turned: Float[Array, "o i+"]
) -> Float[Array, "*B o"]:
    """``x @ kernel``, whose gradient is a product with ``turned``, the kernel's transpose; both stay as they are.

    Both may be wider than the other is high, as by `with_room`. Factors are as precise as the kernel, sums and the
    result as ``x``.
    """
    return _product(x, kernel, turned.shape[0])


def _product(x: Array, kernel: Array, features: int) -> Array:
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=x.dtype)[..., :features]


def _forward(x: Array, kernel: Array, turned: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, turned.shape[0]), (kernel, turned)


def _backward(kernels: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    kernel, turned = kernels
    return _product(gradient, turned, kernel.shape[0]), None, None


frozen_product.defvjp(_forward, _backward)


@jax.custom_vjp
def frozen_logits(x: Float[Array, "*B i"], table: Float[Array, "i V"]) -> Float[Array, "*B V"]:
    """``x @ table`` in float32, for ``x`` as precise as the table; the gradient's factors are as precise as well.

    Autodiff would multiply a gradient in float32, for which a GPU has no fast product.
    """
    return jnp.matmul(x, table, preferred_element_type=jnp.float32)


def _logits_forward(x: Array, table: Array) -> tuple[Array, Array]:
    return frozen_logits(x, table), table


def _logits_backward(table: Array, gradient: Array) -> tuple[Array, None]:
    return _product(gradient, table.T, len(table)).astype(table.dtype), None


frozen_logits.defvjp(_logits_forward, _logits_backward)
