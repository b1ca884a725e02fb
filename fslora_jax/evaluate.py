"""Evaluation of the global adapter: scores of all held-out examples in one dispatch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fslora_jax.backend import compiler_options
from fslora_jax.federation.local import ScoreFn
from fslora_jax.methods import Spec, whole
from fslora_jax.types import Batch, Score, Trainable


def make_evaluation(score: ScoreFn, spec: Spec) -> Callable[[PyTree, Trainable, Batch], Score]:
    """``(base, weights, batches) -> Score`` of the global adapter with ``S = I``; batch leaves are ``(batches, ...)``.

    The whole held-out set is one dispatch: a scan over its batches.
    """

    def evaluation(base: PyTree, weights: Trainable, batches: Batch) -> Score:
        held = jax.tree.map(lambda x: x[None], whole(spec, weights))

        def one(total: Score, batch: Batch) -> tuple[Score, None]:
            found = score(base, [held], jax.tree.map(lambda x: x[None], batch), None)
            return jax.tree.map(lambda old, new: old + new[0], total, found), None

        return jax.lax.scan(one, Score(*jnp.zeros(3)), batches)[0]

    return jax.jit(evaluation, compiler_options=compiler_options())


def means(score: Score) -> dict[str, float]:
    """``{"loss", "accuracy"}`` as floats.

    >>> means(Score(loss=3.0, correct=1.0, count=2.0))
    {'loss': 1.5, 'accuracy': 0.5}
    """
    loss, correct, count = (float(x) for x in jax.device_get(score))
    return {"loss": loss / count, "accuracy": correct / count}
