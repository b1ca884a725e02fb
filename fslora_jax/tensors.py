"""Checkpoints whose tensors stay in their files until a slice of one is read: safetensors, sharded or not."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, for safetensors
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from fslora_jax.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

CHUNK = 1 << 20
"""Values read at a time, so that reading takes little memory beside what is read into."""

Slices = tuple[slice, ...]


class Tensor(NamedTuple):
    """One tensor of a checkpoint, not read yet; ``kind`` is the file's name of its type.

    ``read`` takes one slice for every axis, with start and stop.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[Slices], Shaped[np.ndarray, "..."]]


class Checkpoint(NamedTuple):
    """All tensors of a model by name; ``path`` is the file that lists them."""

    path: Path
    tensors: dict[str, Tensor]


def equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors hold the same, some rows at a time."""
    count, *rest = one.shape
    step = max(1, CHUNK // math.prod(rest))
    places = [
        (slice(start, min(start + step, count)), *map(slice, [0] * len(rest), rest))
        for start in range(0, count, step)
    ]
    return one.shape == two.shape and all(np.array_equal(one.read(at), two.read(at)) for at in places)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of a model folder: ``model.safetensors``, or shards with an index.

    Raises:
      UserError: no weights are there or only pickled ones, a file is missing or damaged, or the index and
        the shards do not agree.
    """
    if not (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        return _open_shards(folder)
    refuse_pickled(folder)
    return Checkpoint(folder / WHOLE, _open_safetensors(folder / WHOLE))


def find_gguf(folder: Path) -> Path | None:
    """The ``.gguf`` file of a folder that has no safetensors.

    Raises:
      UserError: there are several.
    """
    found = sorted(folder.glob("*.gguf"))
    if not found or any((folder / file).is_file() for file in (WHOLE, INDEX)):
        return None
    if len(found) > 1:
        raise UserError(f"{folder}: found {[path.name for path in found]}; expected one .gguf file")
    return found[0]


def refuse_pickled(folder: Path) -> None:
    """Raises where a folder's weights are only pickled: reading them can run code."""
    pickled = [path for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if pickled and not any(list(folder.glob(pattern)) for pattern in (WHOLE, INDEX, "*.gguf")):
        raise UserError(
            f"{pickled[0]}: pickled weights can run code and are never read; expected safetensors; if you trust "
            "them, convert them once with the class of transformers that config.json names under architectures: "
            f"from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}, safe_serialization=True)"
        )


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it, a file of this folder.

    Raises:
      UserError: the index is damaged, or names a file outside the folder.
    """
    path = folder / INDEX
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{path}: no valid weight_map; expected tensor names with file names; fetch it again")
    for file in sorted(set(index.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise UserError(
                f"{path}: names the shard {file!r}; expected a .safetensors file of the same folder"
            )
    return index


def read_object(
    path: Path, within: str = "a Hugging Face model folder", mend: str = "fetch it again"
) -> Mapping[str, Any]:
    """A JSON file that holds an object; ``within`` and ``mend`` say in an error where it belongs and what to do."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected {within}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {mend}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: found {type(fields).__name__}; expected an object of fields")
    return fields


def _open_shards(folder: Path) -> Checkpoint:
    index = read_index(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder / INDEX}: names the shard {file!r}, which is missing; fetch it again")
        found = _open_safetensors(folder / file)
        promised = {name for name, shard in index.items() if shard == file}
        if missing := sorted(promised - set(found)):
            raise UserError(
                f"{folder / file}: tensor {missing[0]!r} is missing ({len(missing)} in all), but {INDEX} names it; "
                "fetch both again"
            )
        if spare := sorted(set(found) - promised):
            raise UserError(
                f"{folder / file}: tensor {spare[0]!r} ({len(spare)} in all) is not what {INDEX} names; "
                "fetch both again"
            )
        tensors |= found
    return Checkpoint(folder / INDEX, tensors)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected the weights there, in shards with {INDEX}, or as .gguf"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            return {
                name: Tensor(
                    path, name, tuple(t.get_shape()), t.get_dtype(), partial(_read_safetensors, path, name)
                )
                for name, t in slices.items()
            }
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); fetch it again") from error


def _read_safetensors(path: Path, name: str, index: Slices) -> np.ndarray:
    """Opens the file anew: pages that stay mapped count as this process's memory."""
    with safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[index]
