"""The largest eigenvalue of a Hessian, from Hessian-vector products alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

Product = Callable[[PyTree], PyTree]
"""A Hessian times a vector."""


def hessian_product(gradient: Callable[[PyTree], PyTree], at: PyTree) -> Product:
    """The Hessian at a point times a vector: the derivative of the gradient along it."""
    return lambda vector: jax.jvp(gradient, (at,), (vector,))[1]


def largest_eigenvalue(product: Product, start: PyTree, steps: int) -> tuple[Float[Array, ""], PyTree]:
    """The eigenvalue of largest modulus and its vector of length 1, by Lanczos with full reorthogonalisation.

    ``steps`` products; the modulus is never above the true one, and exact once ``steps`` is the dimension.
    """
    flat, unravel = ravel_pytree(start)

    def dot(basis: Float[Array, "m n"], x: Float[Array, " n"]) -> Float[Array, " m"]:
        return jnp.matmul(basis, x, precision=jax.lax.Precision.HIGHEST)

    def step(basis: Float[Array, "m n"], j: Array) -> tuple[Float[Array, "m n"], Float[Array, " m"]]:
        image = ravel_pytree(product(unravel(basis[j])))[0]
        column = dot(basis, image)
        rest = image - column @ basis
        rest = rest - dot(basis, rest) @ basis  # once more, since float32 is not orthogonal enough after once
        length = jnp.linalg.norm(rest)
        # What is left when the space is exhausted is rounding: no direction at all.
        new = jnp.where(length > 1e-5 * jnp.linalg.norm(image), rest / length, 0.0)
        return basis.at[j + 1].set(new, mode="drop"), column

    basis = jnp.zeros((steps, flat.size)).at[0].set(flat / jnp.linalg.norm(flat))
    basis, columns = jax.lax.scan(step, basis, jnp.arange(steps))
    values, vectors = jnp.linalg.eigh(jnp.tril(columns) + jnp.tril(columns, -1).T)
    best = jnp.argmax(jnp.abs(values))
    return values[best], unravel(vectors[:, best] @ basis)


def along(product: Product, vector: PyTree) -> Float[Array, ""]:
    """``v^T H v``; where ``v`` was found on other examples it is unbiased, and at most the largest eigenvalue."""
    return jnp.vdot(ravel_pytree(vector)[0], ravel_pytree(product(vector))[0])
