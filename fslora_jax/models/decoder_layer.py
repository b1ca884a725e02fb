"""A layer of Llama-like decoders, and what sets one family's apart from another's."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fslora_jax.models import rope
from fslora_jax.models.activations import ACTIVATIONS
from fslora_jax.models.attention import attention, attention_bias
from fslora_jax.models.family import Options
from fslora_jax.models.generate import Span
from fslora_jax.models.layers import Layer, Project, taken
from fslora_jax.types import Batch


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

    bias: Float[Array, "kinds C B 1 Q L"]
    rotation: Float[Array, "kinds 2 C B Q 1 half"]


def kinds_of(layers: tuple[Kind, ...]) -> Int[Array, " N"]:
    """Which kind, in the order of their first layer, each layer is of."""
    kinds = list(dict.fromkeys(layers))
    return jnp.array([kinds.index(kind) for kind in layers])


def look(
    layers: tuple[Kind, ...],
    head_dim: int,
    batch: Batch | Span,
    asked: Batch | Span | None = None,
    two_sided: bool = False,
) -> Sight:
    """What the layers see of packed rows, for each kind of layer in the order of their first one.

    ``asked`` are the tokens that look, by default all; ``two_sided`` as in ``attention_bias``.
    """
    asked = batch if asked is None else asked
    at = asked.segments, asked.positions
    sights = [
        Sight(
            attention_bias(batch.segments, batch.positions, kind.window, at, two_sided),
            rope.rotations(asked.positions, rope.frequencies(kind.rope, head_dim)),
        )
        for kind in dict.fromkeys(layers)
    ]
    return Sight(*(jnp.stack(leaves) for leaves in zip(*sights, strict=True)))


class Memory(NamedTuple):
    """Keys (at rotated positions) and values of a text's tokens, of one layer or on a leading axis N of all."""

    keys: Float[Array, "*N C B L k"]
    values: Float[Array, "*N C B L k"]

    def write(self, new: "Memory", at: Int[Array, ""]) -> "Memory":
        """With what is ``new`` from column ``at`` on."""

        def written(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=-2)

        return Memory(*map(written, self, new))


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
        self,
        x: Float[Array, "C B L D"],
        project: Project,
        sight: Sight,
        kind: Int[Array, ""],
        places: Int[Array, "C B T"] | None = None,
    ) -> Float[Array, "C B T D"]:
        """One layer for all clients; ``kind`` says which of the sights is this layer's."""
        return self.attend(x, project, sight, kind, lambda own: own, places)[0]

    def attend(
        self,
        x: Float[Array, "C B Q D"],
        project: Project,
        sight: Sight,
        kind: Int[Array, ""],
        remember: Callable[[Memory], Memory],
        places: Int[Array, "C B T"] | None = None,
    ) -> tuple[Float[Array, "C B T D"], Memory]:
        """The layer, and the keys and values of ``x``; ``remember`` adds to these what else there is to see."""
        c, norm = self.config, self.norm
        mine = jax.tree.map(lambda leaf: leaf[kind], sight)
        q, *own = self.queries_keys_values(norm["input_layernorm"](x), project, mine.rotation, places)
        seen = remember(Memory(*own))
        mixed = attention(
            *(q, seen.keys, seen.values, mine.bias, c.head_dim),
            scale=c.attention_scale,
            cap=c.attention_cap,
            implementation=self.implementation,
            places=places,
        )
        x, project = taken(x, places), project._replace(places=places)
        return self.feed_forward(x, project("self_attn.o_proj", mixed), project), Memory(*own)

    def queries_keys_values(
        self,
        x: Float[Array, "C B L D"],
        project: Project,
        rotation: Float[Array, "2 C B L 1 half"],
        places: Int[Array, "C B T"] | None,
    ) -> tuple[Float[Array, "C B T q"], Float[Array, "C B L k"], Float[Array, "C B L k"]]:
        """What attention works on, at rotated positions; keys and values are all that later tokens need."""

        def turned(name: str, places: Int[Array, "C B T"] | None) -> Float[Array, "C B T o"]:
            flat = project._replace(places=places)(f"self_attn.{name}_proj", taken(x, places))
            split = flat.reshape(*flat.shape[:-1], -1, self.config.head_dim)
            if self.config.qk_norm:
                split = self.norm[f"self_attn.{name}_norm"](split)
            return rope.rotate(split, rope.of_places(rotation, places)).reshape(flat.shape)

        return turned("q", places), turned("k", None), project("self_attn.v_proj", x)

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
