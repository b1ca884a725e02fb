"""Devices to compile for: TPU slices by name, or virtual CPU devices."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from fslora_jax.chips import CHIPS, Chip
from fslora_jax.errors import UserError

EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16 or cpu:8"


def chip_of(topology: str) -> Chip | None:
    """The chip of a slice; None for CPUs.

    Raises:
      UserError: another name.
    """
    kind, _, size = topology.partition(":")
    if kind == "cpu" and size.isdecimal() and int(size) > 0:
        return None
    axes = 3 if kind == "v5p" else 2  # of the torus; the compiler ends its process at another number
    if kind not in CHIPS or not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{axes - 1}}}", size):
        raise UserError(f"--topology: found {topology!r}; expected such as {EXAMPLES}")
    return CHIPS[kind]


def count_of(topology: str) -> int:
    """How many devices a slice has.

    >>> count_of("v5p:4x4x4")
    64
    """
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))


def prepare(topology: str) -> None:
    """Settings that must be made before JAX touches a device."""
    jax.config.update("jax_platforms", "cpu")
    # Else libtpu asks the cloud which TPU this machine has, complains that it has none, and will not be loaded twice.
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_MIN_LOG_LEVEL="3",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.pop("TPU_ACCELERATOR_TYPE", None)
    if chip_of(topology) is None:
        jax.config.update("jax_num_cpu_devices", count_of(topology))


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a slice, which need not exist.

    Raises:
      UserError: no such slice, or its compiler is not installed.
    """
    if chip_of(topology) is None:
        return jax.devices("cpu")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan: the TPU compiler is not installed; pip install 'fslora_jax[plan]', or say cpu:8"
        )
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--topology: {topology!r} is no slice: {reason}; expected such as {EXAMPLES}"
        ) from None
