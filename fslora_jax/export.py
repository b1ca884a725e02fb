"""Adapters as PEFT folders, which ``transformers`` and ``peft`` load as they are."""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fslora_jax.errors import UserError
from fslora_jax.lora import lora_scale
from fslora_jax.models.model import Naming
from fslora_jax.types import Adapter, Head

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
ROOT = "base_model.model."
LEAVES = {"kernel": "weight", "bias": "bias"}

POOLINGS = {
    "SEQ_CLS": ("the model's own sequence classifier", "", "logits = model(**batch).logits"),
    "TOKEN_CLS": (
        "a linear head on the mean of the token vectors",
        "\nThe head is linear, so the mean of tokens' logits over the attention mask is the text's logits."
        "\nIt is stored as a token classifier; the average follows it.\n",
        'mask = batch["attention_mask"][..., None]\n'
        "    logits = (model(**batch).logits * mask).sum(1) / mask.sum(1)",
    ),
}
"""PEFT's task type -> how an example becomes logits: in words, a note, and in code."""

CARD_TEXT = """\
---
base_model: {base_model_json}
library_name: peft
tags: [lora, federated-learning]
---
# LoRA adapter of rank {r} for {base_model}

Trained with Federated Sketching LoRA (arXiv 2501.19389) by fslora_jax. A `{architecture}` with labels
{labels}; an example is classified by {pooling}.
{note}
```python
import torch
from peft import PeftModel
from transformers import AutoTokenizer, {auto_class}

labels = {labels}
base = {base_model_json}
model = {auto_class}.from_pretrained(base, num_labels=len(labels))
model = PeftModel.from_pretrained(model, "path/of/this/folder").eval()
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(["The first text.", "Another one."], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    {logits}
print([labels[i] for i in logits.argmax(-1)])
```
"""


def write_adapter(
    folder: Path,
    adapter: Adapter,
    head: Head,
    *,
    naming: Naming,
    base_model: str,
    r: int,
    lora_alpha: float,
    use_rslora: bool,
    target_modules: Sequence[str],
    label_names: Sequence[str],
) -> None:
    """Writes weights, config and a model card, whole or not at all; an adapter already there is replaced.

    Args:
      folder: to write; its parents are made.
      adapter: of one model, without an axis of clients; every module of rank ``r``.
      head: the dense head, without an axis of clients.
      naming: where the modules sit in the Hugging Face class.
      base_model: hub id or path of the frozen model, as users of the adapter shall load it.
      r: rank; PEFT scales by ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
      lora_alpha: see ``r``.
      use_rslora: see ``r``.
      target_modules: as in ``lora.select_targets``.
      label_names: in the order of the logits.

    Raises:
      UserError: ``folder`` holds something else, or a module's rank is not ``r``.
    """
    for module, pair in adapter.items():
        if pair.a.shape[1] != r:
            raise UserError(f"adapter: {module} has rank {pair.a.shape[1]}; expected r = {r} in every module")
    config = {
        "peft_type": "LORA",
        "task_type": naming.task_type,
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_pattern(naming, target_modules),
        "modules_to_save": list(naming.head_modules),
        "inference_mode": True,
    }
    # PyTorch's loaders ask for the format; the labels have no place in PEFT's config.
    metadata = {"format": "pt", "label_names": json.dumps(list(label_names))}
    _check_free(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            save_file(dict(_tensors(adapter, head, naming)), fresh / WEIGHTS, metadata=metadata)
            _order_metadata(fresh / WEIGHTS)
            (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (fresh / CARD).write_text(_card(naming, base_model, r, label_names), encoding="utf-8")
            if folder.exists():
                folder.replace(Path(scratch) / "old")
            fresh.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error


def client_alpha(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """The ``lora_alpha`` of one client's adapter of rank k, to be written without rsLoRA.

    The client computes at scale ``s r / k``, where s is the global scale. Plain LoRA of rank k scales by
    ``alpha / k``, so its alpha is ``s r``, whatever k is.

    >>> client_alpha(64, 16, use_rslora=True)
    128.0
    """
    return lora_scale(r, lora_alpha, use_rslora) * r


def _check_free(folder: Path) -> None:
    """Only an adapter is replaced, never anything else of the user's."""
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: exists and is no adapter (it has no {CONFIG}); choose another folder")


def _tensors(adapter: Adapter, head: Head, naming: Naming) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under the name, and in the orientation, that PEFT itself writes."""
    for module, pair in adapter.items():
        for layer, (a, b) in enumerate(zip(*map(np.asarray, pair), strict=True)):
            path = ROOT + naming.layer_prefix.format(layer=layer) + module
            yield f"{path}.lora_A.weight", np.ascontiguousarray(a, np.float32)
            yield f"{path}.lora_B.weight", np.ascontiguousarray(b.T, np.float32)
    for module, leaves in head.items():
        for name, value in leaves.items():
            yield f"{ROOT}{module}.{LEAVES[name]}", np.ascontiguousarray(np.asarray(value, np.float32).T)


def _order_metadata(path: Path) -> None:
    """Sorts what safetensors writes in a random order, so that equal adapters are equal files."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(content[:8] + text.ljust(end - 8) + content[end:])


def _target_pattern(naming: Naming, target_modules: Sequence[str]) -> str:
    """A regular expression: PEFT looks for names all over the model, and a pooler has a ``dense``, too."""
    prefix = r"\d+".join(map(re.escape, naming.layer_prefix.split("{layer}")))
    return rf"{prefix}(.+\.)?({'|'.join(map(re.escape, target_modules))})"


def _card(naming: Naming, base_model: str, r: int, label_names: Sequence[str]) -> str:
    pooling, note, logits = POOLINGS[naming.task_type]
    return CARD_TEXT.format(
        base_model=base_model,
        base_model_json=json.dumps(base_model),
        auto_class=f"AutoModelFor{naming.architecture.partition('For')[2]}",
        architecture=naming.architecture,
        labels=json.dumps(list(label_names)),
        pooling=pooling,
        note=note,
        logits=logits,
        r=r,
    )
