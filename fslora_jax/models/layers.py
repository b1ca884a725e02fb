"""What every layer is made of: frozen linear modules, each with the clients' own low-rank parts.

All clients of a cohort pass as one batch with a leading axis C, so a frozen matrix meets them in one product;
what a client owns is added by ``lora.per_client``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fslora_jax import lora
from fslora_jax.models.kernels import frozen_product
from fslora_jax.sharding import outputs_split
from fslora_jax.types import Pair

Own = Sequence[Mapping[str, tuple[Pair, Float[Array, "C k"]]]]
"""One layer's adapters: for each tier, module path -> (factors, scale), stacked over the tier's clients."""

ADAPTED = "adapted outputs"
"""What modules with an adapter give, by the name that checkpoint policies know."""


class Layer(nnx.Module):
    """Linear modules and norms by path; a subclass says how they make a layer.

    Its ``__call__(x, project, shared, *each)`` gets ``project`` for its linear modules, what all layers see
    alike (such as the attention's bias) and what is this layer's own beside its weights. With ``places`` ``(C, B, T)``
    it gives the states of these tokens alone.
    """

    def __init__(self, linear: dict[str, nnx.Linear], norm: dict[str, nnx.Module], lora_dropout: float):
        self.linear = nnx.Dict(linear)
        self.norm = nnx.Dict(norm)
        self.paths = tuple(linear)
        self.lora_dropout = lora_dropout


class Project(NamedTuple):
    """A layer's linear modules, each with the clients' adapters where it has them.

    ``keys`` are the clients' for this layer's dropout, None in evaluation; ``turned`` as in ``kernels.laid_out``. Rows
    have ``length`` tokens, of which inputs have all, or those at ``places``: a token's dropout is the same in both.
    """

    layer: Layer
    own: Own
    keys: Key[Array, " C"] | None
    turned: Mapping[str, Float[Array, "o i"]]
    length: int
    places: Int[Array, "C B T"] | None = None

    def __call__(self, path: str, x: Float[Array, "C B T i"]) -> Float[Array, "C B T o"]:
        """The frozen module for all clients at once, plus each client's own low-rank part if it has one."""
        linear = self.layer.linear[path]
        kernel = linear.kernel[...]
        if path in self.turned or kernel.dtype != x.dtype:
            y = frozen_product(x, kernel, self.turned.get(path, kernel.T))
            y = y if linear.bias is None else y + linear.bias[...]
        else:
            y = linear(x)
        y = outputs_split(path, y)
        if path not in self.own[0]:
            return y
        if self.keys is not None and (rate := self.layer.lora_dropout):
            keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, self.layer.paths.index(path))
            whole = x.shape[1], self.length, x.shape[3]
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, whole))(keys)
            x = drop(taken(kept, self.places), rate, x)
        tiers = [tier[path] for tier in self.own]
        y += lora.per_client(lambda mine, x: lora.delta(mine[0], mine[1], x), tiers, x)
        return checkpoint_name(y, ADAPTED)


def taken(x: Shaped[Array, "C B L D"], places: Int[Array, "C B T"] | None) -> Shaped[Array, "C B T D"]:
    """What belongs to some tokens of each row, by default all; for place -1 to the first."""
    if places is None:
        return x
    return jnp.take_along_axis(x, jnp.maximum(places, 0)[..., None], axis=2, mode="clip")


def drop(kept: Bool[Array, "*shape"], rate: float, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Inverted dropout: zero where not ``kept``, the rest scaled to keep the mean."""
    return jnp.where(kept, x / (1 - rate), 0)
