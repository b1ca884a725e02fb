"""FedIT: FedAvg of the two LoRA factors (Zhang et al., arXiv 2305.05644)."""

import optax

from fslora_jax.methods.base import Method
from fslora_jax.methods.parts import fedavg_lora
from fslora_jax.methods.spec import Spec


def fedit(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """Every client trains all r components, and the server averages A and B apart.

    FSLoRA at ``k = r`` for all clients is this method.
    """
    return fedavg_lora(spec, server_optimizer)
