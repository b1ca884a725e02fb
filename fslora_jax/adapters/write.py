"""Adapters as PEFT folders, which ``transformers`` and ``peft`` load as they are."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fslora_jax.adapters.card import model_card
from fslora_jax.adapters.files import fresh_folder
from fslora_jax.adapters.read import read_adapter
from fslora_jax.adapters.schema import CARD, CONFIG, LEAVES, ROOT, WEIGHTS, AdapterConfig
from fslora_jax.models import Naming
from fslora_jax.types import Adapter, Head


def write_adapter(
    folder: Path,
    adapter: Adapter,
    head: Head,
    config: AdapterConfig,
    *,
    naming: Naming,
    label_names: Sequence[str],
) -> None:
    """Writes weights, config and a model card, whole or not at all; an adapter already there is replaced.

    Args:
      folder: to write; its parents are made.
      adapter: of one model, without an axis of clients.
      head: the dense head, without an axis of clients.
      config: what goes with these tensors, as `spec.adapter_config` makes it.
      naming: where the modules sit in the Hugging Face class.
      label_names: in the order of the logits.

    Raises:
      UserError: ``folder`` holds something else, or tensors and config do not fit each other.
    """
    # PyTorch's loaders ask for the format; the labels have no place in PEFT's config.
    metadata = {"format": "pt", "label_names": json.dumps(list(label_names))}
    with fresh_folder(folder, CONFIG, "adapter") as fresh:
        save_file(dict(named_tensors(adapter, head, naming)), fresh / WEIGHTS, metadata=metadata)
        _order_metadata(fresh / WEIGHTS)
        (fresh / CONFIG).write_text(config.dump(), encoding="utf-8")
        (fresh / CARD).write_text(model_card(naming, config, label_names), encoding="utf-8")
        read_adapter(fresh)  # what cannot be read is not left behind


def named_tensors(adapter: Adapter, head: Head, naming: Naming) -> Iterator[tuple[str, np.ndarray]]:
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
