"""What clients remember: as much space as it needs, and never half of it."""

import numpy as np
import pytest

from fslora_jax.federation.memories import Memories

CLIENTS, WIDTH = 50_000, 1_000


def taken(folder):
    """Bytes that files take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path):
    """Of 200 MB, if all clients were known; three are."""
    memories = Memories(tmp_path / "store", {"a": np.full(WIDTH, 7, np.float32)}, CLIENTS)
    ids = np.array([3, 40_000, 5])
    memories.scatter(ids, {"a": np.repeat(ids[:, None], WIDTH, 1).astype(np.float32)})
    return memories


def check(memories):
    found = memories.gather(np.array([[5, 4], [-1, 40_000]]))["a"]
    assert (found == np.array([[5, 7], [7, 40_000]])[..., None]).all()


def test_a_saved_store_takes_the_space_of_who_is_known(store, tmp_path, monkeypatch):
    monkeypatch.setattr("fslora_jax.federation.memories.COPIED", 2 * 4 * WIDTH)  # two clients at a time
    store.save(tmp_path / "saved")
    assert taken(tmp_path / "saved") <= taken(tmp_path / "store") + 4096 < 10**6
    check(Memories(tmp_path / "saved", {"a": np.full(WIDTH, 7, np.float32)}, CLIENTS, saved=True))
    store.scatter(np.array([5, 4]), {"a": np.zeros((2, WIDTH), np.float32)})
    store.load(tmp_path / "saved")
    check(store)
    assert taken(tmp_path / "store") < 10**6


@pytest.mark.parametrize("damaged", ["0.npy", "known.npy", None])
def test_what_cannot_be_read_changes_nothing_and_an_older_one_can(store, tmp_path, damaged):
    store.save(tmp_path / "older")
    if damaged is not None:
        store.save(tmp_path / "newer")
        path = tmp_path / "newer" / damaged
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises((OSError, ValueError)):
        store.load(tmp_path / "newer")
    check(store)
    store.load(tmp_path / "older")
    check(store)
