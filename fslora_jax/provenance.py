"""What made a result: fingerprints of this package's code and of the data, and the versions of what computes."""

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

COMPUTE = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")
"""Packages whose version may change numbers."""


@cache
def code_fingerprint() -> str:
    """Twelve hexadecimal digits of all source files of this package, by name and content."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def fingerprint_of(*arrays: np.ndarray) -> str:
    """Twelve hexadecimal digits of some arrays, by type, shape and content.

    >>> fingerprint_of(np.arange(3)) == fingerprint_of(np.arange(3)) != fingerprint_of(np.arange(4))
    True
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]


def provenance() -> dict[str, Any]:
    """Code and versions, as a run keeps them in ``made_by.json``."""
    versions = {name: metadata.version(name) for name in COMPUTE}
    return {"code": code_fingerprint(), "python": platform.python_version(), "versions": versions}
