"""Which tensor of a Hugging Face checkpoint each part of a base is made of: one table, strict in both directions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fslora_jax.errors import UserError
from fslora_jax.models.family import Family
from fslora_jax.models.quantise import is_packed, shape_of
from fslora_jax.tensors import Checkpoint, Tensor, equal

FLOATS = ("F64", "F32", "F16", "BF16", "Q8_0", "Q4_1")
"""Tensor types that a checkpoint may have."""

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
"""Flax's name of a leaf -> torch's; a kernel is the transposed weight."""

OLD_BUFFERS = (".rotary_emb.inv_freq",)
"""What old files hold of layers beside weights: numbers that follow from the config."""

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Source(NamedTuple):
    """Where one slice of a base leaf comes from: tensor name and shape in the file, leaf and layer here."""

    name: str
    shape: tuple[int, ...]
    leaf: int
    layer: int | None
    transpose: bool


def sources(family: Family, abstract: dict[str, Any]) -> Iterator[Source]:
    """The table: every tensor that the base needs, named without the family's prefix."""
    for n, (path, leaf) in enumerate(jax.tree.leaves_with_path(abstract, is_leaf=is_packed)):
        whole = shape_of(leaf) if is_packed(leaf) else leaf.shape
        container, *within, kind = (entry.key for entry in path)
        module = "".join(f"{name}." for name in within[-1:])  # none has a bias that is the container's own
        template = f"{family.containers[container]}{module}{LEAVES[kind]}"
        stacked = "{layer}" in template
        shape = whole[1:] if stacked else whole
        transpose = kind == "kernel"
        for layer in range(whole[0]) if stacked else [None]:
            name = template.format(layer=layer)
            yield Source(name, shape[::-1] if transpose else shape, n, layer, transpose)


def match(checkpoint: Checkpoint, family: Family, table: list[Source]) -> list[Tensor]:
    """The tensor of every source, where the two sides have the same names and shapes.

    Raises:
      UserError: a tensor is unknown, missing, doubled, or of another shape or kind.
    """
    path, keys = checkpoint.path, {}
    for key in sorted(checkpoint.tensors):
        name = canonical(key, family)
        if name in keys:
            raise UserError(
                f"{path}: {keys[name]!r} and {key!r} are the same tensor {name!r}; expected one of them"
            )
        keys[name] = key
    missing = [source.name for source in table if source.name not in keys | dict.fromkeys(family.absent)]
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all); {_advice(missing[0])}"
        )
    known = {source.name for source in table} - set(family.absent)
    spare = {name for name in keys if name.startswith(family.ignored) or name.endswith(OLD_BUFFERS)}
    unknown = [key for name, key in keys.items() if name not in known | spare]
    if unknown:
        raise UserError(
            f"{path}: unknown tensor {unknown[0]!r} ({len(unknown)} in all); "
            f"expected {len(table)} tensors of config.json's model, such as {table[0].name!r}"
        )
    tensors = [
        checkpoint.tensors[keys[source.name]] if source.name in keys else _ones(path, source)
        for source in table
    ]
    for source, tensor in zip(table, tensors, strict=True):
        _check_tensor(source, tensor)
    return tensors


def _ones(path: Path, source: Source) -> Tensor:
    """What stands for a tensor that files of a family never hold."""
    return Tensor(
        path, source.name, source.shape, "F32", lambda at: np.ones([s.stop - s.start for s in at], np.float32)
    )


def check_tied(checkpoint: Checkpoint, family: Family, used: set[str]) -> None:
    """Refuses an output of its own beside a config that ties it; none, or a copy, is fine, and so is one in use.

    Raises:
      UserError: there is one.
    """
    by_name = {canonical(key, family): tensor for key, tensor in checkpoint.tensors.items()}
    for name, original in family.tied.items():
        table, output = by_name.get(original), by_name.get(name)
        if table is not None and output is not None and name not in used and not equal(table, output):
            raise UserError(
                f"{output.path}: tensor {output.name!r} is not a copy of {table.name!r}, but config.json has "
                "tie_word_embeddings: true, which uses the latter for both; set it to false to use the file's own"
            )


def canonical(key: str, family: Family) -> str:
    """A tensor's name without the family's prefix and with today's names of norms."""
    name = key.removeprefix(family.prefix)
    for old, new in LEGACY.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _check_tensor(source: Source, found: Tensor) -> None:
    if found.shape != source.shape:
        raise UserError(
            f"{found.path}: tensor {found.name!r} has shape {found.shape}; expected {source.shape}, as config.json says"
        )
    if found.kind not in FLOATS:
        raise UserError(
            f"{found.path}: tensor {found.name!r} holds {found.kind}; expected floats, not quantised"
        )


def _advice(name: str) -> str:
    if name.startswith("pooler."):
        return "set model.pooling: mean, which needs no pooler"
    return "take the checkpoint that config.json belongs to"
