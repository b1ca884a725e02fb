"""Randomness as a pure function of (seed, purpose, round, client): nothing is carried, resume replays nothing."""

from enum import IntEnum

import jax
import numpy as np
from jaxtyping import Array, Key


class Purpose(IntEnum):
    """What a random number is for. Values are part of a run's identity: append, never renumber."""

    INIT = 0
    SPLIT = 1
    PARTITION = 2
    RESOURCES = 3
    COHORT = 4
    SKETCH = 5
    BATCH = 6
    DROPOUT = 7
    NETWORK = 8
    SERVER = 9
    PARTICIPATION = 10
    HELD_OUT = 11
    VALIDATION = 12
    THEORY = 13


def device_key(seed: int, purpose: Purpose) -> Key[Array, ""]:
    """The JAX key of a purpose; fold the round and then the client into it.

    >>> key = device_key(0, Purpose.SKETCH)
    >>> jax.random.fold_in(jax.random.fold_in(key, 3), 7).shape
    ()
    """
    return jax.random.fold_in(jax.random.key(seed), int(purpose))


def host_rng(seed: int, purpose: Purpose, *path: int) -> np.random.Generator:
    """The NumPy generator of a purpose and a path of integers, such as (round, client).

    >>> host_rng(0, Purpose.COHORT, 3).integers(10) == host_rng(0, Purpose.COHORT, 3).integers(10)
    np.True_
    """
    return np.random.default_rng([seed, int(purpose), *path])
