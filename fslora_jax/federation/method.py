"""A config's method: made, and refused where it does not fit the rest of the config."""

import jax

from fslora_jax.config import Config
from fslora_jax.errors import UserError
from fslora_jax.federation.privacy import check_privacy
from fslora_jax.methods import Method, Spec, build


def make_method(config: Config, spec: Spec) -> Method:
    """The method with its wrappers.

    Raises:
      UserError: an unknown name or option, or settings that the method rules out.
    """
    f = config.federation
    method = build(f.method, f.method_options, f.wrappers, spec, config.server_optimizer.build())
    _check(config, method)
    return method


def check_method(config: Config) -> None:
    """Refuses what `make_method` would, before anything is loaded."""
    make_method(config, Spec({}, config.lora.r, 1.0))


def is_tiered(config: Config, method: Method) -> bool:
    """Whether clients have slots of their own rank: not where each one holds all r components."""
    return config.federation.layout == "tiered" and not method.traits.holds_all


def _check(config: Config, method: Method) -> None:
    f, traits = config.federation, method.traits
    check_privacy(config, method)
    if traits.full_rank and (f.ranks != "turn" or any(ratio != 1 for ratio in f.sketching_ratios)):
        raise UserError(
            f"federation.ranks, federation.sketching_ratios: found {f.ranks}, {list(f.sketching_ratios)}, but "
            f"{f.method} trains all r components at every client; set turn and [1.0], or another federation.method"
        )
    if traits.own_step and not config.server_optimizer.is_plain:
        raise UserError(
            f"server_optimizer: found {config.server_optimizer.name} at {config.server_optimizer.learning_rate:g}, but "
            f"the server's step of {f.method} is its own; leave out server_optimizer"
        )
    if traits.moves_base and config.model.quantization != "none":
        raise UserError(
            f"model.quantization: found {config.model.quantization}, but {f.method} merges into the base; set none"
        )
    if method.forward is not None and config.lora.init_from is not None:
        raise UserError(
            f"lora.init_from: found {config.lora.init_from}, but {f.method} trains other factors than an adapter "
            "folder holds; leave it out, or set another federation.method"
        )
    if traits.remembers and f.rounds_per_call > 1:
        raise UserError(
            f"federation.rounds_per_call: found {f.rounds_per_call}, but clients of {f.method} keep state, which is "
            "handed over between rounds; set 1"
        )
    if traits.remembers and jax.process_count() > 1:
        raise UserError(
            f"federation.method: clients of {f.method} keep state, which several processes do not share; run one"
        )
