"""What clients can afford: the rank k that each one holds."""

import numpy as np
from jaxtyping import Int

from fslora_jax.config import Config
from fslora_jax.random import Purpose, host_rng


def client_ranks(config: Config) -> Int[np.ndarray, " clients"]:
    """k of every client."""
    f = config.federation
    ks = np.array([round(ratio * config.lora.r) for ratio in f.sketching_ratios])
    n = f.num_clients
    if f.ranks == "turn":
        return np.resize(ks, n)
    rng = host_rng(config.seed, Purpose.RESOURCES)
    if f.ranks == "random":
        return rng.choice(ks, n)
    return draw_ranks(f.ranks, n, *f.rank_range, rng)


def draw_ranks(
    name: str, n: int, least: int, largest: int, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Ranks as the paper's authors draw them: rounded and clipped to ``least`` to ``largest``.

    "uniform"; "normal" around the middle, with a sixth of the width; "heavy_tail", inverse log-normal samples
    stretched over the whole range, so that most clients have small ranks and few large ones.
    """
    if name == "uniform":
        samples = rng.uniform(least, largest, n)
    elif name == "normal":
        samples = rng.normal((least + largest) / 2, (largest - least) / 6, n)
    else:
        inverse = 1 / rng.lognormal(np.log((least + largest) / 4), 1.0, n)
        spread = max(np.ptp(inverse), np.finfo(float).tiny)
        samples = least + (inverse - inverse.min()) / spread * (largest - least)
    return np.round(np.clip(samples, least, largest)).astype(int)
