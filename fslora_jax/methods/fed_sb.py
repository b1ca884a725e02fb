"""Fed-SB: between two fixed factors only an r x r matrix is trained (Singhal et al., arXiv 2502.15436)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fslora_jax.methods.base import Client, Method, Server
from fslora_jax.methods.parts import EXACT, factorised, fedavg_lora
from fslora_jax.methods.rac_lora import orthonormal
from fslora_jax.methods.spec import Spec, Traffic
from fslora_jax.settings import Positive
from fslora_jax.types import Head, Local, Pair, Trainable

NAME = "fed_sb"


def fed_sb(
    spec: Spec, server_optimizer: optax.GradientTransformation, *, first_step: Positive = 1e-3
) -> Method:
    """``delta W = s B R A``; the average of R is exact, and r x r values of each module travel.

    B and A are the singular vectors of one sign-gradient step of size ``first_step``, averaged over the clients, and R
    starts with its singular values, so that the first adapter is the best rank-r part of that step.
    """
    fedit = fedavg_lora(spec, server_optimizer)

    def init(key: Key[Array, ""], head: Head) -> Server:
        a_key, b_key = jax.random.split(key)
        ranks, adapter, fixed = spec.ranks(), {}, {}
        for number, (m, t) in enumerate(spec.targets.items()):
            keys = (jax.random.fold_in(k, number) for k in (a_key, b_key))
            sizes = ((t.layers, ranks[m], width) for width in (t.i, t.o))
            fixed[m] = Pair(*(orthonormal(k, *size) for k, size in zip(keys, sizes, strict=True)))
            adapter[m] = Pair(jnp.zeros((t.layers, ranks[m], ranks[m])), jnp.zeros((t.layers, ranks[m], 0)))
        weights = Trainable(adapter, head)
        return Server(weights, server_optimizer.init(weights), jnp.int32(0), memory={NAME: fixed})

    def from_gradient(server: Server, gradient: dict[str, Float[Array, "N i o"]]) -> Server:
        adapter, fixed, ranks, scales = {}, {}, spec.ranks(), spec.scales()
        for m, g in gradient.items():
            pair = factorised(-first_step * jnp.sign(g), ranks[m], scales[m])
            sizes = jnp.linalg.norm(pair.b, axis=-1)
            fixed[m] = Pair(pair.a, pair.b / jnp.maximum(sizes, 1e-30)[..., None])
            adapter[m] = server.weights.adapter[m]._replace(a=jax.vmap(jnp.diag)(sizes))
        weights = server.weights._replace(adapter=adapter)
        return server._replace(weights=weights, memory=server.memory | {NAME: fixed})

    def product(server: Server, adapter: dict[str, Pair]) -> dict[str, Pair]:
        fixed = server.memory[NAME]
        return {
            m: Pair(jnp.einsum("nkj,nji->nki", pair.a, fixed[m].a, precision=EXACT), fixed[m].b)
            for m, pair in adapter.items()
        }

    def forward(server: Server, local: Local) -> Local:
        return local._replace(weights=local.weights._replace(adapter=product(server, local.weights.adapter)))

    def final(server: Server) -> Trainable:
        return server.weights._replace(adapter=product(server, server.weights.adapter))

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        values = sum(spec.ranks()[m] ** 2 * t.layers for m, t in spec.targets.items())
        each = 0 * clients.k + 4 * (values + head_values)
        return Traffic(each, each)

    return fedit._replace(init=init, from_gradient=from_gradient, forward=forward, final=final, traffic=sizes)
