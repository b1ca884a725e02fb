"""The one kind of error that a user's mistake raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax


class UserError(ValueError):
    """A mistake in a config, a file or an argument; its message is one line that says what to do.

    It is a ``ValueError``, so library code catches it as usual; the command line prints it without a
    traceback and exits with code 2.
    """


class Diverged(UserError):
    """Training left the finite numbers: a matter of its settings, such as the learning rate."""


@contextmanager
def memory_told() -> Iterator[None]:
    """Makes a lack of memory a user's error that says what to do.

    Raises:
      UserError: the devices, or the host, refused what was asked for.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).strip() or "the host has no more"
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise UserError(
            f"memory: {reason.splitlines()[0]}; raise federation.cohort_chunks, lower federation.batch_size or "
            "rows_per_pass, or set model.remat: full"
        ) from None


def of_other_version(path: Path, missing: str) -> UserError:
    """A result file without something that this version always writes."""
    return UserError(
        f"{path}: has no {missing!r}, so another version of fslora_jax wrote it; expected the files of this one: "
        "run the study or training again, or report with the version that wrote it"
    )
