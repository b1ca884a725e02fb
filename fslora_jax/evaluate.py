"""Evaluation of the global adapter with mergeable metrics."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.federation.local import Apply
from fslora_jax.methods import Spec, whole
from fslora_jax.types import Batch, Trainable


class Sums(NamedTuple):
    """Sums over examples; two of them merge by addition."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def zero(cls) -> "Sums":
        """Of no examples."""
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    def merge(self, other: "Sums") -> "Sums":
        """Of both sets of examples."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def means(self) -> dict[str, float]:
        """``{"loss", "accuracy"}`` as floats."""
        loss, correct, count = (float(x) for x in jax.device_get(self))
        return {"loss": loss / count, "accuracy": correct / count}


def measure(logits: Float[Array, "C E V"], batch: Batch) -> Sums:
    """Sums over a batch; fillers do not count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    hits = (logits.argmax(-1) == batch.labels) * batch.weights
    return Sums((losses * batch.weights).sum(), hits.sum(), batch.weights.sum())


def make_evaluation(apply: Apply, spec: Spec) -> Callable[[PyTree, Trainable, Batch], Sums]:
    """``(base, weights, batches) -> Sums`` of the global adapter with ``S = I``; batch leaves are ``(batches, ...)``.

    The whole held-out set is one dispatch: a scan over its batches.
    """

    def evaluation(base: PyTree, weights: Trainable, batches: Batch) -> Sums:
        held = jax.tree.map(lambda x: x[None], whole(spec, weights))

        def one(sums: Sums, batch: Batch) -> tuple[Sums, None]:
            batch = jax.tree.map(lambda x: x[None], batch)
            return sums.merge(measure(apply(base, [held], batch, None), batch)), None

        return jax.lax.scan(one, Sums.zero(), batches)[0]

    return jax.jit(evaluation, compiler_options=compiler_options())
