"""How private a run with ``clip_and_noise`` is: dp-accounting's Rényi accountant, by the rounds done."""

from collections.abc import Callable
from typing import Any

from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.methods import WRAPPERS, Method
from fslora_jax.settings import checked, options_of

NAME = "clip_and_noise"


def privacy_record(config: Config, method: Method) -> Callable[[int], dict[str, float]]:
    """``rounds -> {"privacy/epsilon": ...}`` of a run that is private, and nothing of another."""
    options = _options(config)
    if options is None or not options.noise_multiplier:
        return lambda _: {}
    return lambda rounds: {"privacy/epsilon": epsilon_of(config, rounds, sampled=not method.traits.remembers)}


def check_privacy(config: Config, method: Method) -> None:
    """Refuses a run that is less private than it shall be.

    Raises:
      UserError: the planned rounds exceed the budget, weights are not uniform, or dp-accounting is missing.
    """
    options, f = _options(config), config.federation
    if options is None:
        return
    if f.client_weights != "uniform":
        raise UserError(
            f"federation.client_weights: found {f.client_weights}, but {NAME} counts on equal weights; set uniform"
        )
    if not options.noise_multiplier:
        if options.epsilon is not None:
            raise UserError(
                f"federation.wrappers.{NAME}: found epsilon {options.epsilon:g} with noise_multiplier 0, which is not "
                "private at all; raise noise_multiplier"
            )
        return
    spent = epsilon_of(config, f.num_rounds, sampled=not method.traits.remembers)
    if options.epsilon is not None and spent > options.epsilon:
        raise UserError(
            f"federation.wrappers.{NAME}.epsilon: found {options.epsilon:g}, but {f.num_rounds} rounds of "
            f"{config.clients_per_round} out of {config.population} clients with noise_multiplier "
            f"{options.noise_multiplier:g} spend {spent:.4g} at delta {options.delta:g}; "
            "raise noise_multiplier, or lower num_rounds or clients_per_round"
        )


def epsilon_of(config: Config, rounds: int, *, sampled: bool = True) -> float:
    """The epsilon of so many rounds at the config's delta, for the replacement of one client by another.

    A cohort of fixed size drawn without replacement, each round with a Gaussian mechanism. Replacing a client moves
    the sum by twice the clipping norm, so the accountant gets half of ``noise_multiplier``. ``sampled`` false counts
    every round as if all took part: what a client remembers tells of the cohorts that it was in, and then their draw
    hides nothing.

    Raises:
      UserError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise UserError(
            f"federation.wrappers: {NAME} needs dp-accounting; pip install 'fslora_jax[privacy]'"
        ) from None
    options = _options(config)
    noisy = dp_accounting.GaussianDpEvent(options.noise_multiplier / 2)
    cohort = config.clients_per_round if sampled else config.population
    event = dp_accounting.SampledWithoutReplacementDpEvent(config.population, cohort, noisy)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(event, rounds)
    return float(accountant.get_epsilon(options.delta))


def _options(config: Config) -> Any:
    chosen = config.federation.wrappers.get(NAME)
    if chosen is None:
        return None
    return checked(options_of(WRAPPERS[NAME].make), dict(chosen), f"federation.wrappers.{NAME}")
