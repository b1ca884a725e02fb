"""What clients remember between rounds: by id, in files that are mapped, so a population may be larger than memory."""

import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int, PyTree

from fslora_jax.federation.cohort import EMPTY
from fslora_jax.federation.round import Cohort

KNOWN = "known.npy"

COPIED = 2**26
"""Bytes that are copied at a time."""


class Memories:
    """One file a leaf, ``(clients, ...)``; a client that never took part has ``first`` and takes no space."""

    def __init__(self, folder: Path, first: PyTree, num_clients: int, *, saved: bool = False):
        """Opens an empty store in ``folder``, which is made anew, or one that was ``saved`` there, only to read it."""
        self._folder, self._first, self._count = folder, jax.device_get(first), num_clients
        if not saved:
            self._make()
        self._open("r" if saved else "r+")

    def gather(self, ids: Int[np.ndarray, "*slots"]) -> PyTree:
        """What the clients of these slots remember, leaves ``(*slots, ...)``."""
        known = (ids != EMPTY) & self._known[ids]

        def of(stored: np.ndarray, first: Any) -> np.ndarray:
            found = np.broadcast_to(first, (*ids.shape, *np.shape(first))).copy()
            found[known] = stored[ids[known]]
            return found

        leaves, tree = jax.tree.flatten(self._first)
        return jax.tree.unflatten(tree, [of(s, f) for s, f in zip(self._stored, leaves, strict=True)])

    def scatter(self, ids: Int[np.ndarray, "*slots"], values: PyTree) -> None:
        """Takes over what the clients of these slots remember now."""
        real = ids != EMPTY
        for stored, new in zip(self._stored, jax.tree.leaves(jax.device_get(values)), strict=True):
            stored[ids[real]] = new[real]
        self._known[ids[real]] = True

    def save(self, folder: Path) -> None:
        """Copies the store into a new folder."""
        Memories(folder, self._first, self._count)._take(self)

    def load(self, folder: Path) -> None:
        """Takes over a folder that was saved.

        Raises:
          OSError, ValueError: it holds something else, and nothing was taken over.
        """
        saved = Memories(folder, self._first, self._count, saved=True)
        self._make()
        self._open("r+")
        self._take(saved)

    def _take(self, other: "Memories") -> None:
        """Takes over what is known in another store; the holes of its files stay holes, so that they take no space."""
        known = np.flatnonzero(other._known)
        size = sum(stored[:1].nbytes for stored in other._stored)
        for ids in np.array_split(known, len(known) * size // COPIED + 1):
            for mine, theirs in zip(self._stored, other._stored, strict=True):
                mine[ids] = theirs[ids]
        self._known[known] = True
        for stored in (*self._stored, self._known):
            stored.flush()

    def _make(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for number, leaf in enumerate(jax.tree.leaves(self._first)):
            shape = (self._count, *np.shape(leaf))
            np.lib.format.open_memmap(self._file(number), "w+", np.asarray(leaf).dtype, shape)
        np.lib.format.open_memmap(self._folder / KNOWN, "w+", np.dtype(bool), (self._count,))

    def _open(self, mode: Literal["r", "r+"]) -> None:
        leaves = jax.tree.leaves(self._first)
        self._stored = [np.load(self._file(n), mode, allow_pickle=False) for n in range(len(leaves))]
        self._known = np.load(self._folder / KNOWN, mode, allow_pickle=False)
        for stored, first in zip(self._stored, leaves, strict=True):
            expected = (self._count, *np.shape(first))
            if stored.shape != expected:
                raise ValueError(f"memories of clients are {stored.shape}, expected {expected}")

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.npy"


def remembering(cohort: Cohort, memories: Memories | None) -> Cohort:
    """A cohort whose clients know what they remember; only after the round before, so not ahead of time."""
    if memories is None:
        return cohort
    ids = cohort.clients.id
    found = jax.device_put(memories.gather(jax.device_get(ids)), ids.sharding)
    return cohort._replace(clients=cohort.clients._replace(memory=found))
