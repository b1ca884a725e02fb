"""A folder that is there whole, or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fslora_jax.errors import UserError


@contextmanager
def fresh_folder(folder: Path, marker: str, what: str) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``folder`` when the block ends without an error.

    What is there is replaced if it is such a thing, ``what``, by a file called ``marker`` in it: nothing else of the
    user's is lost.

    Raises:
      UserError: ``folder`` is something else, or cannot be written.
    """
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and not (folder / marker).is_file():
        raise UserError(f"{folder}: exists and is no {what} (it has no {marker}); choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            yield fresh
            if folder.exists():
                folder.replace(Path(scratch) / "old")
            fresh.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error
