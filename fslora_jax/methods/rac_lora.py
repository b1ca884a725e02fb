"""Fed-RAC-LoRA: a chain of random sketches, each merged into the base (Malinovsky et al., arXiv 2410.08305)."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from fslora_jax.errors import UserError
from fslora_jax.methods.base import Client, Combined, Method, Server, Traits
from fslora_jax.methods.parts import (
    blank_kernels,
    fedavg_lora,
    kernel_of,
    only,
    per_contributor,
    sends,
    settle,
    value,
)
from fslora_jax.methods.spec import Spec, Traffic, factor_values
from fslora_jax.types import Adapter, Head, Local, Pair


def rac_lora(
    spec: Spec, server_optimizer: optax.GradientTransformation, *, sketch: Literal["a", "b"] = "b"
) -> Method:
    """A round draws one factor at random for all, trains the other from zero, averages it and merges the product.

    The average is exact, since the drawn factor is the same for all; it comes from a seed and does not travel. It has
    orthonormal components (ours), so that with scale 1 a step of SGD is the gradient's step projected on them.
    """
    fedit, trained = fedavg_lora(spec, server_optimizer), {"a": "b", "b": "a"}[sketch]

    def drawn(key: Key[Array, ""]) -> Adapter:
        keys = dict(zip(spec.targets, jax.random.split(key, len(spec.targets)), strict=True))
        adapter = {}
        for m, t in spec.targets.items():
            width = t.i if sketch == "a" else t.o
            rows = orthonormal(keys[m], t.layers, spec.ranks()[m], width)
            zero = jnp.zeros((t.layers, spec.ranks()[m], t.o if sketch == "a" else t.i))
            adapter[m] = Pair(rows, zero) if sketch == "a" else Pair(zero, rows)
        return adapter

    def init(key: Key[Array, ""], head: Head) -> Server:
        server = fedit.init(key, head)
        weights = server.weights._replace(adapter=drawn(key))
        return server._replace(weights=weights, base_delta=blank_kernels(spec))

    def download(key: Key[Array, ""], server: Server, client: Client, cap: int) -> Local:
        return only(fedit.download(key, server, client, cap), **{sketch: 0.0})

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        mean, scales = per_contributor(combined).adapter, spec.scales()
        both = {
            m: old._replace(**{trained: getattr(mean[m], trained)})
            for m, old in server.weights.adapter.items()
        }
        merged = {m: server.base_delta[m] + kernel_of(pair, scales[m]) for m, pair in both.items()}
        return settle(server, drawn(key), combined)._replace(base_delta=merged)

    def sizes(round: int, clients: Client, head_values: int) -> Traffic:
        del round
        each = 4 * (factor_values(spec, clients.k, trained) + head_values)
        return Traffic(each, each)

    return fedit._replace(
        init=init,
        download=download,
        upload=sends(value),
        update=update,
        traffic=sizes,
        traits=Traits(moves_base=True, full_rank=True, own_step=True),
    )


def orthonormal(key: Key[Array, ""], layers: int, r: int, width: int) -> Float[Array, "N r width"]:
    """``r`` random orthonormal rows of each layer.

    Raises:
      UserError: there are more rows than their width.
    """
    if r > width:
        raise UserError(f"lora.r: found {r}, but a module has {width} features; expected at most as many")
    return jnp.swapaxes(jnp.linalg.qr(jax.random.normal(key, (layers, width, r)))[0], -1, -2)
