"""The one kind of error that a user's mistake raises."""

from pathlib import Path


class UserError(ValueError):
    """A mistake in a config, a file or an argument; its message is one line that says what to do.

    It is a ``ValueError``, so library code catches it as usual; the command line prints it without a
    traceback and exits with code 2.
    """


class Diverged(UserError):
    """Training left the finite numbers: a matter of its settings, such as the learning rate."""


def of_other_version(path: Path, missing: str) -> UserError:
    """A result file without something that this version always writes."""
    return UserError(
        f"{path}: has no {missing!r}, so another version of fslora_jax wrote it; expected the files of this one: "
        "run the study or training again, or report with the version that wrote it"
    )
