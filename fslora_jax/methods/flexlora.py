"""FlexLoRA: the average of products, cut back to factors by an SVD (Bai et al., arXiv 2402.11505)."""

import optax
from jaxtyping import Array, Key

from fslora_jax.methods.base import Combined, Method, Server, Traits
from fslora_jax.methods.parts import (
    PRODUCTS,
    factorised,
    fedavg_lora,
    prefix,
    prefix_traffic,
    sends,
    settle,
    value,
    with_products,
)
from fslora_jax.methods.spec import Spec


def flexlora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """Clients train and send the first k components; the server keeps the best rank-r factors of ``sum_i p_i B_i A_i``.

    Components are sorted by singular value, so those of a client of rank k are the best k. Exact up to the singular
    values beyond r.
    """

    def update(key: Key[Array, ""], server: Server, combined: Combined) -> Server:
        del key
        ranks, scales = spec.ranks(), spec.scales()
        adapter = {m: factorised(x, ranks[m], scales[m]) for m, x in combined.extra[PRODUCTS].items()}
        return settle(server, adapter, combined)

    return fedavg_lora(spec, server_optimizer)._replace(
        download=prefix(spec),
        upload=sends(value),
        combine=with_products(spec),
        update=update,
        traffic=prefix_traffic(spec),
        traits=Traits(linear=False, own_step=True, sends_values=True),
    )
