"""What every layer is made of: frozen linear modules, each with the clients' own low-rank parts.

All clients of a cohort pass as one batch with a leading axis C, so a frozen matrix meets them in one product;
what a client owns is added by ``lora.per_client``.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from fslora_jax import lora
from fslora_jax.models.kernels import frozen_product
from fslora_jax.sharding import outputs_split
from fslora_jax.types import Pair

Own = Sequence[Mapping[str, tuple[Pair, Float[Array, "C k"]]]]
"""One layer's adapters: for each tier, module path -> (factors, scale), stacked over the tier's clients."""

Project = Callable[[str, Float[Array, "C B L i"]], Float[Array, "C B L o"]]
"""A linear module of a layer, by path, with its adapters."""

ADAPTED = "adapted outputs"
"""What modules with an adapter give, by the name that checkpoint policies know."""


class Layer(nnx.Module):
    """Linear modules and norms by path; a subclass says how they make a layer.

    Its ``__call__(x, project, shared, *each)`` gets ``project`` for its linear modules, what all layers see
    alike (such as the attention's bias) and what is this layer's own beside its weights.
    """

    def __init__(self, linear: dict[str, nnx.Linear], norm: dict[str, nnx.Module], lora_dropout: float):
        self.linear = nnx.Dict(linear)
        self.norm = nnx.Dict(norm)
        self.paths = tuple(linear)
        self.lora_dropout = lora_dropout

    def project(
        self,
        path: str,
        x: Float[Array, "C B L i"],
        own: Own,
        keys: Key[Array, " C"] | None,
        turned: Mapping[str, Float[Array, "o i"]],
    ) -> Float[Array, "C B L o"]:
        """The frozen module for all clients at once, plus each client's own low-rank part if it has one.

        ``keys`` are the clients' for this layer's dropout, None in evaluation; ``turned`` as in ``kernels.laid_out``.
        """
        linear = self.linear[path]
        kernel = linear.kernel[...]
        if path in turned or kernel.dtype != x.dtype:
            y = frozen_product(x, kernel, turned.get(path, kernel.T))
            y = y if linear.bias is None else y + linear.bias[...]
        else:
            y = linear(x)
        y = outputs_split(path, y)
        if path not in own[0]:
            return y
        if keys is not None and self.lora_dropout:
            module = self.paths.index(path)
            x = jax.vmap(lambda key, x: drop(jax.random.fold_in(key, module), self.lora_dropout, x))(keys, x)
        y += lora.per_client(lambda mine, x: lora.delta(mine[0], mine[1], x), [tier[path] for tier in own], x)
        return checkpoint_name(y, ADAPTED)


def drop(key: Key[Array, ""], rate: float, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Inverted dropout: zero with probability ``rate``, the rest scaled to keep the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
