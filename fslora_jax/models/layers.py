"""Flax NNX definitions of a BERT-like encoder; attributes carry the names of Hugging Face's modules.

All clients of a cohort pass as one batch with a leading axis C, so a frozen matrix meets them in one product;
what a client owns is added by ``lora.per_client``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fslora_jax import lora
from fslora_jax.types import Batch, Pair

Own = Sequence[Mapping[str, tuple[Pair, Float[Array, "C k"]]]]
"""One layer's adapters: for each tier, module path -> (factors, scale), stacked over the tier's clients."""

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


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


class Layer(nnx.Module):
    """Attention and feed-forward, each followed by residual and norm; any linear module takes an adapter."""

    def __init__(self, c: Config, lora_dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = nnx.Dict(
            {path: linear(c, i, o, dtype, rngs) for path, (i, o) in linear_sizes(c).items()}
        )
        self.norm = nnx.Dict(
            {path: layer_norm(c, dtype, rngs) for path in ("attention.output.LayerNorm", "output.LayerNorm")}
        )
        self.paths = tuple(linear_sizes(c))
        self.heads = c.num_attention_heads
        self.hidden_act = c.hidden_act
        self.lora_dropout = lora_dropout

    def __call__(
        self,
        x: Float[Array, "C B L D"],
        bias: Float[Array, "C B 1 L L"],
        own: Own,
        keys: Key[Array, " C"] | None,
    ) -> Float[Array, "C B L D"]:
        """One layer for all clients; ``keys`` are theirs for this layer's dropout, None in evaluation."""

        def project(path: str, x: Float[Array, "C B L i"]) -> Float[Array, "C B L o"]:
            return self.project(path, x, own, keys)

        q, k, v = (project(f"attention.self.{name}", x) for name in ("query", "key", "value"))
        mixed = project("attention.output.dense", attention(q, k, v, bias, self.heads))
        x = self.norm["attention.output.LayerNorm"](mixed + x)
        wide = ACTIVATIONS[self.hidden_act](project("intermediate.dense", x))
        out = project("output.dense", wide)
        return self.norm["output.LayerNorm"](out + x)

    def project(
        self, path: str, x: Float[Array, "C B L i"], own: Own, keys: Key[Array, " C"] | None
    ) -> Float[Array, "C B L o"]:
        """The frozen module for all clients at once, plus each client's own low-rank part if it has one."""
        y = self.linear[path](x)
        if path not in own[0]:
            return y
        if keys is not None and self.lora_dropout:
            module = self.paths.index(path)
            x = jax.vmap(lambda key, x: drop(jax.random.fold_in(key, module), self.lora_dropout, x))(keys, x)
        return y + lora.per_client(
            lambda mine, x: lora.delta(mine[0], mine[1], x), [tier[path] for tier in own], x
        )


def drop(key: Key[Array, ""], rate: float, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Inverted dropout: zero with probability ``rate``, the rest scaled to keep the mean."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def attention_bias(segments: Int[Array, "C B L"]) -> Float[Array, "C B 1 L L"]:
    """0 between tokens of one example, else so low that softmax gives exactly 0.

    Padding sees nothing, hence everything equally: finite, and never read.
    """
    same = segments[..., :, None] == segments[..., None, :]
    return jnp.where(same & (segments > 0)[..., None], 0.0, -1e9)[:, :, None]


def attention(
    q: Float[Array, "C B L D"],
    k: Float[Array, "C B L D"],
    v: Float[Array, "C B L D"],
    bias: Float[Array, "C B 1 L L"],
    heads: int,
) -> Float[Array, "C B L D"]:
    """Multi-head attention; scores and softmax in float32.

    Heads go before positions first: products of contiguous matrices are twice as fast on a CPU.
    """
    q, k, v = (jnp.swapaxes(m.reshape(*m.shape[:-1], heads, -1), -3, -2) for m in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = jnp.einsum("cbhqd,cbhkd->cbhqk", q * scale, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias).astype(v.dtype)
    mixed = jnp.swapaxes(jnp.einsum("cbhqk,cbhkd->cbhqd", weights, v), -3, -2)
    return mixed.reshape(*mixed.shape[:-2], -1)
