"""How the sketch's variance of a local update grows with the local steps: one sketch for a round, or one a step."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from fslora_jax.theory.moments import products

Gradient = Callable[[Key[Array, ""], PyTree], PyTree]
"""``(key of a sketch, weights) -> `` the gradient under this sketch."""


def update_spread(
    gradient: Gradient,
    start: PyTree,
    keys: Key[Array, " R"],
    rate: float,
    steps: int,
    *,
    redraw: bool | Array,
) -> Float[Array, "H R R"]:
    """``|x_b - x_b'|^2 / 2`` of local updates with independent sketches, after each of ``steps`` steps of descent.

    Its mean over pairs (`estimate.u_statistic`) is the variance of the update that the sketch causes. With ``redraw``
    every step has a sketch of its own; the first one is the same without.
    """

    def step(x: PyTree, h: Array) -> tuple[PyTree, Float[Array, "R R"]]:
        own = jax.vmap(partial(jax.random.fold_in, data=h * redraw))(keys)
        slopes = jax.lax.map(lambda inputs: gradient(*inputs), (own, x))
        x = jax.tree.map(lambda x, g: x - rate * g, x, slopes)
        inner = products(jax.tree.map(jnp.subtract, x, start))
        size = jnp.diagonal(inner)
        return x, (size[:, None] + size) / 2 - inner

    at = jax.tree.map(lambda x: jnp.broadcast_to(x, (keys.shape[0], *x.shape)), start)
    return jax.lax.scan(step, at, jnp.arange(steps))[1]


def expected_growth(steps: int, *, redraw: bool) -> int:
    """How many times the variance of one step, while gradients do not move: H, or H squared.

    >>> expected_growth(20, redraw=True), expected_growth(20, redraw=False)
    (20, 400)
    """
    return steps if redraw else steps**2
