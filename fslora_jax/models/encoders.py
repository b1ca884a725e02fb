"""The encoder families: what a row of this table says, plus ``config.json``, is all that sets them apart."""

from functools import partial

from fslora_jax.errors import UserError
from fslora_jax.models.encoder import Config, Variant, encoder
from fslora_jax.models.family import Family, Options
from fslora_jax.models.fields import Fields, check_choice
from fslora_jax.models.layers import ACTIVATIONS
from fslora_jax.models.model import Model, Naming


def _bert(
    family: Family,
    fields: Fields,
    options: Options,
    *,
    native_head: tuple[str, ...],
    native_pooler: bool,
    after_padding: bool,
) -> Model:
    """BERT and its kin; ``after_padding`` says that position 0 is the row after ``pad_token_id``."""
    check_choice("model.task", options.task, ("sequence",))
    fields.require(
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
        tie_word_embeddings=True,
    )
    c = fields.fill(Config)
    fields.choose("hidden_act", ACTIVATIONS)
    if c.hidden_size % c.num_attention_heads:
        raise UserError(
            f"config.json: hidden_size is {c.hidden_size}; "
            f"expected a multiple of num_attention_heads, {c.num_attention_heads}"
        )
    native = options.pooling == "native"
    variant = Variant(
        pooling="first" if native else "mean",
        pooler=native and native_pooler,
        head=native_head if native else ("classifier",),
        first_position=fields.read("pad_token_id", int, zero=True) + 1 if after_padding else 0,
    )
    # A linear head on a mean of tokens equals the mean of a token classifier's logits.
    task, suffix = ("SEQ_CLS", "Sequence") if native else ("TOKEN_CLS", "Token")
    architecture = f"{family.architecture}For{suffix}Classification"
    naming = Naming(family.prefix + family.containers["layers"], task, ("classifier",), architecture)
    return encoder(c, variant, options, naming)


_CONTAINERS = {"embeddings": "embeddings.", "layers": "encoder.layer.{layer}.", "pooler": "pooler."}
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

ENCODERS = {
    "bert": Family(
        build=partial(_bert, native_head=("classifier",), native_pooler=True, after_padding=False),
        prefix="bert.",
        architecture="Bert",
        containers=_CONTAINERS,
        ignored=("cls.", "classifier.", "qa_outputs.", "pooler.", *_BUFFERS),
    ),
    "roberta": Family(
        build=partial(
            _bert,
            native_head=("classifier.dense", "classifier.out_proj"),
            native_pooler=False,
            after_padding=True,
        ),
        prefix="roberta.",
        architecture="Roberta",
        containers=_CONTAINERS,
        ignored=("lm_head.", "classifier.", "qa_outputs.", "pooler.", *_BUFFERS),
    ),
}
