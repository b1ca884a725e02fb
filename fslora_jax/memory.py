"""How much memory one device needs for a round: an estimate from shapes alone, before anything is compiled or read."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fslora_jax.methods import Spec
from fslora_jax.models import Model

LOGIT_BYTES = 3 * 2**28
"""A language model makes its logits in pieces of 2**28 bytes; with their softmax and gradient there are three."""


class Plan(NamedTuple):
    """What decides the memory beside the model and its adapter.

    ``ranks`` are the cohort's k; ``states`` are arrays of the client optimiser for each trained value (AdamW 2,
    momentum 1, SGD 0), and ``server_states`` of the server's. ``clients`` x ``fsdp`` x ``tensor`` devices; each
    trains its share of the cohort in ``chunks`` parts. ``heads`` of attention; ``remat`` as in ``build_model``.
    """

    ranks: Sequence[int]
    batch_size: int
    seq_length: int
    states: int
    heads: int
    act_bytes: int
    server_states: int = 0
    clients: int = 1
    fsdp: int = 1
    tensor: int = 1
    chunks: int = 1
    remat: str = "frozen"


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: int
    server: int
    adapters: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All that is there at the same time."""
        return sum(self)


def estimate(model: Model, spec: Spec, plan: Plan) -> Memory:
    """Bytes on the device with the largest clients.

    Rows are taken as full, so packed batches of short texts need less. A compiler keeps more or less than what is
    counted here; the compiled program's own figures are the last word.
    """
    base = jax.eval_shape(model.init_base, jax.random.key(0))
    head = sum(
        math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(model.init_head, jax.random.key(0)))
    )
    slots = math.ceil(len(plan.ranks) / (plan.clients * plan.chunks))
    largest = sorted(plan.ranks, reverse=True)[:: plan.clients * plan.chunks]
    trained = sum(adapter_values(spec, k) + head for k in largest)
    whole = adapter_values(spec, spec.r) + head
    gathered = bytes_of(base["layers"]) // layers_of(spec) if plan.fsdp > 1 else 0
    return Memory(
        weights=bytes_of(base) // (plan.fsdp * plan.tensor) + gathered,
        # The state, the average with its running sum over chunks, and the new state.
        server=4 * whole * (4 + plan.server_states),
        # What is given, what is trained, its gradient, and its copy in the dtype of the layers.
        adapters=trained * (12 + plan.act_bytes),
        optimizer=4 * trained * plan.states,
        activations=slots * _activations(model, base, spec, plan),
    )


def adapter_values(spec: Spec, k: int) -> int:
    """Values of the adapter of a client of rank ``k``."""
    return sum(
        r * spec.targets[m].layers * (spec.targets[m].i + spec.targets[m].o) for m, r in spec.ranks(k).items()
    )


def layers_of(spec: Spec) -> int:
    """Layers of the model."""
    return next(iter(spec.targets.values())).layers


def width_of(model: Model, base: dict[str, Any]) -> int:
    """Features of a token: those of the embeddings of the vocabulary."""
    tables = [x.shape for x in jax.tree.leaves(base["embeddings"]) if x.shape[0] == model.vocab_size]
    return max(tables)[1]


def bytes_of(tree: Any) -> int:
    """Of all arrays, abstract or not."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activations(model: Model, base: dict[str, Any], spec: Spec, plan: Plan) -> int:
    """Of one client: what the backward pass keeps of each layer, and one layer that it works on."""
    tokens, width = plan.batch_size * plan.seq_length / plan.fsdp, width_of(model, base)
    outputs = sum(target.o for target in model.modules.values()) / plan.tensor
    scores = plan.heads * plan.seq_length / plan.tensor
    kept = {
        "full": width,
        "frozen": width + outputs,
        "none": 5 * width + outputs + scores,
    }[plan.remat]
    working = 4 * width + 2 * outputs + 3 * scores
    of_layers = tokens * plan.act_bytes * (layers_of(spec) * kept + working)
    return round(of_layers + (LOGIT_BYTES if model.naming.task_type == "CAUSAL_LM" else 0))
