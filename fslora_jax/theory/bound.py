"""Theorem 4.4 of arXiv 2501.19389 (v1), the step size that it needs, and where a config leaves its assumptions."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fslora_jax.config import Config


class Problem(NamedTuple):
    """What the bound depends on.

    ``gap`` is ``f_S(x_0)`` less its infimum, ``clients`` those of a round, ``smoothness`` that of their losses with
    ``S = I``, ``inverse`` ``r / k`` of each one; ``noise``, ``sketch``, ``spread`` are sigma_g^2, sigma_s^2, sigma_h^2.
    """

    gap: float
    rate: float
    local_steps: int
    clients: int
    smoothness: float
    inverse: Float[np.ndarray, " clients"]
    noise: float
    sketch: float
    spread: float


class Bound(NamedTuple):
    """The three terms of the bound on the mean of ``E |grad f_S|^2`` over the rounds."""

    start: float
    noise: float
    drift: float

    @property
    def total(self) -> float:
        """The bound itself."""
        return self.start + self.noise + self.drift


def bound(p: Problem, rounds: int, *, redraw: bool = True) -> Bound:
    """Theorem 4.4: ``4 F0/(lr T H) + (6 lr Lbar/N)(sg^2+ss^2) + (12 lr Ltil/N)(sg^2+ss^2+3 sh^2)``.

    ``Lbar = mean(r/k) L`` and ``Ltil = mean((r/k)^2) L``. The proof takes the sketch for drawn anew in every local
    step. Algorithm 1 keeps it over the round, so that its noise adds up: without ``redraw`` the second term has
    ``H ss^2`` in the place of ``ss^2``, which the tests hold against exact moments and the paper does not have.

    >>> p = Problem(1.0, 0.1, 5, 2, 2.0, np.array([2.0, 4.0]), 1.0, 1.0, 0.0)
    >>> [round(x, 3) for x in bound(p, rounds=8)]
    [1.0, 3.6, 24.0]
    """
    per_client = p.rate * p.smoothness / p.clients
    kept = 1 if redraw else p.local_steps
    return Bound(
        start=4 * p.gap / (p.rate * rounds * p.local_steps),
        noise=6 * per_client * float(p.inverse.mean()) * (p.noise + kept * p.sketch),
        drift=12 * per_client * float(np.square(p.inverse).mean()) * (p.noise + p.sketch + 3 * p.spread),
    )


def sufficient_rate(p: Problem) -> float:
    """A learning rate up to which the theorem holds: the smaller of ``1/(sqrt(32) H L max(r/k))``, ``9/(8 N H^2 L)``.

    The notes that this package goes by have no condition of the paper's; this one is derived here, for sketches drawn
    in every step, variances that bound every client, and clients that are ``(r/k) L``-smooth. One round from x, with d
    the mean of the HN gradients along the local paths: smoothness and ``lr H Lbar <= 1/2`` give ``E f+ <= f -
    (lr H/2)(|grad f|^2 - E|grad f - d|^2) + Lbar lr^2 H s^2/N``, with ``s^2 = sg^2 + ss^2``. A path leaves x by at most
    ``8 lr^2 H^2 |grad f_i|^2 + 4 lr^2 H s^2`` in square, so ``E|grad f - d|^2 <= L Ltil lr^2 (16 H^2 |grad f|^2 +
    16 H^2 sh^2 + 4 H s^2)``. With ``32 L Ltil lr^2 H^2 <= 1`` the mean over T rounds is at most
    ``4 F0/(lr T H) + 4 lr Lbar s^2/N + 8 L Ltil lr^2 H (s^2 + 4 H sh^2)``, and the last term is below the theorem's
    once ``8 N H^2 L lr <= 9``.
    """
    H, L = p.local_steps, p.smoothness
    return min(1 / (math.sqrt(32) * H * L * p.inverse.max()), 9 / (8 * p.clients * H**2 * L))


def departures(config: Config) -> list[str]:
    """What a config does that the theorem does not speak of, as settings; none for the algorithm of the proof."""
    f, c, s = config.federation, config.client_optimizer, config.server_optimizer
    found = {
        f"method_options {f.method_options}": bool(f.method_options and set(f.method_options) != {"redraw"}),
        "a sketch kept over the local steps (method_options: {redraw: true} draws one a step)": not (
            f.method_options.get("redraw", False)
        ),
        f"wrappers {', '.join(f.wrappers)}": bool(f.wrappers),
        f"clients_per_round {config.clients_per_round} of {config.population}": (
            config.clients_per_round < config.population
        ),
        f"client_weights {f.client_weights}": f.client_weights != "uniform",
        "clients that do fewer steps or fail": bool(f.min_local_steps or f.failure_rate),
        f"client_optimizer {c.name}": c.name != "sgd",
        f"client_optimizer.momentum {c.momentum:g}": c.name == "sgd" and c.momentum > 0,
        f"client_optimizer.weight_decay {c.weight_decay:g}": c.weight_decay > 0,
        f"client_optimizer.max_grad_norm {c.max_grad_norm}": c.max_grad_norm is not None,
        f"client_optimizer.schedule {c.schedule}": c.schedule != "constant" or c.warmup_rounds > 0,
        f"server_optimizer {s.name} at {s.learning_rate:g} {s.options or ''}".rstrip(): not s.is_plain,
        f"lora_dropout {config.lora.lora_dropout:g}": config.lora.lora_dropout > 0,
    }
    return [name for name, departs in found.items() if departs]
