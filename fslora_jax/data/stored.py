"""Tokenised texts as memory-mapped files of the cache: a large data set is tokenised once, and read as it is used."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fslora_jax.data.tokens import TokenStore
from fslora_jax.hub import default_cache_dir

LEAST = 2**22
"""Characters from which on tokens are kept; fewer are tokenised in no time."""

FORMAT = 1
"""Part of the key: raise it when the same texts and settings give other tokens than before."""


def stored(
    texts: Sequence[list[str]], settings: Sequence[object], make: Callable[[], TokenStore]
) -> TokenStore:
    """What ``make`` gives, from the cache if the same texts were tokenised with the same ``settings`` before.

    A cache that cannot be written or is damaged costs time, nothing else.
    """
    if sum(len(text) for column in texts for text in column) < LEAST:
        return make()
    folder = default_cache_dir() / "tokens" / fingerprint(texts, settings)
    found = read_store(folder)
    if found is None:
        made = make()
        write_store(folder, made)
        found = read_store(folder) or made
    return found


def fingerprint(texts: Sequence[list[str]], settings: Sequence[object]) -> str:
    """A name for texts and settings: equal ones have the same.

    >>> fingerprint([["ab", "c"]], [1]) == fingerprint([["a", "bc"]], [1])
    False
    """
    digest = hashlib.sha256(repr((FORMAT, *settings)).encode())
    for column in texts:
        digest.update(np.array([len(column), *map(len, column)], np.int64).tobytes())
        for start in range(0, len(column), 10_000):
            digest.update("".join(column[start : start + 10_000]).encode())
    return digest.hexdigest()


def write_store(folder: Path, store: TokenStore) -> None:
    """A file for each array; the folder is there whole or not at all."""
    fresh = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        for name, value in store._asdict().items():
            np.save(fresh / f"{name}.npy", value)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    except OSError:  # no space, no permission, or another process was first
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)


def read_store(folder: Path) -> TokenStore | None:
    """The arrays of a folder, not read yet; None where it is not there or not whole."""
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in TokenStore._fields]
    except (OSError, ValueError):
        return None
    *flat, truncated = (np.asarray(array) for array in arrays)
    store = TokenStore(*flat, truncated=int(truncated))
    whole = {len(store.tokens), len(store.types), len(store.learned), int(store.offsets[-1])}
    return store if len(whole) == 1 else None
