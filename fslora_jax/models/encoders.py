"""The encoder families: what a row of this table says, plus ``config.json``, is all that sets them apart."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fslora_jax.errors import UserError
from fslora_jax.models.activations import ACTIVATIONS
from fslora_jax.models.encoder import RELATIVE_BUCKETS, Config, Names, Output, Variant, encoder
from fslora_jax.models.family import Family, Options
from fslora_jax.models.fields import Fields, check_choice
from fslora_jax.models.model import Model, Naming


class Traits(NamedTuple):
    """One family among BERT's kin.

    ``head``, ``between`` and ``pooler`` describe the family's own classifier, as ``encoder.Variant`` has them;
    ``after_padding`` says that position 0 is the row after ``pad_token_id``; ``output`` is the language model's head,
    where transformers has one; its activation is ``hidden_act`` if it is empty. Numbers of ``encoder.Config`` may
    be ``renamed`` in ``config.json``, or ``given`` by the family; fields that are ``required`` have one value,
    ``unused`` ones change nothing.
    """

    names: Names
    head: tuple[str, ...]
    between: Callable[[jax.Array], jax.Array] = jnp.tanh
    pooler: bool = False
    after_padding: bool = False
    relative: bool = False
    output: Output | None = None
    renamed: Mapping[str, str] = MappingProxyType({})
    given: Mapping[str, Any] = MappingProxyType({})
    required: Mapping[str, Any] = MappingProxyType({})
    unused: tuple[str, ...] = ()


def _build(family: Family, fields: Fields, options: Options, *, traits: Traits) -> Model:
    check_choice("model.task", options.task, ("sequence", "causal") if traits.output else ("sequence",))
    causal = options.task == "causal"
    if fields.read("is_decoder", bool, False) != causal:
        raise UserError(
            f"config.json: is_decoder is {not causal}; expected {causal}, as model.task is {options.task!r}; "
            "set the one that you mean"
        )
    fields.require(
        position_embedding_type="absolute",
        add_cross_attention=False,
        is_encoder_decoder=False,
        tie_word_embeddings=True,
        **traits.required,
    )
    fields.ignore(*traits.unused)
    c = fields.fill(Config, traits.renamed, traits.given)
    _check(c, fields, traits.renamed)
    native = options.pooling == "native"
    variant = Variant(
        names=traits.names,
        pooling="first" if native else "mean",
        pooler=native and traits.pooler and not causal,
        head=traits.head if native else ("classifier",),
        between=traits.between,
        first_position=fields.read("pad_token_id", int, zero=True) + 1 if traits.after_padding else 0,
        relative=traits.relative,
    )
    if causal and traits.output:
        output = traits.output._replace(act=traits.output.act or c.hidden_act)
        variant = variant._replace(head=(), output=output)
    return encoder(c, variant, options, _naming(family, variant, native))


def _check(c: Config, fields: Fields, renamed: Mapping[str, str]) -> None:
    width, heads, act = (
        renamed.get(name, name) for name in ("hidden_size", "num_attention_heads", "hidden_act")
    )
    fields.choose(act, ACTIVATIONS)
    if c.hidden_size % c.num_attention_heads:
        raise UserError(
            f"config.json: {width} is {c.hidden_size}; expected a multiple of {heads}, {c.num_attention_heads}"
        )


def _naming(family: Family, variant: Variant, native: bool) -> Naming:
    # A linear head on a mean of tokens equals the mean of a token classifier's logits.
    task, suffix = (
        ("CAUSAL_LM", variant.output.suffix)
        if variant.output
        else ("SEQ_CLS", "ForSequenceClassification")
        if native
        else ("TOKEN_CLS", "ForTokenClassification")
    )
    return Naming(
        layer_prefix=family.prefix + family.containers["layers"],
        task_type=task,
        head_modules=tuple(dict.fromkeys(name.partition(".")[0] for name in variant.head)),
        architecture=family.architecture + suffix,
    )


_BERT = Names(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
_MPNET = Names(
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    mlp_norm="output.LayerNorm",
)
_DISTILBERT = Names(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)

_CONTAINERS = {"embeddings": "embeddings.", "layers": "encoder.layer.{layer}."}
_IGNORED = ("classifier.", "qa_outputs.", "pooler.", "embeddings.position_ids", "embeddings.token_type_ids")
_WORDS = "embeddings.word_embeddings.weight"
_DENSE_HEAD = ("classifier.dense", "classifier.out_proj")

_BERT_OUTPUT = Output("transform.dense", "transform.LayerNorm", act="", suffix="LMHeadModel")
_ROBERTA_OUTPUT = Output("dense", "layer_norm", act="gelu", suffix="ForCausalLM")

_ROBERTA = Family(
    build=partial(_build, traits=Traits(_BERT, _DENSE_HEAD, after_padding=True, output=_ROBERTA_OUTPUT)),
    prefix="roberta.",
    architecture="Roberta",
    containers=_CONTAINERS | {"output": "lm_head."},
    ignored=("lm_head.", *_IGNORED),
    tied={"lm_head.decoder.weight": _WORDS, "lm_head.decoder.bias": "lm_head.bias"},
)

ENCODERS = {
    "bert": Family(
        build=partial(_build, traits=Traits(_BERT, head=("classifier",), pooler=True, output=_BERT_OUTPUT)),
        prefix="bert.",
        architecture="Bert",
        containers=_CONTAINERS | {"pooler": "pooler.", "output": "cls.predictions."},
        ignored=("cls.", *_IGNORED),
        tied={
            "cls.predictions.decoder.weight": _WORDS,
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA._replace(architecture="XLMRoberta"),
    "mpnet": Family(
        build=partial(
            _build,
            traits=Traits(
                _MPNET,
                _DENSE_HEAD,
                after_padding=True,
                relative=True,
                given={"type_vocab_size": 0},
                # transformers computes with these two, whatever the file says.
                required={"pad_token_id": 1, "relative_attention_num_buckets": RELATIVE_BUCKETS},
            ),
        ),
        prefix="mpnet.",
        architecture="MPNet",
        containers=_CONTAINERS | {"relative": "encoder."},
        ignored=("lm_head.", *_IGNORED),
    ),
    "distilbert": Family(
        build=partial(
            _build,
            traits=Traits(
                _DISTILBERT,
                head=("pre_classifier", "classifier"),
                between=jax.nn.relu,
                renamed={
                    "hidden_size": "dim",
                    "num_hidden_layers": "n_layers",
                    "num_attention_heads": "n_heads",
                    "intermediate_size": "hidden_dim",
                    "hidden_act": "activation",
                },
                given={"type_vocab_size": 0, "layer_norm_eps": 1e-12},
                # The position table is in the file, however it was made.
                unused=(
                    "sinusoidal_pos_embds",
                    "tie_weights_",
                    "dropout",
                    "qa_dropout",
                    "seq_classif_dropout",
                ),
            ),
        ),
        prefix="distilbert.",
        architecture="DistilBert",
        containers=_CONTAINERS | {"layers": "transformer.layer.{layer}."},
        ignored=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier.", *_IGNORED),
    ),
}
