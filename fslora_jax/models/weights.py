"""Hugging Face checkpoints to base weights, through one table, strict in both directions."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from fslora_jax.errors import UserError
from fslora_jax.models.families import build_model, find_family
from fslora_jax.models.family import Family
from fslora_jax.models.model import Model

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
"""Flax's name of a leaf -> torch's; a kernel is the transposed weight."""

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Source(NamedTuple):
    """Where one slice of a base leaf comes from: tensor name and shape in the file, leaf and layer here."""

    name: str
    shape: tuple[int, ...]
    leaf: int
    layer: int | None
    transpose: bool


def load_model(
    folder: Path,
    *,
    num_labels: int,
    pooling: str,
    dtype: str = "float32",
    lora_dropout: float = 0.0,
) -> tuple[Model, dict[str, Any]]:
    """The model in a folder with ``config.json`` and ``model.safetensors``, and its base weights.

    The base is host memory (NumPy): place it once with ``jax.device_put``. Arguments as ``build_model``.

    Raises:
      UserError: a file is missing or damaged, or a tensor is unknown, missing, doubled or of another shape.
    """
    config = _read_json(folder / "config.json")
    model = build_model(
        config, num_labels=num_labels, pooling=pooling, dtype=dtype, lora_dropout=lora_dropout
    )
    abstract = jax.eval_shape(model.init_base, jax.random.key(0))
    return model, read_base(folder / "model.safetensors", find_family(config), abstract)


def read_base(path: Path, family: Family, abstract: dict[str, Any]) -> dict[str, Any]:
    """Fills an abstract base from a safetensors file; layers are stacked on a leading axis."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the weights as one safetensors file, not pickled, not sharded"
        )
    leaves, tree = jax.tree.flatten(abstract)
    base = [np.empty(leaf.shape, leaf.dtype) for leaf in leaves]
    try:
        with safe_open(path, framework="numpy") as file:
            found = _match(path, family, file, list(sources(family, abstract)))
            for source, key in found:
                value = np.asarray(file.get_tensor(key))
                target = base[source.leaf] if source.layer is None else base[source.leaf][source.layer]
                target[...] = value.T if source.transpose else value
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); fetch it again") from error
    return jax.tree.unflatten(tree, base)


def sources(family: Family, abstract: dict[str, Any]) -> Iterator[Source]:
    """The table: every tensor that the base needs, named without the family's prefix."""
    for n, (path, leaf) in enumerate(jax.tree.leaves_with_path(abstract)):
        container, *_, module, kind = (entry.key for entry in path)
        template = f"{family.containers[container]}{module}.{LEAVES[kind]}"
        stacked = "{layer}" in template
        shape = leaf.shape[1:] if stacked else leaf.shape
        transpose = kind == "kernel"
        for layer in range(leaf.shape[0]) if stacked else [None]:
            name = template.format(layer=layer)
            yield Source(name, shape[::-1] if transpose else shape, n, layer, transpose)


def _match(path: Path, family: Family, file: Any, table: list[Source]) -> list[tuple[Source, str]]:
    keys: dict[str, str] = {}
    for key in sorted(file.keys()):
        name = canonical(key, family)
        if name in keys:
            raise UserError(
                f"{path}: {keys[name]!r} and {key!r} are the same tensor {name!r}; expected one of them"
            )
        keys[name] = key
    missing = [source.name for source in table if source.name not in keys]
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all); {_advice(missing[0])}"
        )
    known = {source.name for source in table}
    unknown = [key for name, key in keys.items() if name not in known and not name.startswith(family.ignored)]
    if unknown:
        raise UserError(
            f"{path}: unknown tensor {unknown[0]!r} ({len(unknown)} in all); "
            f"expected {len(table)} tensors of config.json's model, such as {table[0].name!r}"
        )
    for source in table:
        _check_tensor(path, source, keys[source.name], file.get_slice(keys[source.name]))
    return [(source, keys[source.name]) for source in table]


def canonical(key: str, family: Family) -> str:
    """A tensor's name without the family's prefix and with today's names of norms."""
    name = key.removeprefix(family.prefix)
    for old, new in LEGACY.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _check_tensor(path: Path, source: Source, key: str, found: Any) -> None:
    shape = tuple(found.get_shape())
    if shape != source.shape:
        raise UserError(
            f"{path}: tensor {key!r} has shape {shape}; expected {source.shape}, as config.json says"
        )
    if found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{path}: tensor {key!r} holds {found.get_dtype()}; expected floats, not quantised")


def _advice(name: str) -> str:
    if name.startswith("pooler."):
        return "set model.pooling: mean, which needs no pooler"
    return "take the checkpoint that config.json belongs to"


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}; expected an object of fields")
    return config
