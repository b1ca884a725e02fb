"""Processes forked from one that has loaded the libraries, which takes a command of its own four seconds."""

import atexit
import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import TimeoutExpired
from tempfile import mkdtemp

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fslora_jax.cli", "fslora_jax.federation.loop", "fslora_jax.study.command"])


class Forked:
    """Python code as a process of its own, with what a test needs of `subprocess.Popen`.

    Libraries have read their environment when it starts; JAX has no devices yet, and finds those of ``environment``.
    What it writes is kept below ``folder``.
    """

    def __init__(self, code: str, argv: list[str], environment: dict[str, str], folder: Path):
        self.args = [code, *argv]
        into = mkdtemp(dir=folder)
        self._said = [Path(into, name) for name in ("stdout", "stderr")]
        self._process = CONTEXT.Process(target=become, args=(code, argv, environment, self._said))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it: a signal's number is negative."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; all that it wrote."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout or 0)
        out, err = (path.read_text(encoding="utf-8") for path in self._said)
        return out, err


def become(code: str, argv: list[str], environment: dict[str, str], said: list[Path]) -> None:
    """What a new interpreter would do with ``python -c CODE ARGV``, in the one that was forked."""
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *argv]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
