"""Tiny random base models with an adapter and a head, and the logits of both in PEFT and here."""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contract import KINDS, fields_of
from tokenizers import Tokenizer, models, pre_tokenizers

from fslora_jax.adapters.merge import write_merged
from fslora_jax.adapters.spec import adapter_config, client_config, model_spec
from fslora_jax.adapters.write import write_adapter
from fslora_jax.config import LoraConfig
from fslora_jax.methods import Spec
from fslora_jax.models import Model, load_model
from fslora_jax.types import Adapter, Batch, Head, Local, Pair, Trainable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

R, ALPHA, LABELS = 8, 12.0, ("bad", "so so", "good")
WORDS = ["[UNK]", "[PAD]", "a", "film", "that", "I", "will", "see", "again", "never"]
SIZES = {"vocab_size": len(WORDS), "max_position_embeddings": 40, "initializer_range": 0.4}
PATTERNS = {
    "rank_pattern": {"output.dense": 3, "query": 5},
    "alpha_pattern": {"query": 7.0, "intermediate.dense": 20.0},
}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "native", {}),
    "bert-mean": ("bert", "mean", {"target_modules": ["query", "attention.output.dense"]}),
    # PEFT's own matching would also take the pooler's, the classifier's and the attention's "dense".
    "bert-dense": ("bert", "native", {"target_modules": ["dense"]}),
    "bert-patterns": ("bert", "native", {"target_modules": "all-linear", **PATTERNS}),
    "bert-regex": ("bert", "mean", {"target_modules": r".*\.(query|output\.dense)", "use_rslora": False}),
    "bert-causal": ("bert", "causal", {"target_modules": ["dense"]}),
    "roberta": ("roberta", "native", {"target_modules": ["query", "intermediate.dense"]}),
    "roberta-mean": ("roberta", "mean", {}),
    "roberta-causal": ("roberta", "causal", {}),
    "xlm-roberta": ("xlm-roberta", "native", {}),
    "mpnet": ("mpnet", "native", {"target_modules": ["q", "output.dense"]}),
    "distilbert": ("distilbert", "native", {"target_modules": ["q_lin", "lin1"]}),
    "modernbert": ("modernbert", "native", {"target_modules": "all-linear"}),
    "modernbert-mean": ("modernbert", "mean", {}),
    "llama": ("llama", "native", {"target_modules": "all-linear", "rank_pattern": {"mlp.up_proj": 3}}),
    "llama-causal": ("llama", "causal", {}),
    "mistral": ("mistral", "native", {}),
    "qwen2-causal": ("qwen2", "causal", {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
    "qwen3-causal": ("qwen3", "causal", {"target_modules": "all-linear"}),
    "gemma2-causal": ("gemma2", "causal", {}),
    "gemma3-causal": ("gemma3_text", "causal", {}),
}
"""Name of a row -> (a row of the contract, settings of the adapter beyond r and lora_alpha)."""


class Case(NamedTuple):
    """One base model in ``folder``, and what a run on it could have trained."""

    folder: Path
    model: Model
    base: dict[str, Any]
    lora: LoraConfig
    spec: Spec
    adapter: Adapter
    head: Head


def make_case(folder: Path, row: str) -> Case:
    """Writes the base model with a tokenizer, and draws an adapter and a head for it."""
    family, kind, settings = ROWS[row]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields_of(family, kind) | SIZES)
    KINDS[kind][0].from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    model, base = load_model(folder, num_labels=len(LABELS), **KINDS[kind][1])
    lora = LoraConfig.model_validate({"r": R, "lora_alpha": ALPHA, **settings})
    spec, rng = model_spec(lora, model), np.random.default_rng(1)
    adapter = {
        m: Pair(*(jnp.asarray(0.2 * rng.standard_normal((t.layers, r, d)), "float32") for d in (t.i, t.o)))
        for (m, t), r in zip(spec.targets.items(), spec.ranks().values(), strict=True)
    }
    shapes = jax.eval_shape(model.init_head, jax.random.key(0))
    head = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    return Case(folder, model, base, lora, spec, adapter, head)


def write(folder: Path, case: Case, *, k: int | None = None, adapter: Adapter | None = None) -> Path:
    """The global adapter as a PEFT folder, or one of a client of rank ``k``."""
    config = adapter_config(case.lora, case.spec, case.model, str(case.folder))
    if k is not None:
        config = client_config(config, case.spec, case.model, k)
    factors = case.adapter if adapter is None else adapter
    write_adapter(folder, factors, case.head, config, naming=case.model.naming, label_names=LABELS)
    return folder


def merge(folder: Path, case: Case, shard_bytes: int = 10**9) -> Path:
    """The base with the global adapter in it."""
    weights = Trainable(case.adapter, case.head)
    write_merged(
        folder, case.folder, case.model, case.spec, weights, label_names=LABELS, shard_bytes=shard_bytes
    )
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Other values in ``adapter_config.json``."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def torch_base(case: Case):
    """The model in transformers, with a random head."""
    kind = {"SEQ_CLS": "native", "TOKEN_CLS": "mean", "CAUSAL_LM": "causal"}[case.model.naming.task_type]
    return KINDS[kind][0].from_pretrained(case.folder, num_labels=len(LABELS)).eval()


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of two texts, the second one shorter."""
    tokens = np.array([[2, 3, 4, 5, 6, 7, 8], [5, 6, 9, 7, 1, 1, 1]])
    return tokens, (tokens != 1).astype(int)


def torch_logits(model: Any, task_type: str, precise: bool = False) -> np.ndarray:
    """Of both texts; a mean-pooled head is stored as a token classifier, and padding predicts nothing.

    ``precise`` makes a classifier compute in float64: a small logit is a difference of large terms.
    """
    tokens, mask = map(torch.tensor, texts())
    if precise and task_type != "CAUSAL_LM":  # whose masks of float64 overflow a softmax in float32
        model = model.double()
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask).logits
    if task_type == "TOKEN_CLS":
        logits = (logits * mask[..., None]).sum(1) / mask[..., None].sum(1)
    if task_type == "CAUSAL_LM":
        logits = logits * mask[..., None]
    return logits.numpy()


def jax_logits(case: Case, adapter: Adapter, scale: dict[str, Any]) -> np.ndarray:
    """Of both texts, with factors of any ranks and a scale for each component."""
    tokens, mask = map(jnp.asarray, texts())
    batch = Batch(
        tokens=tokens,
        segments=mask * jnp.array([[1], [2]]),
        positions=mask * jnp.arange(tokens.shape[1]),
        types=jnp.zeros_like(tokens),
        labels=jnp.zeros(2, int),
        weights=jnp.ones(2),
        places=tokens[:, :0],
    )
    local = Local(Trainable(adapter, case.head), scale, trains={}, index={})
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (local, batch))
    logits = np.asarray(case.model.apply(case.base, [one[0]], one[1])[0])
    return logits * texts()[1][..., None] if case.model.naming.task_type == "CAUSAL_LM" else logits


def global_logits(case: Case) -> np.ndarray:
    """Of the global adapter."""
    scales = case.spec.scales()
    return jax_logits(
        case, case.adapter, {m: jnp.full(p.a.shape[:2], scales[m]) for m, p in case.adapter.items()}
    )
