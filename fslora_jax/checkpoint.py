"""Checkpoints of the server: global weights, the server optimiser's state and the round, through orbax."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from fslora_jax.errors import UserError

logging.getLogger("absl").setLevel(
    logging.CRITICAL
)  # orbax reports every step, and errors that it also raises


class Checkpoints:
    """Steps in one folder, each written under a temporary name and then renamed: a step is whole or not there.

    A state is stored as one flat array. Of several, orbax reads and writes many at once, and when one fails the rest
    print tracebacks long after its error was caught. Integers up to 2**24 are exact in it.
    """

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
        )

    def rounds(self) -> list[int]:
        """The saved rounds, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, round: int, state: PyTree) -> None:
        """Saves the state after ``round`` rounds; earlier checkpoints are only dropped when it is complete.

        Raises:
          UserError: the disk is full or not writable; what was saved before is still there.
        """
        try:
            self._manager.save(round, args=ocp.args.StandardSave({"state": ravel_pytree(state)[0]}))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._folder / str(round)}: the checkpoint cannot be written: {_first_line(error)}; free some "
                "space or mend its permissions and run the same command again to go on from the last one"
            ) from None

    def restore(self, round: int, like: PyTree) -> PyTree:
        """The state of a round, with the structure, shapes and placement of ``like``.

        Raises:
          UserError: the checkpoint is damaged or of another configuration.
        """
        flat, unravel = ravel_pytree(like)
        try:
            found = self._manager.restore(round, args=ocp.args.StandardRestore({"state": flat}))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self._folder / str(round)}: the checkpoint cannot be read: {_first_line(error)}; delete this "
                "folder to go on from the one before"
            ) from None
        return jax.device_put(unravel(found["state"]), jax.tree.map(lambda x: x.sharding, like))

    def close(self) -> None:
        """Releases the folder."""
        self._manager.close()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
