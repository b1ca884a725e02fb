"""ModernBERT (arXiv 2412.13663): rotated positions, layers that see a window or all, gated feed-forward."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from fslora_jax import lora
from fslora_jax.errors import UserError
from fslora_jax.models import heads, rope, stack
from fslora_jax.models.activations import ACTIVATIONS
from fslora_jax.models.attention import attention
from fslora_jax.models.decoder_layer import Kind, Sight, kinds_of, look
from fslora_jax.models.decoders import by_type
from fslora_jax.models.family import Family, Options
from fslora_jax.models.fields import Fields, check_choice
from fslora_jax.models.layers import Layer, Project, taken
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.rope import FULL, SLIDING, Rope, read_two_ropes
from fslora_jax.models.scores import score_labels
from fslora_jax.sharding import gathered
from fslora_jax.types import Batch, Local

HEAD = ("classifier",)


class Config(NamedTuple):
    """The fields of ``config.json`` under their names, ``layers`` apart."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    max_position_embeddings: int
    initializer_range: float
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    classifier_bias: bool
    hidden_activation: str
    classifier_activation: str
    classifier_pooling: str
    layers: tuple[Kind, ...]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads


def _read(fields: Fields) -> Config:
    every = fields.read("global_attn_every_n_layers", int, 3)
    # The window reaches half of local_attention to either side, and has the token itself.
    window = fields.read("local_attention", int) // 2 + 1
    far, near = _ropes(fields)
    kinds = {FULL: Kind(None, far), SLIDING: Kind(window, near)}
    fields.require(is_encoder_decoder=False)
    fields.ignore("embedding_dropout", "mlp_dropout", "decoder_bias", "tie_word_embeddings", "layer_norm_eps")
    fields.ignore("initializer_cutoff_factor", "position_embedding_type", "reference_compile")
    fields.ignore("deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index")
    for name in ("hidden_activation", "classifier_activation"):
        fields.choose(name, ACTIVATIONS)
    fields.choose("classifier_pooling", ("cls", "mean"))
    c = fields.fill(Config, {}, {"layers": by_type(fields, kinds, lambda n: n % every != 0)})
    if c.hidden_size % (2 * c.num_attention_heads):
        raise UserError(
            f"config.json: hidden_size is {c.hidden_size}; expected a multiple of twice num_attention_heads, "
            f"{c.num_attention_heads}, to rotate pairs"
        )
    return c


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
    far = fields.read("global_rope_theta", float, 160_000.0)
    near = fields.read("local_rope_theta", float, 10_000.0)
    both = read_two_ropes(fields, far, near)
    fields.require(rope_scaling=None)
    return both or (Rope(far), Rope(near))


def _build(family: Family, fields: Fields, options: Options) -> Model:
    check_choice("model.task", options.task, ("sequence",))
    c, native = _read(fields), options.pooling == "native"
    parts = _parts(c, options)
    apply = partial(_classify, c, stack.graphs(parts), options, native)
    return Model(
        apply=apply,
        score=partial(score_labels, apply),
        init_base=partial(stack.init_base, parts, len(c.layers)),
        init_head=partial(heads.init_head, HEAD, c.hidden_size, options.num_labels, c.initializer_range),
        modules={path: lora.Target(i, o, len(c.layers)) for path, (i, o, _) in linear_sizes(c).items()},
        naming=Naming(
            layer_prefix=family.prefix + family.containers["layers"],
            task_type="SEQ_CLS" if native else "TOKEN_CLS",
            head_modules=HEAD,
            architecture=f"{family.architecture}For{'Sequence' if native else 'Token'}Classification",
        ),
        vocab_size=c.vocab_size,
        max_length=c.max_position_embeddings,
    )


def linear_sizes(c: Config) -> dict[str, tuple[int, int, bool]]:
    """The linear modules of a layer in the order of the forward pass: path -> features in and out, bias."""
    width, wide = c.hidden_size, c.intermediate_size
    return {
        "attn.Wqkv": (width, 3 * width, c.attention_bias),
        "attn.Wo": (width, width, c.attention_bias),
        "mlp.Wi": (width, 2 * wide, c.mlp_bias),
        "mlp.Wo": (wide, width, c.mlp_bias),
    }


def _linear(c: Config, i: int, o: int, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(c.initializer_range)
    return nnx.Linear(i, o, use_bias=bias, kernel_init=init, param_dtype=dtype, rngs=rngs)


def _norm(c: Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        c.hidden_size, epsilon=c.norm_eps, use_bias=c.norm_bias, param_dtype=dtype, rngs=rngs
    )


def _parts(c: Config, options: Options) -> stack.Parts:
    dtype, width = options.dtype, c.hidden_size

    def embeddings(rngs: nnx.Rngs) -> nnx.Module:
        init = nnx.initializers.normal(c.initializer_range)
        words = nnx.Embed(c.vocab_size, width, embedding_init=init, param_dtype=dtype, rngs=rngs)
        return nnx.Dict({"tok_embeddings": words, "norm": _norm(c, dtype, rngs)})

    def pooler(rngs: nnx.Rngs) -> nnx.Module:
        dense = _linear(c, width, width, c.classifier_bias, dtype, rngs)
        return nnx.Dict({"dense": dense, "norm": _norm(c, dtype, rngs)})

    return {
        "embeddings": embeddings,
        "layers": lambda rngs: ModernLayer(c, options, rngs),
        "final": lambda rngs: nnx.Dict({"final_norm": _norm(c, dtype, rngs)}),
        "pooler": pooler,
    }


class ModernLayer(Layer):
    """Attention and gated feed-forward, each on normalised input, the first layer's attention as it comes."""

    def __init__(self, c: Config, options: Options, rngs: nnx.Rngs):
        dtype = options.dtype
        super().__init__(
            linear={path: _linear(c, *sizes, dtype, rngs) for path, sizes in linear_sizes(c).items()},
            norm={path: _norm(c, dtype, rngs) for path in ("attn_norm", "mlp_norm")},
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
        first: Bool[Array, ""],
        places: Int[Array, "C B T"] | None = None,
    ) -> Float[Array, "C B T D"]:
        """One layer for all clients; ``kind`` says which of the sights is this layer's."""
        c, bias, rotation = self.config, sight.bias[kind], sight.rotation[kind]

        def turned(flat: Float[Array, "C B L D"]) -> Float[Array, "C B L D"]:
            split = flat.reshape(*flat.shape[:-1], -1, c.head_dim)
            return rope.rotate(split, rotation).reshape(flat.shape)

        fused = project("attn.Wqkv", jnp.where(first, x, self.norm["attn_norm"](x)))
        q, k, v = jnp.split(fused, 3, axis=-1)
        mixed = attention(
            *(taken(turned(q), places), turned(k), v, bias, c.head_dim),
            implementation=self.implementation,
            places=places,
        )
        x, project = taken(x, places), project._replace(places=places)
        x += project("attn.Wo", mixed)
        wide, gate = jnp.split(project("mlp.Wi", self.norm["mlp_norm"](x)), 2, axis=-1)
        return x + project("mlp.Wo", ACTIVATIONS[c.hidden_activation](wide) * gate)


def _classify(
    c: Config,
    graphs: dict[str, nnx.GraphDef],
    options: Options,
    native: bool,
    base: dict[str, Any],
    tiers: Sequence[Local],
    batch: Batch,
    dropout: Key[Array, " C"] | None = None,
) -> Float[Array, "C E labels"]:
    """A token classifier's mean where it is not ``native``: the frozen head works on tokens, else on their pool."""
    embeddings, pooler = (nnx.merge(graphs[name], gathered(base[name])) for name in ("embeddings", "pooler"))
    x = embeddings["norm"](embeddings["tok_embeddings"](batch.tokens))
    sight = look(c.layers, c.head_dim, batch, two_sided=True)
    each = kinds_of(c.layers), jnp.arange(len(c.layers)) == 0
    places = heads.places_of(batch, "first" if native and c.classifier_pooling == "cls" else "mean")
    x = stack.run_layers(
        *(graphs["layers"], base["layers"], tiers, x, sight, each),
        dropout=dropout,
        remat=options.remat,
        places=places,
    )
    x = nnx.merge(graphs["final"], base["final"])["final_norm"](x)

    def head(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return pooler["norm"](ACTIVATIONS[c.classifier_activation](pooler["dense"](x)))

    if native:
        pooled = heads.pool(x, batch, places)
        pooled = head(pooled.astype(options.dtype)).astype(jnp.float32)
    else:
        pooled = heads.pool(head(x), batch)
    return lora.per_client(partial(heads.classify, HEAD), [tier.weights.head for tier in tiers], pooled)


MODERN = {
    "modernbert": Family(
        build=_build,
        prefix="model.",
        architecture="ModernBert",
        containers={
            "embeddings": "embeddings.",
            "layers": "layers.{layer}.",
            "final": "",
            "pooler": "head.",
        },
        ignored=("classifier.", "decoder."),
        absent=("layers.0.attn_norm.weight", "layers.0.attn_norm.bias"),
    )
}
