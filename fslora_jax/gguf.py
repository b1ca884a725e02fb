"""GGUF files, version 3: metadata, and tensors that are dequantised where they are read.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; numbers are little-endian.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped

from fslora_jax.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32

# fmt: off
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
"""Tensor types by number."""
# fmt: on


class Format(NamedTuple):
    """How a tensor type is stored: its block, how many values that holds, and what they are."""

    block: np.dtype
    values: int
    dequantise: Callable[[Shaped[np.ndarray, "rows blocks"]], Float32[np.ndarray, "rows *values"]]


def _plain(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["d"].astype(np.float32)[..., None] * blocks["q"]


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    d, m = (blocks[name].astype(np.float32)[..., None] for name in "dm")
    nibbles = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], -1)
    return d * nibbles + m


FORMATS = {
    "F32": Format(np.dtype("<f4"), 1, _plain),
    "F16": Format(np.dtype("<f2"), 1, _plain),
    "Q8_0": Format(np.dtype([("d", "<f2"), ("q", "i1", 32)]), 32, _q8_0),
    "Q4_1": Format(np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]), 32, _q4_1),
}
"""The types that are supported."""


class Gguf(NamedTuple):
    """A file's metadata by key, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, "Stored"]


class Stored(NamedTuple):
    """Where a tensor lies in its file; ``shape`` in NumPy's order, the last axis contiguous."""

    path: Path
    shape: tuple[int, ...]
    kind: str
    offset: int

    def read(self, rows: Any) -> Float32[np.ndarray, "rows *rest"]:
        """Values of the rows (a slice or numbers) of the first axis.

        The file is mapped for the time of one read: pages that stay mapped count as this process's memory.
        """
        form = FORMATS[self.kind]
        stored = (*self.shape[:-1], self.shape[-1] // form.values)
        blocks = np.memmap(self.path, form.block, "r", self.offset, stored)[rows]
        return form.dequantise(blocks).reshape(-1, *self.shape[1:])


def read_gguf(path: Path) -> Gguf:
    """Metadata and the table of tensors; the values stay in the file.

    Raises:
      UserError: the file is missing, damaged, of another version, or holds a tensor of an unsupported type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse(path, content)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a GGUF model") from None
    except (OSError, ValueError, struct.error, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged GGUF file ({error}); fetch it again") from None


class _Cursor:
    """Reads values one after the other, none beyond the end."""

    def __init__(self, content: mmap.mmap):
        self.content, self.at = content, 0

    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.at:
            raise ValueError(f"{size} bytes at {self.at} go beyond its end")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind < len(_NUMBERS) and (code := _NUMBERS[kind]):
            return self.number(code)
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        raise ValueError(f"unknown type {kind} of a value at {self.at}")

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind < len(_NUMBERS) and (code := _NUMBERS[kind]):
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        if kind == _ARRAY or count > len(self.content):
            raise ValueError(f"array of type {kind} with {count} values at {self.at}")
        return [self.value(kind) for _ in range(count)]


_NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
_TEXT, _ARRAY = 8, 9


def _parse(path: Path, content: mmap.mmap) -> Gguf:
    cursor = _Cursor(content)
    if cursor.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("I")) != VERSION:
        raise UserError(f"{path}: GGUF version {version}; expected {VERSION}, little-endian; convert it anew")
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"{key} is given twice")
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [_info(path, cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: stored._replace(offset=start + stored.offset) for name, stored in infos}
    if len(tensors) < num_tensors:
        raise ValueError("two tensors have one name")
    for name, stored in tensors.items():
        form = FORMATS[stored.kind]
        if stored.offset + math.prod(stored.shape) // form.values * form.block.itemsize > len(content):
            raise ValueError(f"tensor {name} goes beyond its end")
    return Gguf(path, metadata, tensors)


def _info(path: Path, cursor: _Cursor) -> tuple[str, Stored]:
    name = cursor.text()
    shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
    number, offset = cursor.number("I"), cursor.number("Q")
    kind = TYPES.get(number, f"number {number}")
    if kind not in FORMATS:
        raise UserError(
            f"{path}: tensor {name!r} is of type {kind}; expected one of {list(FORMATS)}; "
            "choose a file of such a quantisation, or the safetensors model"
        )
    if not shape or shape[-1] % FORMATS[kind].values or (len(shape) == 1 and FORMATS[kind].values > 1):
        raise ValueError(f"tensor {name} of type {kind} has shape {shape}")
    return name, Stored(path, shape, kind, offset)
