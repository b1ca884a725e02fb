"""The decoder families: what a row of this table reads of ``config.json`` is all that sets them apart."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from fslora_jax.errors import UserError
from fslora_jax.models.activations import ACTIVATIONS
from fslora_jax.models.decoder import decoder
from fslora_jax.models.decoder_layer import Config, Kind
from fslora_jax.models.family import Family, Options
from fslora_jax.models.fields import Fields
from fslora_jax.models.model import Model, Naming
from fslora_jax.models.rope import FULL, SLIDING, Rope, read_rope, read_two_ropes


def _decoder(
    family: Family,
    fields: Fields,
    options: Options,
    *,
    read: Callable[[Fields], Config],
    classes: dict[str, str],
) -> Model:
    """``classes`` are the classes of transformers by PEFT's task type."""
    c = read(fields)
    _check_heads(c)
    task, pooling = ("SEQ_CLS", "last") if options.pooling == "native" else ("TOKEN_CLS", "mean")
    if options.task == "causal":
        task = "CAUSAL_LM"
    if task not in classes:
        raise UserError(
            f"model.pooling is {options.pooling!r}, which transformers has no class for here; set model.pooling: native"
        )
    head = () if task == "CAUSAL_LM" else ("score",)
    naming = Naming(family.prefix + family.containers["layers"], task, head, classes[task])
    return decoder(c, head, pooling, options, naming)


def _check_heads(c: Config) -> None:
    if c.num_attention_heads % c.num_key_value_heads:
        raise UserError(
            f"config.json: num_attention_heads is {c.num_attention_heads}; "
            f"expected a multiple of num_key_value_heads, {c.num_key_value_heads}"
        )
    if c.head_dim % 2:
        raise UserError(f"config.json: head_dim is {c.head_dim}; expected an even number, to rotate pairs")


def _common(fields: Fields, *, activation: str = "hidden_act", tied: bool = False) -> dict[str, Any]:
    """The fields that all decoders have; what may be missing has the default of transformers."""
    width, heads = fields.read("hidden_size", int), fields.read("num_attention_heads", int)
    fields.require(is_encoder_decoder=False, use_bidirectional_attention=False)
    return {
        "vocab_size": fields.read("vocab_size", int),
        "hidden_size": width,
        "intermediate_size": fields.read("intermediate_size", int),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.read("num_key_value_heads", int, heads),
        "head_dim": fields.read("head_dim", int, width // heads),
        "hidden_act": fields.choose(activation, ACTIVATIONS),
        "max_position_embeddings": fields.read("max_position_embeddings", int),
        "rms_norm_eps": fields.read("rms_norm_eps", float),
        "initializer_range": fields.read("initializer_range", float, 0.02),
        "tie_word_embeddings": fields.read("tie_word_embeddings", bool, tied),
    }


def _alike(fields: Fields, kind: Kind) -> tuple[Kind, ...]:
    return (kind,) * fields.read("num_hidden_layers", int)


def by_type(fields: Fields, kinds: dict[str, Kind], slides: Callable[[int], bool]) -> tuple[Kind, ...]:
    """Each layer's kind, from ``layer_types`` or by the family's rule of which number slides."""
    count = fields.read("num_hidden_layers", int)
    rule = [SLIDING if slides(n) else FULL for n in range(count)]
    names = fields.optional("layer_types", list) or rule
    if len(names) != count or not all(name in kinds for name in names):
        raise UserError(
            f"config.json: layer_types is {names}; expected num_hidden_layers = {count} of {list(kinds)}"
        )
    return tuple(kinds[name] for name in names)


def _llama(fields: Fields) -> Config:
    """Llama 2 to 3.2, and SmolLM2."""
    fields.require(rope_interleaved=False)
    fields.ignore("pretraining_tp", "is_llama_config", "transformers.js_config")
    bias = fields.read("attention_bias", bool, False)
    return Config(
        **_common(fields),
        layers=_alike(fields, Kind(None, read_rope(fields))),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.read("mlp_bias", bool, False),
    )


def _mistral(fields: Fields) -> Config:
    window = fields.optional("sliding_window", int, there=True)
    return Config(**_common(fields), layers=_alike(fields, Kind(window, read_rope(fields))))


def _qwen(fields: Fields, **differing: Any) -> Config:
    """Qwen 2 and 3: the layers from ``max_window_layers`` on slide, where sliding is on at all."""
    fields.require(use_mrope=False)
    kinds = {FULL: Kind(None, read_rope(fields))}
    on = fields.read("use_sliding_window", bool, False)
    window = fields.optional("sliding_window", int, there=on)
    first = fields.read("max_window_layers", int, None if on else 0, zero=True)
    if on and window is not None:
        kinds[SLIDING] = kinds[FULL]._replace(window=window)
    layers = by_type(fields, kinds, lambda n: SLIDING in kinds and n >= first)
    return Config(**_common(fields), layers=layers, **differing)


def _qwen2(fields: Fields) -> Config:
    return _qwen(fields, qkv_bias=True)


def _qwen3(fields: Fields) -> Config:
    bias = fields.read("attention_bias", bool, False)
    return _qwen(fields, qkv_bias=bias, output_bias=bias, qk_norm=True)


def _gemma(fields: Fields, **differing: Any) -> Config:
    """What Gemma 2 and 3 share; ``hidden_act`` is an older name that nothing reads any more."""
    fields.ignore("hidden_act")
    common = _common(fields, activation="hidden_activation", tied=True)
    bias = fields.read("attention_bias", bool, False)
    return Config(
        **common,
        **differing,
        qkv_bias=bias,
        output_bias=bias,
        post_norms=True,
        norm_offset=1.0,
        embedding_scale=math.sqrt(common["hidden_size"]),
        attention_scale=1 / math.sqrt(fields.read("query_pre_attn_scalar", float)),
    )


def _gemma2(fields: Fields) -> Config:
    rope = read_rope(fields)
    kinds = {FULL: Kind(None, rope), SLIDING: Kind(fields.read("sliding_window", int), rope)}
    return _gemma(
        fields,
        layers=by_type(fields, kinds, lambda n: n % 2 == 0),
        attention_cap=fields.optional("attn_logit_softcapping", float, there=True),
        logit_cap=fields.optional("final_logit_softcapping", float, there=True),
    )


def _gemma3(fields: Fields) -> Config:
    """Gemma 3's text models: of every six layers five slide, at positions that rotate faster."""
    fields.require(attn_logit_softcapping=None)
    fields.ignore("_sliding_window_pattern")
    every = fields.read("sliding_window_pattern", int, 6)
    far, near = _two_ropes(fields)
    kinds = {FULL: Kind(None, far), SLIDING: Kind(fields.read("sliding_window", int), near)}
    return _gemma(
        fields,
        layers=by_type(fields, kinds, lambda n: (n + 1) % every != 0),
        qk_norm=True,
        logit_cap=fields.optional("final_logit_softcapping", float),
    )


def _two_ropes(fields: Fields) -> tuple[Rope, Rope]:
    """Gemma 3's rotations of full and of sliding layers; in the older form only the first is ever scaled."""
    local = fields.read("rope_local_base_freq", float, 10_000.0)
    both = read_two_ropes(fields, fields.read("rope_theta", float, 1_000_000.0), local)
    return both or (read_rope(fields, theta=1_000_000.0), Rope(local))


_CONTAINERS = {"embeddings": "", "layers": "layers.{layer}.", "final": "", "output": ""}
_SUFFIXES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "CAUSAL_LM": "ForCausalLM",
}


def _row(name: str, read: Callable[[Fields], Config], **classes: str) -> Family:
    named = {task: name + suffix for task, suffix in _SUFFIXES.items()}
    return Family(
        build=partial(_decoder, read=read, classes=classes or named),
        prefix="model.",
        architecture=name,
        containers=_CONTAINERS,
        ignored=("lm_head.", "score."),
        tied={"lm_head.weight": "embed_tokens.weight"},
    )


DECODERS = {
    "llama": _row("Llama", _llama),
    "mistral": _row("Mistral", _mistral),
    "qwen2": _row("Qwen2", _qwen2),
    "qwen3": _row("Qwen3", _qwen3),
    "gemma2": _row("Gemma2", _gemma2),
    "gemma3_text": _row(
        "Gemma3", _gemma3, SEQ_CLS="Gemma3TextForSequenceClassification", CAUSAL_LM="Gemma3ForCausalLM"
    ),
}
