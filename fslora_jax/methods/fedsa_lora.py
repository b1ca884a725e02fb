"""FedSA-LoRA: A is shared, B and the head stay with the client (Guo et al., arXiv 2410.01463)."""

import optax

from fslora_jax.methods.base import Method
from fslora_jax.methods.parts import fedavg_lora
from fslora_jax.methods.spec import Spec
from fslora_jax.methods.wrappers.personalise import personalise


def fedsa_lora(spec: Spec, server_optimizer: optax.GradientTransformation) -> Method:
    """FedIT whose B and head are personal: clients learn A together and send it alone."""
    return personalise(fedavg_lora(spec, server_optimizer), spec, parts=("b", "head"))
