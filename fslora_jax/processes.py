"""Several processes that run as one: how they meet, who writes, and what each may know of the others' arrays."""

import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from fslora_jax.errors import UserError

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Set all three, or none where JAX finds them itself: SLURM, TPU pods, Kubernetes, Open MPI."""


SECONDS = {"FSLORA_HEARTBEAT_TIMEOUT": 100, "FSLORA_WATCHDOG": 600}
"""Further variables, with what they are by default: seconds after which a process that says nothing counts as dead, and
the others end; seconds in which nothing moves until the watchdog says so."""

LOST_CODE = os.EX_TEMPFAIL
"""What the command line exits with when another process has gone: to be tried again, as `launch/` has it."""

AGAIN = "run the same command in all of them again to go on from the last checkpoint"

GONE = re.compile("gloo|nccl|coordination service|heartbeat|closed by peer|reset by peer", re.I)
"""In messages of collectives whose other end is no longer there."""


class Lost(Exception):
    """Another process of the run has gone, and without it nothing can be computed."""


def seconds_of(name: str) -> float:
    """The value of one of `SECONDS`.

    Raises:
      UserError: the environment has something else than a number above 0.
    """
    given = os.environ.get(name) or str(SECONDS[name])
    if not re.fullmatch(r"\d+(\.\d+)?", given) or float(given) <= 0:
        raise UserError(f"{name}: found {given!r}; expected seconds, such as {SECONDS[name]}")
    return float(given)


@contextmanager
def losing_others() -> Iterator[None]:
    """Makes one line of what a collective says when its other end has died, or JAX, which then ends this process.

    Raises:
      Lost: a collective has.
    """
    if jax.process_count() == 1:
        yield
        return
    here = f"process {jax.process_index()} of {jax.process_count()}"
    with last_words(
        f"fslora: error: {here} was killed, or ended by JAX, as it is when process 0 dies; {AGAIN}"
    ):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not GONE.search(str(error)):
                raise
            raise Lost(
                f"{here} cannot go on, as another process has ended ({' '.join(str(error).split())[:200]}); its own "
                f"messages say why; {AGAIN}"
            ) from None


@contextmanager
def last_words(text: str) -> Iterator[None]:
    """Has a shell say on stderr what this process cannot say itself when a signal ends it."""
    shell = ["sh", "-c", 'read -r _ || echo "$0" >&2', text]
    heir = subprocess.Popen(
        shell, stdin=subprocess.PIPE, start_new_session=True
    )  # what ends a group spares it
    try:
        yield
    finally:
        heir.communicate(b"\n")


def join() -> None:
    """Meets the other processes; before anything touches a device.

    Raises:
      UserError: the environment does not say who they are, or they cannot be reached.
    """
    given = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}
    if given and len(given) < len(ENVIRONMENT):
        missing = next(name for name in ENVIRONMENT if name not in given)
        raise UserError(
            f"--distributed: {missing} is not set; expected {', '.join(ENVIRONMENT)}, or none of them"
        )
    patience = math.ceil(seconds_of("FSLORA_HEARTBEAT_TIMEOUT"))
    meet = partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=patience, shutdown_timeout_seconds=patience
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if given:
            address, count, number = (given[name] for name in ENVIRONMENT)
            meet(address, int(count), int(number))
        else:
            meet()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--distributed: the processes did not meet: {reason}; run under SLURM, Kubernetes, Open MPI or on a TPU "
            f"pod, or set {', '.join(ENVIRONMENT)}"
        ) from None


def leads() -> bool:
    """Whether this process writes metrics, figures and adapters; exactly one does."""
    return jax.process_index() == 0


def leader_first(action: Callable[[], None]) -> None:
    """The leader acts, the others wait; where it fails, all fail.

    Raises:
      UserError: in a process that is not the leader, which has said why.
    """
    failure: BaseException | None = None
    if leads():
        try:
            action()
        except Exception as error:
            failure = error
    if jax.process_count() > 1:
        went_well = multihost_utils.broadcast_one_to_all(np.array(failure is None))
        if not went_well and failure is None:
            raise UserError("process 0 could not go on; its message says why")
    if failure is not None:
        raise failure


def agreed(well: bool) -> bool:
    """Whether it went well in all processes."""
    return well if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(well)).all())


def all_gathered(tree: PyTree) -> PyTree:
    """Arrays whole in every process; the devices are asked for them, and nobody waits."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else _whole(x.sharding.mesh)(x), tree)


@cache
def _whole(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def fetch(tree: PyTree) -> PyTree:
    """Arrays as NumPy, whole in every process."""
    return jax.tree.map(np.asarray, all_gathered(tree))
