"""Settings of the XLA compiler that a measurement asks for."""

from functools import cache

import jax
import jax.numpy as jnp

CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""XLA's experimental CPU fusions wait on their own thread pool: a round takes two to six times as long with them."""


@cache
def compiler_options() -> dict[str, str]:
    """Options for ``jax.jit`` on the default backend; none where this version of XLA does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=CPU_OPTIONS).lower(jnp.float32(0)).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return CPU_OPTIONS
