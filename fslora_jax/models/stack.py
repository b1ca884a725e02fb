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
from fslora_jax.models.layers import ADAPTED, Project, taken
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
    places: Int[Array, "C B T"] | None = None,
) -> Float[Array, "C B T D"]:
    """All layers for all clients; ``shared`` and ``each`` (with a leading axis N) as ``layers.Layer`` has them.

    ``weights`` have a leading axis N as well, or are a tuple of each layer's, which need no loop; ``remat`` is a key
    of ``REMAT``. With ``places`` only the states of these tokens of each row are given (of the first one for -1).
    Without a loop the last layer then leaves out what nobody asks for.

    Raises:
      UserError: the tiers adapt different modules, or one that a layer does not have.
    """

    def call(layer: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, None]:
        return layer(*args, **options), None

    if places is None or is_looped(weights, remat):
        x, _ = scan_layers(call, graph, weights, tiers, x, shared, each, dropout, remat)
        return x if places is None else taken(x, places)
    last = partial(call, places=places)
    return scan_layers(call, graph, weights, tiers, x, shared, each, dropout, remat, last)[0]


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
    last: Callable[..., tuple[Any, PyTree]] | None = None,
) -> tuple[Float[Array, "C B L D"], PyTree]:
    """`run_layers` with ``call(layer, x, project, shared, *each) -> (x, y)``; the ``y`` of all layers are stacked.

    Without a loop the last layer may have a call of its own.
    """
    apart = isinstance(weights, tuple)
    count = len(weights) if apart else jax.tree.leaves(weights)[0].shape[0]
    check_tiers(tiers, (weights[0] if apart else weights)["linear"])
    own = [_layers_first(tier, x.dtype) for tier in tiers]

    def step(
        call: Callable[..., tuple[Any, PyTree]],
        x: Float[Array, "C B L D"],
        slices: tuple[PyTree, list[dict[str, Any]], tuple[PyTree, ...], Int[Array, ""]],
    ) -> tuple[Float[Array, "C B L D"], PyTree]:
        weights, own, each, number = slices
        turned = weights.get(TURNED, {})
        weights = {name: part for name, part in weights.items() if name != TURNED}
        layer = nnx.merge(graph, restore(gathered(weights), x.dtype))
        keys = None if dropout is None else jax.vmap(lambda key: jax.random.fold_in(key, number))(dropout)
        return call(
            layer,
            rows_split(x),
            Project(layer, own, keys, turned, length=x.shape[2]),
            shared,
            *each,
        )

    own_of, kept = (own, each, jnp.arange(count)), REMAT[remat]
    if is_looped(weights, remat):
        return jax.lax.scan(kept(partial(step, call)), x, (weights, *own_of))
    layers = weights if apart else [_layer(weights, n) for n in range(count)]
    each_step = jax.jit(kept(partial(step, call)))  # traced once
    last_step = each_step if last is None else kept(partial(step, last))
    ys = []
    for n, of_layer in enumerate(layers):
        x, y = (each_step if n < count - 1 else last_step)(x, (of_layer, *_layer(own_of, n)))
        ys.append(y)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def is_looped(weights: PyTree, remat: str) -> bool:
    """Whether layers run in a loop, compiled once for all.

    Not where their weights are apart; nor on a GPU, where a loop would copy each layer's weights out of the stack, and
    what is kept for the gradient into one. But outside a loop XLA merges what is to be computed anew with what there
    is already, and keeps it, so there to save memory takes a loop, too.
    """
    return not isinstance(weights, tuple) and (jax.default_backend() != "gpu" or remat == "full")


def _layer(stacked: PyTree, n: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[n], stacked)


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
