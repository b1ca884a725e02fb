"""An adapter merged into its base: a model folder that needs neither PEFT nor this package."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from fslora_jax.adapters.files import fresh_folder
from fslora_jax.adapters.schema import LEAVES
from fslora_jax.errors import UserError
from fslora_jax.methods import Spec
from fslora_jax.models import Model, class_tensors
from fslora_jax.targets import full_names
from fslora_jax.tensors import INDEX, WHOLE, Tensor
from fslora_jax.types import Head, Trainable

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja"),
    "generation_config.json",
)
"""Files that go with a model and that merging does not change."""

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""Types of a file that are kept; all others, quantised ones too, become float32."""


def write_merged(
    folder: Path,
    base_folder: Path,
    model: Model,
    spec: Spec,
    weights: Trainable,
    *,
    label_names: Sequence[str],
    shard_bytes: int,
) -> None:
    """Writes ``W + s B A`` of every module, the head, ``config.json`` and the tokenizer, whole or not at all.

    Sums are float32, cast back to the type that the base's file has. One tensor is in memory at a time beside the
    shard that is written; a shard holds at most ``shard_bytes``, save where a single tensor is larger.

    Raises:
      UserError: ``folder`` holds something else than a model, or cannot be written.
    """
    if folder.resolve() == base_folder.resolve():
        raise UserError(f"{folder}: is the folder of the base model, which is kept; choose another folder")
    config, tensors = class_tensors(base_folder, model)
    head_type = _dtype(next(iter(tensors.values())))
    head = {name: value.astype(head_type) for name, value in _head_tensors(weights.head)}
    sizes = {name: int(np.prod(t.shape)) * _dtype(t).itemsize for name, t in tensors.items()}
    shards = _shards(sizes | {name: value.nbytes for name, value in head.items()}, shard_bytes)
    deltas = _deltas(model, spec, weights)
    with fresh_folder(folder, "config.json", "model") as fresh:
        for file, names in shards.items():
            content = {
                name: head[name] if name in head else _merged(tensors[name], deltas.get(name))
                for name in names
            }
            save_file(content, fresh / file, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {name: file for file, names in shards.items() for name in names}
            total = sum(sizes.values()) + sum(value.nbytes for value in head.values())
            _write_json(fresh / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        _write_json(fresh / "config.json", _config(config, model, head_type, label_names))
        for name in COMPANIONS:
            if (base_folder / name).is_file():
                shutil.copyfile(base_folder / name, fresh / name)


def _merged(tensor: Tensor, delta: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    value = tensor.read(tuple(slice(0, size) for size in tensor.shape))
    if delta is not None:
        b, a = delta
        value = np.asarray(value, np.float32) + b @ a
    return np.ascontiguousarray(value, _dtype(tensor))


def _dtype(tensor: Tensor) -> np.dtype:
    return DTYPES.get(tensor.kind, np.dtype(np.float32))


def _deltas(model: Model, spec: Spec, weights: Trainable) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of a weight -> the factors ``s B`` and ``A`` of what is added to it."""
    scales, found = spec.scales(), {}
    for module, pair in weights.adapter.items():
        names = full_names(module, spec.targets[module], model.naming.layer_prefix)
        for name, a, b in zip(names, np.asarray(pair.a), np.asarray(pair.b), strict=True):
            found[f"{name}.weight"] = (scales[module] * b.T, a)
    return found


def _head_tensors(head: Head) -> Iterator[tuple[str, np.ndarray]]:
    for module, leaves in head.items():
        for leaf, value in leaves.items():
            yield f"{module}.{LEAVES[leaf]}", np.ascontiguousarray(np.asarray(value, np.float32).T)


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> the tensors in it, in their order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _config(
    config: Mapping[str, Any], model: Model, dtype: np.dtype, label_names: Sequence[str]
) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if k not in ("torch_dtype", "_name_or_path")}
    labels = {
        "num_labels": len(label_names),
        "id2label": {str(n): name for n, name in enumerate(label_names)},
        "label2id": {name: n for n, name in enumerate(label_names)},
    }
    has_labels = model.naming.task_type != "CAUSAL_LM"
    return (
        kept
        | {"architectures": [model.naming.architecture], "dtype": dtype.name}
        | (labels if has_labels else {})
    )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
