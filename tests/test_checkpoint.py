"""Checkpoints: whole or not there, back bit by bit, and one line where they are damaged."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from fslora_jax.checkpoint import Checkpoints
from fslora_jax.errors import UserError


def state(value: float) -> dict:
    return {
        "weights": {"a": jnp.full((3, 4), value, float), "b": [jnp.arange(5.0) * value]},
        "round": jnp.int32(value),
    }


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of rounds 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for t in (1, 2):
        checkpoints.save(t, state(t / 3))
    checkpoints.close()
    return tmp_path / "checkpoints"


def test_what_was_saved_comes_back_bit_by_bit(saved):
    checkpoints = Checkpoints(saved, keep=2)
    for t in checkpoints.rounds():
        back, like = checkpoints.restore(t, state(0)), state(t / 3)
        assert jax.tree.structure(back) == jax.tree.structure(like)
        for got, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(like), strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted)
    checkpoints.close()


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for t in (1, 2, 3, 5):
        checkpoints.save(t, state(t))
    assert checkpoints.rounds() == [3, 5]
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5"]


def test_no_folder_has_no_rounds(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.rounds() == []
    checkpoints.close()


def test_what_a_kill_left_half_written_is_not_a_round(saved):
    half = saved / "3.orbax-checkpoint-tmp"
    (half / "default").mkdir(parents=True)
    (half / "default" / "rubbish").write_bytes(b"half")
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.rounds() == [1, 2]
    checkpoints.save(3, state(3.0))
    assert checkpoints.rounds() == [2, 3]
    np.testing.assert_array_equal(checkpoints.restore(3, state(0))["weights"]["a"], 3.0)
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_reading_changes_nothing(saved, tmp_path):
    """Someone evaluates while the run goes on: a checkpoint that is being written is not theirs to clear away."""
    (saved / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    (saved / "3.orbax-checkpoint-tmp" / "default" / "half").write_bytes(b"half")
    before = runs.snapshot(saved)
    checkpoints = Checkpoints(saved)
    assert checkpoints.rounds() == [1, 2]
    checkpoints.restore(2, state(0))
    checkpoints.close()
    assert runs.snapshot(saved) == before
    none = Checkpoints(tmp_path / "none")
    assert none.rounds() == []
    none.close()
    assert not (tmp_path / "none").exists()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_damaged_file_gives_one_line_or_the_right_values(saved):
    """Each file of a checkpoint cut to half, and gone: never a wrong value, never a traceback of the library."""
    wanted, refused = state(2 / 3), 0
    for path in files_of(saved / "2"):
        whole = path.read_bytes()
        for damage in (whole[: len(whole) // 2], None):
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            checkpoints = Checkpoints(saved, keep=2)
            try:
                back = checkpoints.restore(2, state(0))
                assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), back, wanted)), path
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
                assert str(saved / "2") in str(error)
                assert "delete this folder to go on from the one before" in str(error)
            finally:
                checkpoints.close()
                path.write_bytes(whole)
    assert refused == 2  # both of the file with the arrays; the others are orbax's notes


def test_the_newest_that_can_be_read_is_resumed_from(saved):
    told, checkpoints = [], Checkpoints(saved, keep=3)
    assert checkpoints.resume(state(0), None, told.append)[0] == 2
    checkpoints.save(3, state(1.0))
    (saved / "3" / "default" / "server.safetensors").write_bytes(b"")
    (saved / "2" / "default" / "server.safetensors").unlink()
    t, back = checkpoints.resume(state(0), None, told.append)
    assert t == 1
    np.testing.assert_array_equal(back["weights"]["a"], state(1 / 3)["weights"]["a"])
    assert [text.split(":")[0] for text in told] == [str(saved / "3"), str(saved / "2")]
    assert all(text.endswith("; going on from round 1") and "delete" not in text for text in told)
    assert checkpoints.rounds() == [1]
    checkpoints.save(2, state(2.0))  # the name is free again
    assert checkpoints.rounds() == [1, 2]
    checkpoints.close()


@pytest.mark.parametrize("left", [(), ("_CHECKPOINT_METADATA",)])
def test_a_step_that_was_half_written_under_its_own_name_is_passed_over(saved, left):
    """As where a folder is no file system, but a bucket without renaming."""
    for path in files_of(saved / "2"):
        if path.name not in left:
            path.unlink()
    shutil.rmtree(saved / "2" / "default")
    told, checkpoints = [], Checkpoints(saved, keep=3)
    assert checkpoints.rounds() == [1, 2]
    assert checkpoints.resume(state(0), None, told.append)[0] == 1
    assert told == [f"{saved / '2'}: the checkpoint cannot be read: it is not whole; going on from round 1"]
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2.unreadable"]


@contextmanager
def nobody():
    """A folder of a user who is not root, which this process is meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("closed", ["default/server.safetensors", "default", "."])
def test_a_step_without_permission_is_passed_over(closed):
    with nobody() as folder:
        checkpoints = Checkpoints(folder / "checkpoints", keep=2)
        for t in (1, 2):
            checkpoints.save(t, state(t / 3))
        (folder / "checkpoints" / "2" / closed).chmod(0)
        told = []
        t, back = checkpoints.resume(state(0), None, told.append)
        checkpoints.close()
    assert t == 1
    np.testing.assert_array_equal(back["weights"]["a"], state(1 / 3)["weights"]["a"])
    assert len(told) == 1 and told[0].endswith("; going on from round 1")
    assert "ermission" in told[0] or "not whole" in told[0]


def test_where_no_checkpoint_can_be_read_nothing_is_moved(saved):
    for path in saved.glob("*/default/server.safetensors"):
        path.write_bytes(b"rubbish")
    before = runs.snapshot(saved)
    checkpoints = Checkpoints(saved, keep=2)
    with pytest.raises(UserError, match="/2: the checkpoint cannot be read"):
        checkpoints.resume(state(0), None, print)
    checkpoints.close()
    assert runs.snapshot(saved) == before


def test_another_shape_is_refused(saved):
    checkpoints = Checkpoints(saved, keep=2)
    other = state(0)
    other["weights"]["a"] = jnp.zeros((3, 5))
    with pytest.raises(UserError, match=r"\['a'\] is float32\[3, 4\], expected float32\[3, 5\]"):
        checkpoints.restore(2, other)
    del other["weights"]["a"]
    with pytest.raises(UserError, match=r"\['a'\] is float32\[3, 4\], expected None"):
        checkpoints.restore(2, other)
    checkpoints.close()


def test_a_failed_save_keeps_the_earlier_ones(saved, monkeypatch):
    checkpoints = Checkpoints(saved, keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device\nand more lines")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError) as caught:
        checkpoints.save(3, state(3.0))
    assert "\n" not in str(caught.value)
    assert str(saved / "3") in str(caught.value)
    assert "No space left" in str(caught.value)
    assert checkpoints.rounds() == [1, 2]
    checkpoints.close()
