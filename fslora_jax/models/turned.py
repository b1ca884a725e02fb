"""Products with frozen kernels: their precision, and on a CPU a gradient from kernels that were transposed beforehand.

XLA's matrix product on a CPU packs a matrix that it must read transposed value by value, again in every pass; with
288 rows that took a third to two thirds of the product's own time.
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


def with_turned(base: dict[str, Any], mesh: Mesh | None = None) -> dict[str, Any]:
    """The base with its kernels' transposes beside them, on a CPU; elsewhere, and of packed kernels, it stays as it is.

    Devices that share out a kernel keep no second one.
    """
    shared = mesh is not None and client_groups(mesh) < mesh.size
    if jax.default_backend() != "cpu" or shared:
        return base
    layers = base["layers"]
    turned = {
        path: jnp.swapaxes(module["kernel"], -1, -2)
        for path, module in layers["linear"].items()
        if not is_packed(module["kernel"])
    }
    return base | {"layers": layers | {TURNED: turned}}


@jax.custom_vjp
def frozen_product(
    x: Float[Array, "*B i"], kernel: Float[Array, "i o"], turned: Float[Array, "o i"]
) -> Float[Array, "*B o"]:
    """``x @ kernel``, whose gradient is a product with ``turned``, the kernel's transpose; both stay as they are.

    Factors are as precise as the kernel, sums and the result as ``x``.
    """
    del turned
    return _product(x, kernel)


def _product(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=x.dtype)


def _forward(x: Array, kernel: Array, turned: Array) -> tuple[Array, Array]:
    return _product(x, kernel), turned


def _backward(turned: Array, gradient: Array) -> tuple[Array, None, None]:
    return _product(gradient, turned), None, None


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
    return _product(gradient, table.T).astype(table.dtype), None


frozen_logits.defvjp(_logits_forward, _logits_backward)
