"""Hugging Face checkpoints to base weights, through one table, strict in both directions."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Shaped

from fslora_jax.errors import UserError
from fslora_jax.models.families import build_model, find_family
from fslora_jax.models.family import Family
from fslora_jax.models.gguf import open_gguf
from fslora_jax.models.model import Model
from fslora_jax.models.quantise import Packed, is_packed, pack_like, shape_of
from fslora_jax.tensors import Checkpoint, Tensor, find_gguf, open_checkpoint, read_object

Placement = Callable[[str, tuple[int, ...]], Sharding]
"""Where a base leaf shall live, by its path (``layers/linear/attention.self.query/kernel``) and shape."""

FLOATS = ("F64", "F32", "F16", "BF16", "Q8_0", "Q4_1")
"""Tensor types that a checkpoint may have."""

CHUNK = 1 << 20
"""Values read at a time, so that reading takes little memory beside what is read into."""

PAGE = 64
"""Bytes of alignment with which JAX takes a host array as it is on a CPU, and copies nothing."""

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
        _check_tied(checkpoint, family, {source.name for source in sources(family, abstract)})
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
    for source, tensor in zip(table, _match(checkpoint, family, table), strict=True):
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
    tensors = _match(checkpoint, family, table)
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


def _match(checkpoint: Checkpoint, family: Family, table: list[Source]) -> list[Tensor]:
    """The tensor of every source, after a check that the two sides have the same names and shapes."""
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


def _check_tied(checkpoint: Checkpoint, family: Family, used: set[str]) -> None:
    """Refuses an output of its own beside a config that ties it; none, or a copy, is fine, and so is one in use."""
    by_name = {canonical(key, family): tensor for key, tensor in checkpoint.tensors.items()}
    for name, original in family.tied.items():
        table, output = by_name.get(original), by_name.get(name)
        if table is not None and output is not None and name not in used and not _equal(table, output):
            raise UserError(
                f"{output.path}: tensor {output.name!r} is not a copy of {table.name!r}, but config.json has "
                "tie_word_embeddings: true, which uses the latter for both; set it to false to use the file's own"
            )


def _equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same, some rows at a time."""
    count, *rest = one.shape
    step = max(1, CHUNK // math.prod(rest))
    places = [
        (slice(start, min(start + step, count)), *map(slice, [0] * len(rest), rest))
        for start in range(0, count, step)
    ]
    return one.shape == two.shape and all(np.array_equal(one.read(at), two.read(at)) for at in places)


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
