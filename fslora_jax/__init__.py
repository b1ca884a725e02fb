"""Federated Sketching LoRA in JAX: a whole federated round as one compiled, sharded program."""
