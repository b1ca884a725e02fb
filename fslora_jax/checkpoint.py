"""Checkpoints of the server: global weights, the server optimiser's state and the round."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from safetensors import SafetensorError, flax

from fslora_jax.errors import UserError
from fslora_jax.processes import agreed, leader_first

FILE, FILES = "server.safetensors", "clients"

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every step of every save


class Files(Protocol):
    """What has files of its own to keep beside the arrays."""

    def save(self, folder: Path) -> None:
        """Writes them into a new folder."""
        ...

    def load(self, folder: Path) -> None:
        """Takes them over from there."""
        ...


class _Handler(ocp.CheckpointHandler):
    """One safetensors file; orbax's own handlers read and write many arrays at once, and when one of them fails the
    others print tracebacks long after its error was caught."""

    def save(self, directory: Path, args: "_State") -> None:
        if jax.process_index() == 0:
            (directory / FILE).write_bytes(flax.save(_by_name(args.tree)))
            if args.files is not None:
                args.files.save(directory / FILES)

    def restore(self, directory: Path, args: "_State") -> PyTree:
        found, like = flax.load((directory / FILE).read_bytes()), _by_name(args.tree)
        for name in {**like, **found}:
            had, wants = (
                f"{x[name].dtype}{list(x[name].shape)}" if name in x else None for x in (found, like)
            )
            if had != wants:
                raise ValueError(f"{name} is {had}, expected {wants}")
        if args.files is not None:
            args.files.load(directory / FILES)
        leaves, tree = jax.tree.flatten(args.tree)
        placed = [jax.device_put(found[n], x.sharding) for n, x in zip(like, leaves, strict=True)]
        return jax.tree.unflatten(tree, placed)


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _State(ocp.args.CheckpointArgs):
    tree: Any
    files: Files | None = None


def _by_name(tree: PyTree) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


class Checkpoints:
    """Steps in one folder, each written under a temporary name and then renamed: a step is whole or not there."""

    def __init__(self, folder: Path, keep: int | None = None):
        """Opens a folder for reading, which changes nothing in it.

        With ``keep``, the number of newest steps to keep, it is opened for writing: it is made, and what a killed run
        left half-written is cleared away.
        """
        self._folder = folder
        writes = keep is not None
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=writes,
                read_only=not writes,
                cleanup_tmp_directories=writes,
                enable_async_checkpointing=False,
            ),
            item_handlers=_Handler(),
        )

    def rounds(self) -> list[int]:
        """The saved rounds, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The last round that is saved now, by whoever trains; None where none is."""
        self._manager.reload()
        return self._manager.latest_step()

    def save(self, round: int, state: PyTree, files: Files | None = None) -> None:
        """Saves the state after ``round`` rounds, and ``files``; earlier ones are only dropped when it is complete.

        Raises:
          UserError: the disk is full or not writable; what was saved before is still there.
        """
        try:
            self._manager.save(round, args=_State(state, files))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._folder / str(round)}: the checkpoint cannot be written: {_first_line(error)}; free some "
                "space or mend its permissions and run the same command again to go on from the last one"
            ) from None

    def restore(self, round: int, like: PyTree, files: Files | None = None) -> PyTree:
        """The state of a round, and its files, with the structure, shapes and placement of ``like``.

        Raises:
          UserError: the checkpoint is damaged or of another configuration.
        """
        try:
            return self._manager.restore(round, args=_State(like, files))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            # A KeyError is orbax's, for a folder without what it should hold.
            reason = "it is not whole" if isinstance(error, KeyError) else _first_line(error)
            raise UserError(
                f"{self._folder / str(round)}: the checkpoint cannot be read: {reason}; delete this folder to go on "
                "from the one before"
            ) from None

    def resume(self, start: PyTree, files: Files | None, tell: Callable[[str], None]) -> tuple[int, PyTree]:
        """The newest round that can be read, and its state; 0 and ``start`` where nothing is saved.

        Newer ones that cannot are told, and set aside as ``ROUND.unreadable``, so that their rounds can be saved again.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        bad: dict[int, UserError] = {}
        for t in reversed(self.rounds()):
            state, failure = start, None
            try:
                state = self.restore(t, start, files)
            except UserError as error:
                failure = error
            if not agreed(failure is None):
                bad[t] = failure or UserError(f"{self._folder / str(t)}: another process cannot read it")
                continue
            for newer, error in bad.items():
                tell(f"{str(error).split('; delete')[0]}; going on from round {t}")
                leader_first(partial(set_aside, self._folder / str(newer)))
            self._manager.reload()
            return t, state
        if bad:
            raise next(iter(bad.values()))
        return 0, start

    def files(self, round: int) -> Path:
        """The folder of what was saved as files with a round."""
        return self._folder / str(round) / "default" / FILES

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()


def set_aside(folder: Path) -> None:
    """Renames a checkpoint that cannot be read, in place of an earlier one of the round.

    Raises:
      UserError: that is not allowed.
    """
    aside = folder.with_name(f"{folder.name}.unreadable")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read, and not renamed to {aside.name}: {error.strerror}; mend its permissions"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
