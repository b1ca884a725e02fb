"""Which devices JAX looks for, and settings of the XLA compiler that a measurement asks for."""

import os
from functools import cache
from glob import glob
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from fslora_jax.errors import UserError

CPU_OPTIONS: dict[str, Any] = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": 512,
    "xla_backend_optimization_level": 1,
}
"""XLA's experimental CPU fusions wait on their own thread pool: a round takes two to six times as long with them.

It uses half of AVX-512 unless told otherwise; a CPU without has its own width. LLVM's second and third level take a
sixth more time to compile a round and gain it nothing.
"""

CPU_NARROW: dict[str, Any] = CPU_OPTIONS | {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}
"""For products in bfloat16: only the library behind these fusions has AMX, six times as fast as float32 on a core."""

CPU_SEVERAL: dict[str, Any] = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
"""For several CPU devices in a process, which keep the cores busy without cutting operations up.

Cut up, and without the fusions, an evaluation gave the first rows of later batches wrong values: jaxlib 0.10.2, after
about a thousand operations in parts on all devices at once. Only this, or the slower fusions, was seen to cure it.
"""

TPUS = ("/dev/accel*", "/dev/vfio/*")
"""Where Linux shows the chips of a TPU."""


def leave_libtpu() -> None:
    """Keeps JAX, here and in processes started from here, from loading libtpu where there is no TPU.

    It may be installed for `fslora plan` alone, and warns of the TPU that it does not find. Nothing changes with
    JAX_PLATFORMS set, with a plugin for other devices, or where JAX (which then asks for them) or Linux sees TPU chips.
    """
    plugins = find_spec("jax_plugins") or entry_points(group="jax_plugins")
    plugins = plugins or os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS")
    config: Any = jax.config
    chips = [path for pattern in TPUS for path in glob(pattern)]
    if find_spec("libtpu") and config.jax_platforms is None and not plugins and not chips:
        os.environ["JAX_PLATFORMS"] = "cpu"
        config.update("jax_platforms", "cpu")


def split_cpu(devices: int, most: int) -> None:
    """Has JAX see the CPU as so many devices; -1: one for each core of this process, up to ``most``.

    They share one pool of threads. A round of small products keeps the cores busier as several programs than as one
    whose every operation is cut up. Where JAX has begun, -1 leaves it as it is.

    Raises:
      UserError: it has begun with another number.
    """
    config: Any = jax.config
    wanted = min(len(os.sched_getaffinity(0)), most) if devices == -1 else devices
    try:
        config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        found = len(jax.devices("cpu"))
        if devices not in (-1, found):
            raise UserError(
                f"mesh.cpu_devices: found {devices}, but JAX has begun with {found}; expected a setting before its "
                "first array, so start another process, or leave it out"
            ) from None


@cache
def compiler_options(products: str = "same") -> dict[str, Any]:
    """Options for ``jax.jit`` on the default backend; none where this version of XLA does not know them.

    ``products`` as in ``model.products``. What XLA_FLAGS says stays as it says.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = CPU_OPTIONS if products == "same" else CPU_NARROW
    if jax.local_device_count() > 1:
        options = options | CPU_SEVERAL
    flags = os.environ.get("XLA_FLAGS", "")
    options = {name: value for name, value in options.items() if f"--{name}=" not in flags}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(jnp.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
