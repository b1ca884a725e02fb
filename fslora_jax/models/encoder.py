"""The network of BERT-like encoders, with a classification head or one that predicts next tokens.

Attributes carry Hugging Face's names.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fslora_jax import lora
from fslora_jax.models import heads, stack
from fslora_jax.models.activations import ACTIVATIONS
from fslora_jax.models.attention import attention, attention_bias
from fslora_jax.models.family import Options
from fslora_jax.models.kernels import frozen_logits
from fslora_jax.models.layers import Layer, Project, taken
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.scores import score_labels, score_next
from fslora_jax.sharding import gathered
from fslora_jax.types import Batch, Local

RELATIVE_BUCKETS = 32
"""Classes of distance between two tokens, half of them for each direction."""

FIRST_DISTANCES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
"""Where a class begins: each distance below 8 is one of its own, then they grow by the square root of 2."""


class Config(NamedTuple):
    """The numbers of ``config.json`` that an encoder needs, under BERT's names; no token types, no table of them."""

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


class Names(NamedTuple):
    """What a family calls the modules of a layer."""

    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


class Output(NamedTuple):
    """The head of a family's language model: its modules' names, the activation in between, the class's ending.

    Products with the word embeddings follow, and a bias.
    """

    dense: str
    norm: str
    act: str
    suffix: str


class Variant(NamedTuple):
    """What sets families and heads apart beyond ``Config``.

    ``pooling`` as in ``heads.pool``; ``pooler`` says that a frozen dense layer with tanh follows it; ``head``
    names the head's linear modules in order, with ``between`` applied in between; positions start at row
    ``first_position`` of their table; ``relative`` says that scores depend on the distance as well, by one
    table for all layers. With an ``output``, tokens see only earlier ones and predict the next.
    """

    names: Names
    pooling: str
    pooler: bool
    head: tuple[str, ...]
    between: Callable[[Array], Array]
    first_position: int
    relative: bool
    output: Output | None = None


def encoder(c: Config, variant: Variant, options: Options, naming: Naming) -> Model:
    """The model of a config; it computes in ``options.dtype``, its logits are float32."""
    parts = _parts(c, variant, options)
    graphs = stack.graphs(parts)
    hidden = partial(_hidden, graphs, variant, options)
    if variant.output is None:
        apply = partial(_classify, hidden, graphs, variant, options)
        score = partial(score_labels, apply)
    else:
        logits = partial(_next_logits, graphs["output"], variant.output)
        apply = partial(_predict, hidden, logits)
        score = partial(score_next, hidden, logits)
    modules = {
        path: lora.Target(i, o, c.num_hidden_layers)
        for path, (i, o) in linear_sizes(c, variant.names).items()
    }
    return Model(
        apply=apply,
        score=score,
        init_base=partial(stack.init_base, parts, c.num_hidden_layers),
        init_head=partial(
            heads.init_head, variant.head, c.hidden_size, options.num_labels, c.initializer_range
        ),
        modules=modules,
        naming=naming,
        vocab_size=c.vocab_size,
        max_length=c.max_position_embeddings - variant.first_position,
    )


def linear_sizes(c: Config, names: Names) -> dict[str, tuple[int, int]]:
    """The linear modules of a layer in the order of the forward pass: path -> features (in, out)."""
    width, wide = c.hidden_size, c.intermediate_size
    return {
        names.query: (width, width),
        names.key: (width, width),
        names.value: (width, width),
        names.output: (width, width),
        names.up: (width, wide),
        names.down: (wide, width),
    }


def _parts(c: Config, variant: Variant, options: Options) -> stack.Parts:
    width, dtype = c.hidden_size, options.dtype

    def relative(rngs: nnx.Rngs) -> nnx.Module:
        buckets = table(c, RELATIVE_BUCKETS, c.num_attention_heads, dtype, rngs)
        return nnx.Dict({"relative_attention_bias": buckets})

    def output(names: Output, rngs: nnx.Rngs) -> nnx.Module:
        dense, norm = linear(c, width, width, dtype, rngs), layer_norm(c, dtype, rngs)
        return nnx.Dict(
            {names.dense: dense, names.norm: norm, "bias": nnx.Param(jnp.zeros(c.vocab_size, dtype))}
        )

    parts = {
        "embeddings": lambda rngs: Embeddings(c, variant.first_position, dtype, rngs),
        "layers": lambda rngs: EncoderLayer(c, variant.names, options, rngs),
    }
    if variant.relative:
        parts["relative"] = relative
    if variant.pooler:
        parts["pooler"] = lambda rngs: nnx.Dict({"dense": linear(c, width, width, dtype, rngs)})
    if variant.output:
        parts["output"] = partial(output, variant.output)
    return parts


def _hidden(
    graphs: dict[str, nnx.GraphDef],
    variant: Variant,
    options: Options,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
    places: Int[Array, "C B T"] | None = None,
) -> Float[Array, "C B T D"]:
    """The states after the last layer, of all tokens or of those at ``places``."""
    x = nnx.merge(graphs["embeddings"], gathered(base["embeddings"]))(batch)
    bias = attention_bias(batch.segments, batch.positions if variant.output else None)
    if variant.relative:
        buckets = nnx.merge(graphs["relative"], base["relative"])["relative_attention_bias"]
        bias += jnp.moveaxis(buckets(relative_buckets(batch.positions)).astype(bias.dtype), -1, 2)
    return stack.run_layers(
        *(graphs["layers"], base["layers"], tiers, x, bias),
        dropout=dropout,
        remat=options.remat,
        places=places,
    )


def _classify(
    hidden: Callable[..., Float[Array, "C B L D"]],
    graphs: dict[str, nnx.GraphDef],
    variant: Variant,
    options: Options,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C E labels"]:
    places = heads.places_of(batch, variant.pooling)
    x = heads.pool(hidden(base, tiers, batch, dropout, places), batch, places)
    if variant.pooler:
        dense = nnx.merge(graphs["pooler"], base["pooler"])["dense"]
        x = jnp.tanh(dense(x.astype(options.dtype)).astype(jnp.float32))
    classify = partial(heads.classify, variant.head, between=variant.between)
    return lora.per_client(classify, [tier.weights.head for tier in tiers], x)


def _predict(
    hidden: Callable[..., Float[Array, "C B L D"]],
    logits: Callable[..., Float[Array, "C B L V"]],
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C B L V"]:
    return logits(base, hidden(base, tiers, batch, dropout))


def _next_logits(
    graph: nnx.GraphDef, names: Output, base: dict[str, Any], x: Float[Array, "*rows D"]
) -> Float[Array, "*rows V"]:
    """What the model expects after tokens with these states, in float32."""
    head = nnx.merge(graph, base["output"])
    x = head[names.norm](ACTIVATIONS[names.act](head[names.dense](x)))
    words = gathered(base["embeddings"])["word_embeddings"]["embedding"].T
    return frozen_logits(x, words) + head["bias"][...]


def relative_buckets(positions: Int[Array, "*C L"]) -> Int[Array, "*C L L"]:
    """The class of the distance from each token (first) to each other one; later ones in the upper half.

    >>> relative_buckets(jnp.array([0, 1, 500]))[1].tolist()
    [1, 0, 31]
    """
    distance = positions[..., None, :] - positions[..., :, None]
    # searchsorted fails in a shard_map of some of a mesh's axes (jax 0.10.2).
    near = (jnp.abs(distance)[..., None] >= jnp.array(FIRST_DISTANCES)).sum(-1)
    return near + RELATIVE_BUCKETS // 2 * (distance > 0)


def table(c: Config, rows: int, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """A vector for each row, with BERT's initial weights."""
    init = nnx.initializers.normal(c.initializer_range)
    return nnx.Embed(rows, width, embedding_init=init, param_dtype=dtype, rngs=rngs)


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
        self.word_embeddings = table(c, c.vocab_size, c.hidden_size, dtype, rngs)
        self.position_embeddings = table(c, c.max_position_embeddings, c.hidden_size, dtype, rngs)
        if c.type_vocab_size:
            self.token_type_embeddings = table(c, c.type_vocab_size, c.hidden_size, dtype, rngs)
        self.LayerNorm = layer_norm(c, dtype, rngs)
        self.first_position = first_position
        self.has_types = c.type_vocab_size > 0

    def __call__(self, batch: Batch) -> Float[Array, "C B L D"]:
        """What enters the first layer."""
        x = self.word_embeddings(batch.tokens)
        x += self.position_embeddings(batch.positions + self.first_position)
        if self.has_types:
            x += self.token_type_embeddings(batch.types)
        return self.LayerNorm(x)


class EncoderLayer(Layer):
    """Attention and feed-forward, each followed by residual and norm."""

    def __init__(self, c: Config, names: Names, options: Options, rngs: nnx.Rngs):
        dtype = options.dtype
        super().__init__(
            linear={path: linear(c, i, o, dtype, rngs) for path, (i, o) in linear_sizes(c, names).items()},
            norm={path: layer_norm(c, dtype, rngs) for path in (names.attention_norm, names.mlp_norm)},
            lora_dropout=options.lora_dropout,
        )
        self.names = names
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.hidden_act = c.hidden_act
        self.implementation = options.attention

    def __call__(
        self,
        x: Float[Array, "C B L D"],
        project: Project,
        bias: Float[Array, "C B h L L"],
        places: Int[Array, "C B T"] | None = None,
    ) -> Float[Array, "C B T D"]:
        """One layer for all clients."""
        names = self.names
        k, v = project(names.key, x), project(names.value, x)
        x, project = taken(x, places), project._replace(places=places)
        q = project(names.query, x)
        mixed = attention(q, k, v, bias, self.head_dim, implementation=self.implementation, places=places)
        x = self.norm[names.attention_norm](project(names.output, mixed) + x)
        wide = ACTIVATIONS[self.hidden_act](project(names.up, x))
        return self.norm[names.mlp_norm](project(names.down, wide) + x)
