"""Equal layers: their weights stacked, for a loop, or apart; each client's own beside them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from fslora_jax.errors import UserError
from fslora_jax.models.attention import SOFTMAX
from fslora_jax.models.kernels import TURNED
from fslora_jax.models.layers import ADAPTED
from fslora_jax.models.quantise import restore
from fslora_jax.sharding import gathered, rows_split
from fslora_jax.types import Local

Parts = Mapping[str, Callable[[nnx.Rngs], nnx.Module]]
"""What a base consists of: its top-level keys, with what makes each; "layers" makes one layer of the stack."""


IS_FROZEN_PRODUCT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
IS_NAMED = jax.checkpoint_policies.save_only_these_names(SOFTMAX, ADAPTED)


def is_kept(operation: Any, *args: Any, **params: Any) -> bool:
    """Whether the backward pass has this operation's result from the forward pass; cuDNN's attention has no name."""
    flash = operation.name.startswith("dot_product_attention_fwd")
    return flash or any(keeps(operation, *args, **params) for keeps in (IS_FROZEN_PRODUCT, IS_NAMED))


REMAT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda step: step,
    # Keeps the products with frozen weights (dots without batch dimensions) and recomputes the rest: 0.6 of the
    # memory and less time than keeping it, measured on a CPU.
    "frozen": partial(jax.checkpoint, prevent_cse=False, policy=is_kept),
    "full": partial(jax.checkpoint, prevent_cse=False),
}
"""What the backward pass of a layer keeps, and what it computes anew."""


def graphs(parts: Parts) -> dict[str, nnx.GraphDef]:
    """The structure of each part, to be merged with its weights."""

    def structure(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    return {name: structure(make) for name, make in parts.items()}


def init_base(parts: Parts, layers: int, key: Key[Array, ""]) -> dict[str, Any]:
    """Random weights of all parts."""

    def pure(name: str, key: Key[Array, ""]) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(parts[name](nnx.Rngs(key))))

    keys = dict(zip(parts, jax.random.split(key, len(parts)), strict=True))
    stacked = jax.vmap(partial(pure, "layers"))(jax.random.split(keys["layers"], layers))
    return {name: stacked if name == "layers" else pure(name, keys[name]) for name in parts}


def run_layers(
    graph: nnx.GraphDef,
    weights: PyTree,
    tiers: Sequence[Local],
    x: Float[Array, "C B L D"],
    shared: PyTree,
    each: tuple[PyTree, ...] = (),
    dropout: Key[Array, " C"] | None = None,
    remat: str = "frozen",
) -> Float[Array, "C B L D"]:
    """All layers for all clients; ``shared`` and ``each`` (with a leading axis N) as ``layers.Layer`` has them.

    ``weights`` have a leading axis N as well, or are a tuple of each layer's, which need no loop; ``remat`` is a key
    of ``REMAT``.

    Raises:
      UserError: the tiers adapt different modules, or one that a layer does not have.
    """

    def call(layer: Callable[..., Any], *args: Any) -> tuple[Any, None]:
        return layer(*args), None

    return scan_layers(call, graph, weights, tiers, x, shared, each, dropout, remat)[0]


def scan_layers(
    call: Callable[..., tuple[Any, PyTree]],
    graph: nnx.GraphDef,
    weights: PyTree,
    tiers: Sequence[Local],
    x: Float[Array, "C B L D"],
    shared: PyTree,
    each: tuple[PyTree, ...] = (),
    dropout: Key[Array, " C"] | None = None,
    remat: str = "none",
) -> tuple[Float[Array, "C B L D"], PyTree]:
    """`run_layers` with ``call(layer, x, project, shared, *each) -> (x, y)``; the ``y`` of all layers are stacked."""
    apart = isinstance(weights, tuple)
    count = len(weights) if apart else jax.tree.leaves(weights)[0].shape[0]
    check_tiers(tiers, (weights[0] if apart else weights)["linear"])
    own = [_layers_first(tier, x.dtype) for tier in tiers]

    def step(
        x: Float[Array, "C B L D"],
        slices: tuple[PyTree, list[dict[str, Any]], tuple[PyTree, ...], Int[Array, ""]],
    ) -> tuple[Float[Array, "C B L D"], PyTree]:
        weights, own, each, number = slices
        turned = weights.get(TURNED, {})
        weights = {name: part for name, part in weights.items() if name != TURNED}
        layer = nnx.merge(graph, restore(gathered(weights), x.dtype))
        keys = None if dropout is None else jax.vmap(lambda key: jax.random.fold_in(key, number))(dropout)
        return call(
            layer, rows_split(x), partial(layer.project, own=own, keys=keys, turned=turned), shared, *each
        )

    step = REMAT[remat](step)
    if apart:
        return _one_by_one(step, x, weights, (own, each, jnp.arange(count)))
    # On a GPU a loop would copy each layer's weights out of the stack, and what is kept for the gradient into one.
    unroll = jax.default_backend() == "gpu"
    return jax.lax.scan(step, x, (weights, own, each, jnp.arange(count)), unroll=unroll)


def _one_by_one(
    step: Callable[..., tuple[Array, PyTree]],
    x: Array,
    weights: tuple[PyTree, ...],
    stacked: tuple[PyTree, ...],
) -> tuple[Array, PyTree]:
    """`jax.lax.scan` without a loop, of layers whose weights are apart; the first one's input gets no gradient."""
    step, ys = jax.jit(step), []  # traced once
    for n, of_layer in enumerate(weights):
        x, y = step(x, (of_layer, *jax.tree.map(lambda leaf, n=n: leaf[n], stacked)))
        ys.append(y)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def check_tiers(tiers: Sequence[Local], modules: Collection[str]) -> None:
    """Refuses tiers that differ in what they adapt, or adapt what is not there."""
    paths = [set(tier.weights.adapter) for tier in tiers]
    if not paths or any(p != paths[0] or p - set(modules) for p in paths):
        raise UserError(
            f"adapter: tiers with modules {[sorted(p) for p in paths]}; "
            f"expected at least one tier, and in all the same modules out of {sorted(modules)}"
        )


def _layers_first(tier: Local, dtype: jnp.dtype) -> dict[str, Any]:
    adapter = {path: (pair, tier.scale[path]) for path, pair in tier.weights.adapter.items()}
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0).astype(dtype), adapter)
