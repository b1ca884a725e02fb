"""The clients' optimiser, from its config."""

from typing import Any

import jax
import optax

from fslora_jax.config import ClientOptimizerConfig
from fslora_jax.federation.local import ClientOptimizer


def make_client_optimizer(
    config: ClientOptimizerConfig, num_rounds: int, local_steps: int
) -> ClientOptimizer:
    """The local optimiser, with its learning rate as a function of the step counted over the whole run."""
    total, warmup = num_rounds * local_steps, config.warmup_rounds * local_steps
    peak = config.learning_rate
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, max(total - warmup, 1)),
        "cosine": optax.cosine_decay_schedule(peak, max(total - warmup, 1)),
    }[config.schedule]
    rate = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
    direction = {
        "sgd": optax.trace(config.momentum) if config.momentum else optax.identity(),
        "adamw": optax.scale_by_adam(config.b1, config.b2, config.eps),
    }[config.name]
    if config.head_learning_rate is not None:
        ratio = config.head_learning_rate / config.learning_rate
        direction = optax.chain(direction, scale_head(ratio))
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    return ClientOptimizer(optax.chain(clip, direction, decay), rate)


def scale_head(factor: float) -> optax.GradientTransformation:
    """Scales the updates of the dense head alone."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        return updates._replace(head=jax.tree.map(lambda u: factor * u, updates.head))

    return optax.stateless(scale)
