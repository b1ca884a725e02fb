"""The network of BERT-like encoders with a classification head; attributes carry Hugging Face's names."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fslora_jax import lora
from fslora_jax.models import heads, stack
from fslora_jax.models.attention import attention, attention_bias
from fslora_jax.models.family import Options
from fslora_jax.models.layers import ACTIVATIONS, Layer, Project
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.scores import score_labels
from fslora_jax.sharding import gathered
from fslora_jax.types import Batch, Local


class Config(NamedTuple):
    """The numbers of ``config.json`` that an encoder needs, under their names there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    initializer_range: float
    hidden_act: str


class Variant(NamedTuple):
    """What sets families and heads apart beyond ``Config``.

    ``pooling`` as in ``heads.pool``; ``pooler`` says that a frozen dense layer with tanh follows it; ``head``
    names the head's linear modules in order; positions start at row ``first_position`` of their table.
    """

    pooling: str
    pooler: bool
    head: tuple[str, ...]
    first_position: int


def encoder(c: Config, variant: Variant, options: Options, naming: Naming) -> Model:
    """The model of a config; it computes in ``options.dtype``, its logits are float32."""
    parts = _parts(c, variant, options)
    modules = {path: lora.Target(i, o, c.num_hidden_layers) for path, (i, o) in linear_sizes(c).items()}
    apply = partial(_apply, stack.graphs(parts), variant, options)
    return Model(
        apply=apply,
        score=partial(score_labels, apply),
        init_base=partial(stack.init_base, parts, c.num_hidden_layers),
        init_head=partial(
            heads.init_head, variant.head, c.hidden_size, options.num_labels, c.initializer_range
        ),
        modules=modules,
        naming=naming,
        vocab_size=c.vocab_size,
        max_length=c.max_position_embeddings - variant.first_position,
    )


def linear_sizes(c: Config) -> dict[str, tuple[int, int]]:
    """The linear modules of a layer in the order of the forward pass: path -> features (in, out)."""
    width, wide = c.hidden_size, c.intermediate_size
    return {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (width, wide),
        "output.dense": (wide, width),
    }


def _parts(c: Config, variant: Variant, options: Options) -> stack.Parts:
    width, dtype = c.hidden_size, options.dtype
    parts = {
        "embeddings": lambda rngs: Embeddings(c, variant.first_position, dtype, rngs),
        "layers": lambda rngs: EncoderLayer(c, options, rngs),
        "pooler": lambda rngs: nnx.Dict({"dense": linear(c, width, width, dtype, rngs)}),
    }
    return parts if variant.pooler else {name: parts[name] for name in ("embeddings", "layers")}


def _apply(
    graphs: dict[str, nnx.GraphDef],
    variant: Variant,
    options: Options,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C E labels"]:
    x = nnx.merge(graphs["embeddings"], gathered(base["embeddings"]))(batch)
    bias = attention_bias(batch.segments)
    x = stack.run_layers(
        graphs["layers"], base["layers"], tiers, x, bias, dropout=dropout, remat=options.remat
    )
    x = heads.pool(x, batch, variant.pooling)
    if variant.pooler:
        dense = nnx.merge(graphs["pooler"], base["pooler"])["dense"]
        x = jnp.tanh(dense(x.astype(options.dtype)).astype(jnp.float32))
    return lora.per_client(partial(heads.classify, variant.head), [tier.weights.head for tier in tiers], x)


def linear(c: Config, i: int, o: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear module with BERT's initial weights."""
    init = nnx.initializers.normal(c.initializer_range)
    return nnx.Linear(i, o, kernel_init=init, param_dtype=dtype, rngs=rngs)


def layer_norm(c: Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm; Flax computes its statistics in float32 whatever the dtype."""
    return nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, param_dtype=dtype, rngs=rngs)


class Embeddings(nnx.Module):
    """Word, position and token type, summed and normalised; positions start at row ``first_position``."""

    def __init__(self, c: Config, first_position: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            init = nnx.initializers.normal(c.initializer_range)
            return nnx.Embed(rows, c.hidden_size, embedding_init=init, param_dtype=dtype, rngs=rngs)

        self.word_embeddings = table(c.vocab_size)
        self.position_embeddings = table(c.max_position_embeddings)
        self.token_type_embeddings = table(c.type_vocab_size)
        self.LayerNorm = layer_norm(c, dtype, rngs)
        self.first_position = first_position

    def __call__(self, batch: Batch) -> Float[Array, "C B L D"]:
        """What enters the first layer."""
        words = self.word_embeddings(batch.tokens)
        places = self.position_embeddings(batch.positions + self.first_position)
        return self.LayerNorm(words + places + self.token_type_embeddings(batch.types))


class EncoderLayer(Layer):
    """Attention and feed-forward, each followed by residual and norm."""

    def __init__(self, c: Config, options: Options, rngs: nnx.Rngs):
        dtype = options.dtype
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
        super().__init__(
            linear={path: linear(c, i, o, dtype, rngs) for path, (i, o) in linear_sizes(c).items()},
            norm={path: layer_norm(c, dtype, rngs) for path in norms},
            lora_dropout=options.lora_dropout,
        )
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.hidden_act = c.hidden_act
        self.implementation = options.attention

    def __call__(
        self, x: Float[Array, "C B L D"], project: Project, bias: Float[Array, "C B 1 L L"]
    ) -> Float[Array, "C B L D"]:
        """One layer for all clients."""
        q, k, v = (project(f"attention.self.{name}", x) for name in ("query", "key", "value"))
        mixed = attention(q, k, v, bias, self.head_dim, implementation=self.implementation)
        x = self.norm["attention.output.LayerNorm"](project("attention.output.dense", mixed) + x)
        wide = ACTIVATIONS[self.hidden_act](project("intermediate.dense", x))
        return self.norm["output.LayerNorm"](project("output.dense", wide) + x)
