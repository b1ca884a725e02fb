"""Hugging Face checkpoints to base weights, read through the table and placed leaf by leaf."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Shaped

from fslora_jax.errors import UserError
from fslora_jax.models.families import build_model, find_family
from fslora_jax.models.family import Family
from fslora_jax.models.gguf import open_gguf
from fslora_jax.models.model import Model
from fslora_jax.models.quantise import Packed, is_packed, pack_like
from fslora_jax.models.table import Source, check_tied, match, sources
from fslora_jax.tensors import CHUNK, Checkpoint, Tensor, find_gguf, open_checkpoint, read_object

Placement = Callable[[str, tuple[int, ...]], Sharding]
"""Where a base leaf shall live, by its path (``layers/linear/attention.self.query/kernel``) and shape."""


PAGE = 64
"""Bytes of alignment with which JAX takes a host array as it is on a CPU, and copies nothing."""


def load_model(
    folder: Path, *, placement: Placement | None = None, **options: Any
) -> tuple[Model, dict[str, Any]]:
    """The model in a Hugging Face folder, and its base weights.

    Weights are read leaf by leaf, in each process only what its devices hold, and placed at once: the host never
    holds more than one leaf besides.

    Args:
      folder: with ``config.json`` and safetensors, or with one ``.gguf`` file.
      placement: where each leaf shall live; None is JAX's default device.
      **options: as in ``build_model``.

    Raises:
      UserError: a file is missing or damaged, or a tensor is unknown, missing, doubled or of another shape.
    """
    config, checkpoint = open_folder(folder)
    model = build_model(config, **options)
    family, abstract = find_family(config), jax.eval_shape(model.init_base, jax.random.key(0))
    if options.get("task") == "causal":
        check_tied(checkpoint, family, {source.name for source in sources(family, abstract)})
    return model, read_base(checkpoint, family, abstract, placement)


def open_folder(folder: Path) -> tuple[Mapping[str, Any], Checkpoint]:
    """The fields of ``config.json`` and the tensors, of safetensors or else of a ``.gguf`` file, not read yet."""
    if path := find_gguf(folder):
        return open_gguf(path)
    return read_object(folder / "config.json"), open_checkpoint(folder)


def class_tensors(folder: Path, model: Model) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """``config.json`` of a folder, and the tensors of ``model``'s base, not read yet.

    The names are those in the class ``model.naming.architecture``, whatever class the folder was saved from.
    """
    config, checkpoint = open_folder(folder)
    family = find_family(config)
    abstract = jax.eval_shape(model.init_base, jax.random.key(0))
    table = list(sources(family, {part: abstract[part] for part in abstract if part in family.containers}))
    of_class = any(name.startswith(family.prefix) for name in checkpoint.tensors)
    named = {}
    for source, tensor in zip(table, match(checkpoint, family, table), strict=True):
        if source.name in family.absent:
            continue
        outside = of_class and not tensor.name.startswith(family.prefix)  # such as lm_head
        named[source.name if outside else family.prefix + source.name] = tensor
    return config, named


def read_base(
    checkpoint: Checkpoint, family: Family, abstract: dict[str, Any], placement: Placement | None = None
) -> dict[str, Any]:
    """Fills an abstract base from a checkpoint; layers are stacked on a leading axis."""
    table = list(sources(family, abstract))
    tensors = match(checkpoint, family, table)
    parts: dict[int, list[tuple[Source, Tensor]]] = {}
    for source, tensor in zip(table, tensors, strict=True):
        parts.setdefault(source.leaf, []).append((source, tensor))
    paths, tree = jax.tree.flatten_with_path(abstract, is_leaf=is_packed)
    leaves = [
        _place("/".join(entry.key for entry in path), leaf, parts[n], placement)
        for n, (path, leaf) in enumerate(paths)
    ]
    return jax.tree.unflatten(tree, leaves)


def _place(
    path: str, leaf: Any, parts: list[tuple[Source, Tensor]], placement: Placement | None
) -> Shaped[Array, "..."] | Packed:
    """One leaf on its devices; of a packed one, the host holds the whole meanwhile."""
    if is_packed(leaf):
        whole = _pack(leaf, parts)
        return {
            name: _put(f"{path}/{name}", value.shape, value.__getitem__, placement)
            for name, value in whole.items()
        }
    held: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        ranges = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        if ranges not in held:  # devices that hold the same slice share one reading
            held[ranges] = _read(parts, ranges, leaf.dtype)
        return held[ranges]

    return _put(path, leaf.shape, read, placement)


def _put(
    path: str, shape: tuple[int, ...], read: Callable[[Any], np.ndarray], placement: Placement | None
) -> Shaped[Array, "..."]:
    if placement is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, placement(path, shape), read)


def _pack(leaf: Packed, parts: list[tuple[Source, Tensor]]) -> dict[str, np.ndarray]:
    """A packed kernel of all layers, of which one at a time is read as it is."""
    whole = {name: _empty(value.shape, value.dtype) for name, value in leaf.items()}
    pack = jax.jit(pack_like(leaf))
    for layer, (source, _) in enumerate(parts):
        ranges = ((layer, layer + 1), *((0, size) for size in source.shape[::-1]))
        packed = pack(_read(parts, ranges, np.dtype(np.float32))[0])
        for name, value in packed.items():
            whole[name][layer] = value
    return whole


def _read(
    parts: list[tuple[Source, Tensor]], ranges: tuple[tuple[int, int], ...], dtype: np.dtype
) -> np.ndarray:
    """The slice ``ranges`` of a leaf; ``parts`` are its layers in order, or the leaf itself."""
    out = _empty(tuple(stop - start for start, stop in ranges), dtype)
    if parts[0][0].layer is None:
        targets = [out]
    else:
        (first, last), ranges = ranges[0], ranges[1:]
        parts, targets = parts[first:last], list(out)
    for (source, tensor), target in zip(parts, targets, strict=True):
        if source.transpose:
            _fill(target.T, tensor, [slice(*r) for r in ranges[::-1]])
        else:
            _fill(target, tensor, [slice(*r) for r in ranges])
    return out


def _fill(target: np.ndarray, tensor: Tensor, index: list[slice]) -> None:
    """Reads some rows at a time."""
    first, rest = index[0], index[1:]
    step = max(1, CHUNK // max(1, target[:1].size))
    for start in range(first.start, first.stop, step):
        rows = slice(start, min(start + step, first.stop))
        part = target[rows.start - first.start : rows.stop - first.start]
        with np.errstate(over="ignore"):  # told below, with the tensor's name
            part[...] = tensor.read((rows, *rest))
        if not np.isfinite(part).all():
            raise UserError(
                f"{tensor.path}: tensor {tensor.name!r} holds values that are not finite in {target.dtype}; "
                "choose model.dtype: float32, or fetch the file again"
            )


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + PAGE, np.uint8)
    start = -room.ctypes.data % PAGE
    return room[start : start + size].view(dtype).reshape(shape)
