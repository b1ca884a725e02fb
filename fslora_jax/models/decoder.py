"""The network of Llama-like decoders; attributes carry Hugging Face's names."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fslora_jax import lora
from fslora_jax.models import heads, rope, stack
from fslora_jax.models.attention import attention, attention_bias
from fslora_jax.models.family import Options
from fslora_jax.models.layers import ACTIVATIONS, Layer, Project
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.scores import score_labels, score_next
from fslora_jax.sharding import gathered
from fslora_jax.types import Batch, Local


class Kind(NamedTuple):
    """How a layer sees the text: the last ``window`` tokens, or all, at rotated positions."""

    window: int | None
    rope: rope.Rope


class Config(NamedTuple):
    """What ``config.json`` says, under its names where it has one.

    ``qk_norm`` normalises each head of queries and keys; ``post_norms`` also what attention and feed-forward
    give; a norm's scale is stored less ``norm_offset``. The caps squash scores and next-token logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    layers: tuple[Kind, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None


class Sight(NamedTuple):
    """What all layers share, for each kind of layer: the attention's bias, and the queries' and keys' rotations."""

    bias: Float[Array, "kinds C B 1 L L"]
    rotation: Float[Array, "kinds 2 C B L 1 half"]


def decoder(c: Config, head: tuple[str, ...], pooling: str, options: Options, naming: Naming) -> Model:
    """The model of a config; it computes in ``options.dtype``, its logits are float32.

    A classifier has the linear modules ``head`` over ``pooling``'s vector, as in ``heads``; without a head, it
    predicts the next tokens.
    """
    parts = _parts(c, options, causal=not head)
    hidden = partial(_hidden, c, stack.graphs(parts), options.remat)
    if head:
        apply = partial(_classify, hidden, head, pooling)
        score = partial(score_labels, apply)
    else:
        apply = partial(_predict, c, hidden)
        score = partial(score_next, hidden, partial(next_logits, c))
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
    )


def linear_modules(c: Config) -> dict[str, tuple[int, int, bool]]:
    """The linear modules of a layer in the order of the forward pass: path -> features in and out, bias."""
    width, wide = c.hidden_size, c.intermediate_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "self_attn.q_proj": (width, queries, c.qkv_bias),
        "self_attn.k_proj": (width, keys, c.qkv_bias),
        "self_attn.v_proj": (width, keys, c.qkv_bias),
        "self_attn.o_proj": (queries, width, c.output_bias),
        "mlp.gate_proj": (width, wide, c.mlp_bias),
        "mlp.up_proj": (width, wide, c.mlp_bias),
        "mlp.down_proj": (wide, width, c.mlp_bias),
    }


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
) -> Float[Array, "C B L D"]:
    """The normalised states after the last layer."""
    x = embed(c, gathered(base["embeddings"]), batch.tokens)
    kinds = list(dict.fromkeys(c.layers))
    each = (jnp.array([kinds.index(kind) for kind in c.layers]),)
    x = stack.run_layers(
        graphs["layers"], base["layers"], tiers, x, look(c, batch), each, dropout=dropout, remat=remat
    )
    return nnx.merge(graphs["final"], base["final"])["norm"](x)


def embed(c: Config, weights: dict[str, Any], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """What enters the first layer; Gemma scales it, by a number rounded to the dtype."""
    x = weights["embed_tokens"]["embedding"][tokens]
    return x * jnp.asarray(c.embedding_scale, x.dtype)


def look(c: Config, batch: Batch) -> Sight:
    """What the layers see of packed rows, for each kind of layer in the order of their first one."""
    sights = [
        Sight(
            attention_bias(batch.segments, batch.positions, kind.window),
            rope.rotations(batch.positions, rope.frequencies(kind.rope, c.head_dim)),
        )
        for kind in dict.fromkeys(c.layers)
    ]
    return Sight(*(jnp.stack(leaves) for leaves in zip(*sights, strict=True)))


def _classify(
    hidden: Callable[..., Float[Array, "C B L D"]],
    head: tuple[str, ...],
    pooling: str,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C E labels"]:
    x = heads.pool(hidden(base, tiers, batch, dropout), batch, pooling)
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
    logits = jnp.matmul(x, table, preferred_element_type=jnp.float32)
    return logits if c.logit_cap is None else c.logit_cap * jnp.tanh(logits / c.logit_cap)


def linear(c: Config, i: int, o: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear module with Llama's initial weights."""
    init = nnx.initializers.normal(c.initializer_range)
    return nnx.Linear(i, o, use_bias=bias, kernel_init=init, param_dtype=dtype, rngs=rngs)


class RMSNorm(nnx.Module):
    """Division by the root mean square, in float32 whatever the dtype, then the scale."""

    def __init__(self, c: Config, width: int, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.full(width, 1 - c.norm_offset, dtype))
        self.offset = c.norm_offset
        self.eps = c.rms_norm_eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The norm over the last axis."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class DecoderLayer(Layer):
    """Attention and gated feed-forward, each on normalised input and added to it."""

    def __init__(self, c: Config, options: Options, rngs: nnx.Rngs):
        def linears(i: int, o: int, bias: bool) -> nnx.Linear:
            return linear(c, i, o, bias, options.dtype, rngs)

        widths = dict.fromkeys(["input_layernorm", "post_attention_layernorm"], c.hidden_size)
        if c.post_norms:
            widths |= dict.fromkeys(
                ["pre_feedforward_layernorm", "post_feedforward_layernorm"], c.hidden_size
            )
        if c.qk_norm:
            widths |= dict.fromkeys(["self_attn.q_norm", "self_attn.k_norm"], c.head_dim)
        super().__init__(
            linear={path: linears(*sizes) for path, sizes in linear_modules(c).items()},
            norm={path: RMSNorm(c, width, options.dtype) for path, width in widths.items()},
            lora_dropout=options.lora_dropout,
        )
        self.config = c
        self.implementation = options.attention

    def __call__(
        self, x: Float[Array, "C B L D"], project: Project, sight: Sight, kind: Int[Array, ""]
    ) -> Float[Array, "C B L D"]:
        """One layer for all clients; ``kind`` says which of the sights is this layer's."""
        c, norm = self.config, self.norm
        mine = jax.tree.map(lambda leaf: leaf[kind], sight)
        q, k, v = self.queries_keys_values(norm["input_layernorm"](x), project, mine.rotation)
        mixed = attention(
            *(q, k, v, mine.bias, c.head_dim),
            scale=c.attention_scale,
            cap=c.attention_cap,
            implementation=self.implementation,
        )
        return self.feed_forward(x, project("self_attn.o_proj", mixed), project)

    def queries_keys_values(
        self, x: Float[Array, "C B L D"], project: Project, rotation: Float[Array, "2 C B L 1 half"]
    ) -> tuple[Float[Array, "C B L q"], Float[Array, "C B L k"], Float[Array, "C B L k"]]:
        """What attention works on, at rotated positions; keys and values are all that later tokens need."""

        def turned(name: str) -> Float[Array, "C B L o"]:
            flat = project(f"self_attn.{name}_proj", x)
            split = flat.reshape(*flat.shape[:-1], -1, self.config.head_dim)
            if self.config.qk_norm:
                split = self.norm[f"self_attn.{name}_norm"](split)
            return rope.rotate(split, rotation).reshape(flat.shape)

        return turned("q"), turned("k"), project("self_attn.v_proj", x)

    def feed_forward(
        self, x: Float[Array, "C B L D"], mixed: Float[Array, "C B L D"], project: Project
    ) -> Float[Array, "C B L D"]:
        """The rest of the layer, from its input and what attention gave."""
        norm, act = self.norm, ACTIVATIONS[self.config.hidden_act]
        if not self.config.post_norms:
            x += mixed
            return x + gated(norm["post_attention_layernorm"](x), act, project)
        x += norm["post_attention_layernorm"](mixed)
        out = gated(norm["pre_feedforward_layernorm"](x), act, project)
        return x + norm["post_feedforward_layernorm"](out)


def gated(
    x: Float[Array, "C B L D"], act: Callable[[Array], Array], project: Project
) -> Float[Array, "C B L D"]:
    """The gated feed-forward block (arXiv 2002.05202)."""
    return project("mlp.down_proj", act(project("mlp.gate_proj", x)) * project("mlp.up_proj", x))
