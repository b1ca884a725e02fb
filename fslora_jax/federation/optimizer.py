"""The clients' optimiser, from its config."""

import optax

from fslora_jax.config import ClientOptimizerConfig
from fslora_jax.federation.local import ClientOptimizer, Rates


def make_client_optimizer(
    config: ClientOptimizerConfig, num_rounds: int, local_steps: int
) -> ClientOptimizer:
    """The local optimiser, with the factor on its learning rates by the step counted over the whole run."""
    total, warmup = num_rounds * local_steps, config.warmup_rounds * local_steps
    after = {
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, max(total - warmup, 1)),
        "cosine": optax.cosine_decay_schedule(1.0, max(total - warmup, 1)),
    }[config.schedule]
    schedule = optax.join_schedules([optax.linear_schedule(0.0, 1.0, max(warmup, 1)), after], [warmup])
    direction = {
        "sgd": optax.trace(config.momentum) if config.momentum else optax.identity(),
        "adamw": optax.scale_by_adam(config.b1, config.b2, config.eps),
    }[config.name]
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity()
    return ClientOptimizer(optax.chain(clip, direction, decay), schedule)


def learning_rates(config: ClientOptimizerConfig) -> Rates:
    """Of adapter and head; arguments of the compiled round, so that one program serves all of them."""
    head = config.head_learning_rate
    return Rates(config.learning_rate, config.learning_rate if head is None else head)
