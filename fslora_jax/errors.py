"""The one kind of error that a user's mistake raises."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument; its message is one line that says what to do.

    It is a ``ValueError``, so library code catches it as usual; the command line prints it without a
    traceback and exits with code 2.
    """


class Diverged(UserError):
    """Training left the finite numbers: a matter of its settings, such as the learning rate."""
