"""BERT-like encoders with a classification head, as pure functions over stacked layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fslora_jax import lora
from fslora_jax.errors import UserError
from fslora_jax.models.layers import Config, Embeddings, Layer, attention_bias, linear, linear_sizes
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.scores import score_labels
from fslora_jax.types import Batch, Head, Local


class Options(NamedTuple):
    """What a family and a user decide beyond ``config.json``.

    ``pooling`` is "mean" or "native" (the token at position 0); ``pooler`` says that a frozen dense layer
    with tanh follows it; ``head`` names the head's linear modules in order, with tanh in between.
    """

    num_labels: int
    pooling: str
    pooler: bool
    head: tuple[str, ...]
    first_position: int
    dtype: jnp.dtype
    lora_dropout: float


def encoder(c: Config, options: Options, naming: Naming) -> Model:
    """The model of a config; it computes in ``options.dtype``, its logits are float32."""
    parts = _parts(c, options)
    graphs = {
        name: nnx.graphdef(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
        for name, make in parts.items()
    }
    modules = {path: lora.Target(i, o, c.num_hidden_layers) for path, (i, o) in linear_sizes(c).items()}
    apply = partial(_apply, graphs, options, frozenset(modules))
    return Model(
        apply=apply,
        score=partial(score_labels, apply),
        init_base=partial(_init_base, parts, c.num_hidden_layers),
        init_head=partial(_init_head, c, options),
        modules=modules,
        naming=naming,
        vocab_size=c.vocab_size,
        max_length=c.max_position_embeddings - options.first_position,
    )


def _parts(c: Config, options: Options) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
    width, dtype = c.hidden_size, options.dtype
    parts = {
        "embeddings": lambda rngs: Embeddings(c, options.first_position, dtype, rngs),
        "layers": lambda rngs: Layer(c, options.lora_dropout, dtype, rngs),
        "pooler": lambda rngs: nnx.Dict({"dense": linear(c, width, width, dtype, rngs)}),
    }
    return parts if options.pooler else {name: parts[name] for name in ("embeddings", "layers")}


def _init_base(
    parts: dict[str, Callable[[nnx.Rngs], nnx.Module]], layers: int, key: Key[Array, ""]
) -> dict[str, Any]:
    def pure(name: str, key: Key[Array, ""]) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(parts[name](nnx.Rngs(key))))

    keys = dict(zip(parts, jax.random.split(key, len(parts)), strict=True))
    stacked = jax.vmap(partial(pure, "layers"))(jax.random.split(keys["layers"], layers))
    return {name: stacked if name == "layers" else pure(name, keys[name]) for name in parts}


def _init_head(c: Config, options: Options, key: Key[Array, ""]) -> Head:
    sizes = [c.hidden_size] * len(options.head) + [options.num_labels]
    keys = jax.random.split(key, len(options.head))
    return {
        name: {"kernel": c.initializer_range * jax.random.normal(k, (i, o)), "bias": jnp.zeros(o)}
        for name, k, i, o in zip(options.head, keys, sizes[:-1], sizes[1:], strict=True)
    }


def _apply(
    graphs: dict[str, nnx.GraphDef],
    options: Options,
    modules: frozenset[str],
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C E labels"]:
    _check_tiers(tiers, modules)
    x = nnx.merge(graphs["embeddings"], base["embeddings"])(batch)
    own = [_layers_first(tier, options.dtype) for tier in tiers]
    x = _run_layers(graphs["layers"], base["layers"], own, x, batch, dropout)
    x = pool(x, batch, options.pooling)
    if options.pooler:
        dense = nnx.merge(graphs["pooler"], base["pooler"])["dense"]
        x = jnp.tanh(dense(x.astype(options.dtype)).astype(jnp.float32))
    heads = [tier.weights.head for tier in tiers]
    return lora.per_client(partial(classify, options.head), heads, x)


def _check_tiers(tiers: Sequence[Local], modules: frozenset[str]) -> None:
    paths = [set(tier.weights.adapter) for tier in tiers]
    if not paths or any(p != paths[0] or p - modules for p in paths):
        raise UserError(
            f"adapter: tiers with modules {[sorted(p) for p in paths]}; "
            f"expected at least one tier, and in all the same modules out of {sorted(modules)}"
        )


def _layers_first(tier: Local, dtype: jnp.dtype) -> dict[str, Any]:
    adapter = {path: (pair, tier.scale[path]) for path, pair in tier.weights.adapter.items()}
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0).astype(dtype), adapter)


def _run_layers(
    graph: nnx.GraphDef,
    weights: dict[str, Any],
    own: list[dict[str, Any]],
    x: Float[Array, "C B L D"],
    batch: Batch,
    dropout: Key[Array, " C"] | None,
) -> Float[Array, "C B L D"]:
    bias = attention_bias(batch.segments)

    # The backward pass keeps the products with frozen weights (dots without batch dimensions) and recomputes
    # the rest: 0.6 of the memory and less time than keeping it, measured on a CPU.
    @partial(
        jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )
    def step(
        x: Float[Array, "C B L D"], slices: tuple[dict[str, Any], list[dict[str, Any]], Int[Array, ""]]
    ) -> tuple[Float[Array, "C B L D"], None]:
        weights, own, layer = slices
        keys = None if dropout is None else jax.vmap(lambda key: jax.random.fold_in(key, layer))(dropout)
        return nnx.merge(graph, weights)(x, bias, own, keys), None

    count = jax.tree.leaves(weights)[0].shape[0]
    return jax.lax.scan(step, x, (weights, own, jnp.arange(count)))[0]


def pool(x: Float[Array, "C B L D"], batch: Batch, pooling: str) -> Float[Array, "C E D"]:
    """One float32 vector per example: the mean over its tokens, or its first token; 0 for an empty filler."""
    examples = jnp.arange(1, batch.labels.shape[-1] + 1)
    mine = batch.segments[..., None] == examples
    if pooling == "native":
        mine &= (batch.positions == 0)[..., None]
    total = jnp.einsum("cble,cbld->ced", mine.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return total / jnp.maximum(mine.sum((1, 2)), 1)[..., None]


def classify(names: Sequence[str], head: Head, x: Float[Array, "E D"]) -> Float[Array, "E labels"]:
    """One client's head: linear modules in order, with tanh in between."""
    for n, name in enumerate(names):
        x = (jnp.tanh(x) if n else x) @ head[name]["kernel"] + head[name]["bias"]
    return x
