"""Several processes that run as one: how they meet, who writes, and what each may know of the others' arrays."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fslora_jax.errors import UserError

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Set all three, or none where JAX finds them itself: SLURM, TPU pods, Kubernetes, Open MPI."""


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
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if given:
            address, count, number = (given[name] for name in ENVIRONMENT)
            jax.distributed.initialize(address, int(count), int(number))
        else:
            jax.distributed.initialize()
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


def fetch(tree: Any) -> Any:
    """Arrays as NumPy, whole in every process."""
    return jax.tree.map(
        lambda x: (
            np.asarray(x)
            if x.is_fully_addressable
            else np.asarray(multihost_utils.process_allgather(x, tiled=True))
        ),
        tree,
    )
