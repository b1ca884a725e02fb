"""The network of Llama-like decoders; attributes carry Hugging Face's names."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fslora_jax import lora
from fslora_jax.models import heads, stack
from fslora_jax.models.decoder_layer import (
    Config,
    DecoderLayer,
    Memory,
    RMSNorm,
    Sight,
    kinds_of,
    linear,
    linear_modules,
    look,
)
from fslora_jax.models.family import Options
from fslora_jax.models.generate import Span, generate
from fslora_jax.models.kernels import frozen_logits
from fslora_jax.models.layers import Project
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.scores import score_labels, score_next
from fslora_jax.sharding import gathered
from fslora_jax.types import Batch, Local


def decoder(c: Config, head: tuple[str, ...], pooling: str, options: Options, naming: Naming) -> Model:
    """The model of a config; it computes in ``options.dtype``, its logits are float32.

    A classifier has the linear modules ``head`` over ``pooling``'s vector, as in ``heads``; without a head, it
    predicts the next tokens.
    """
    parts = _parts(c, options, causal=not head)
    graphs = stack.graphs(parts)
    hidden = partial(_hidden, c, graphs, options.remat)
    if head:
        apply = partial(_classify, hidden, head, pooling)
        score, write = partial(score_labels, apply), None
    else:
        apply = partial(_predict, c, hidden)
        logits = partial(next_logits, c)
        score = partial(score_next, hidden, logits)
        empty = partial(no_memory, c, options.dtype)
        write = partial(generate, partial(recall, c, graphs), logits, empty)
    bias = naming.task_type == "TOKEN_CLS"
    return Model(
        apply=apply,
        score=score,
        init_base=partial(stack.init_base, parts, len(c.layers)),
        init_head=partial(
            heads.init_head, head, c.hidden_size, options.num_labels, c.initializer_range, bias=bias
        ),
        modules={path: lora.Target(i, o, len(c.layers)) for path, (i, o, _) in linear_modules(c).items()},
        naming=naming,
        vocab_size=c.vocab_size,
        max_length=c.max_position_embeddings,
        generate=write,
    )


def _parts(c: Config, options: Options, causal: bool) -> stack.Parts:
    dtype, init = options.dtype, nnx.initializers.normal(c.initializer_range)
    size = c.vocab_size, c.hidden_size

    def table(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Dict({"embed_tokens": nnx.Embed(*size, embedding_init=init, param_dtype=dtype, rngs=rngs)})

    def output(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Dict(
            {"lm_head": linear(c, c.hidden_size, c.vocab_size, bias=False, dtype=dtype, rngs=rngs)}
        )

    parts = {
        "embeddings": table,
        "layers": lambda rngs: DecoderLayer(c, options, rngs),
        "final": lambda _: nnx.Dict({"norm": RMSNorm(c, c.hidden_size, dtype)}),
    }
    return parts | {"output": output} if causal and not c.tie_word_embeddings else parts


def _hidden(
    c: Config,
    graphs: dict[str, nnx.GraphDef],
    remat: str,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
    places: Int[Array, "C B T"] | None = None,
) -> Float[Array, "C B T D"]:
    """The normalised states after the last layer, of all tokens or of those at ``places``."""
    x = embed(c, gathered(base["embeddings"]), batch.tokens)
    each, sight = (kinds_of(c.layers),), look(c.layers, c.head_dim, batch)
    x = stack.run_layers(
        graphs["layers"],
        base["layers"],
        tiers,
        x,
        sight,
        each,
        dropout=dropout,
        remat=remat,
        places=places,
    )
    return nnx.merge(graphs["final"], base["final"])["norm"](x)


def recall(
    c: Config,
    graphs: dict[str, nnx.GraphDef],
    base: dict[str, Any],
    tiers: Sequence[Local],
    text: Span,
    new: Span,
    memory: Memory,
    at: Int[Array, ""],
) -> tuple[Float[Array, "C B Q D"], Memory]:
    """The states of ``new`` tokens, which are columns ``at`` onwards of ``text``, and the memory with them.

    What ``memory`` (with a leading axis N) has no tokens for yet must be later in the text, hence unseen.
    """

    def call(layer: Any, x: Array, project: Project, sight: Sight, kind: Array, memory: Memory):
        return layer.attend(x, project, sight, kind, lambda own: memory.write(own, at))

    x = embed(c, gathered(base["embeddings"]), new.tokens)
    given = look(c.layers, c.head_dim, text, new), (kinds_of(c.layers), memory)
    x, own = stack.scan_layers(call, graphs["layers"], base["layers"], tiers, x, *given)
    return nnx.merge(graphs["final"], base["final"])["norm"](x), memory.write(own, at)


def no_memory(c: Config, dtype: jnp.dtype, clients: int, rows: int, length: int) -> Memory:
    """Room for so many tokens of each row, in all layers."""
    zeros = jnp.zeros((len(c.layers), clients, rows, length, c.num_key_value_heads * c.head_dim), dtype)
    return Memory(zeros, zeros)


def embed(c: Config, weights: dict[str, Any], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """What enters the first layer; Gemma scales it, by a number rounded to the dtype."""
    x = weights["embed_tokens"]["embedding"][tokens]
    return x * jnp.asarray(c.embedding_scale, x.dtype)


def _classify(
    hidden: Callable[..., Float[Array, "C B L D"]],
    head: tuple[str, ...],
    pooling: str,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C E labels"]:
    places = heads.places_of(batch, pooling)
    x = heads.pool(hidden(base, tiers, batch, dropout, places), batch, places)
    return lora.per_client(partial(heads.classify, head), [tier.weights.head for tier in tiers], x)


def _predict(
    c: Config,
    hidden: Callable[..., Float[Array, "C B L D"]],
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C B L V"]:
    return next_logits(c, base, hidden(base, tiers, batch, dropout))


def next_logits(c: Config, base: dict[str, Any], x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """What the model expects after tokens with these states, in float32."""
    if c.tie_word_embeddings:
        table = gathered(base["embeddings"])["embed_tokens"]["embedding"].T
    else:
        table = gathered(base["output"])["lm_head"]["kernel"]
    logits = frozen_logits(x, table)
    return logits if c.logit_cap is None else c.logit_cap * jnp.tanh(logits / c.logit_cap)
