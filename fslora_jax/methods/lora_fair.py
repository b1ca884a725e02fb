"""LoRA-FAIR: the averaged B is corrected towards the average of products (Bian et al., arXiv 2411.14961)."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fslora_jax.methods.base import Combined, Method, Server, Traits
from fslora_jax.methods.parts import (
    EXACT,
    PRODUCTS,
    fedavg_lora,
    kernel_of,
    per_contributor,
    sends,
    settle,
    value,
    with_products,
)
from fslora_jax.methods.spec import Spec
from fslora_jax.settings import Count, NonNegative, Positive
from fslora_jax.types import Pair

EPS = 1e-12
LEAST = 1e-6
"""The smallest relative penalty: without any, a rank above the width of A would be a singular system."""


def lora_fair(
    spec: Spec,
    server_optimizer: optax.GradientTransformation,
    *,
    penalty: NonNegative = 0.01,
    form: Literal["ridge", "cosine"] = "ridge",
    server_steps: Count = 1000,
    server_rate: Positive = 0.01,
) -> Method:
    """FedIT, then ``B <- B + D`` with D such that ``(B + D) mean(A)`` comes near ``sum_i p_i B_i A_i``.

    "ridge" (ours) is the least-squares solution with ``penalty`` relative to the size of ``A A^T``: one r x r solve.
    "cosine" is the paper's: ``server_steps`` of gradient descent at ``server_rate`` on one minus the cosine, plus
    ``penalty |D|``; the cosine does not see the scale of B, so small factors can blow up.
    """

    def corrected(product: Float[Array, "N i o"], mean: Pair, scale: float) -> Pair:
        wanted = product / scale
        if form == "ridge":
            return mean._replace(b=mean.b + ridge(wanted - kernel_of(mean), mean.a, penalty))
        return mean._replace(b=mean.b + descend(wanted, mean, penalty, server_steps, server_rate))

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        mean, ideal, scales = per_contributor(combined).adapter, combined.extra[PRODUCTS], spec.scales()
        return settle(server, {m: corrected(ideal[m], mean[m], scales[m]) for m in mean}, combined)

    return fedavg_lora(spec, server_optimizer)._replace(
        upload=sends(value),
        combine=with_products(spec),
        update=update,
        traits=Traits(linear=False, full_rank=True, own_step=True, sends_values=True),
    )


def ridge(residual: Float[Array, "N i o"], a: Float[Array, "N r i"], penalty: float) -> Float[Array, "N r o"]:
    """``(A A^T + penalty tr(A A^T)/r I)^-1 A residual``, the least-squares correction of B for a fixed A."""
    gram = jnp.einsum("nki,nji->nkj", a, a, precision=EXACT)
    size = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None] / a.shape[-2]
    seen = jnp.einsum("nki,nio->nko", a, residual, precision=EXACT)
    system = gram + max(penalty, LEAST) * (size + EPS) * jnp.eye(a.shape[-2])
    # Layer by layer: on a CPU, batched solves that run at once wait for each other's threads, forever.
    return jax.lax.map(lambda layer: jnp.linalg.solve(*layer), (system, seen))


def descend(
    wanted: Float[Array, "N i o"], mean: Pair, penalty: float, steps: int, rate: float
) -> Float[Array, "N r o"]:
    """The paper's correction: gradient descent from zero on ``1 - cos(wanted, (B + D) A) + penalty |D|``."""

    def norm(x: Array) -> Array:
        return jnp.sqrt((x**2).sum((-2, -1)) + EPS)

    def loss(d: Float[Array, "N r o"]) -> Float[Array, ""]:
        product = kernel_of(mean._replace(b=mean.b + d))
        cosine = (product * wanted).sum((-2, -1)) / (norm(product) * norm(wanted))
        return (1 - cosine + penalty * norm(d)).sum()

    def step(d: Array, _: None) -> tuple[Array, None]:
        return d - rate * jax.grad(loss)(d), None

    return jax.lax.scan(step, jnp.zeros_like(mean.b), None, length=steps)[0]
