"""What every model of this package is: pure functions over a frozen base and what clients hold."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key

from fslora_jax.lora import Target
from fslora_jax.types import Head, Score


class Naming(NamedTuple):
    """Where a module sits in the Hugging Face class ``architecture``, as an export needs it.

    ``layer_prefix`` has a field ``{layer}``; ``head_modules`` are PEFT's ``modules_to_save``.
    """

    layer_prefix: str
    task_type: str
    head_modules: tuple[str, ...]
    architecture: str


def shifted(base: dict[str, Any], delta: dict[str, Float[Array, "N i o"]]) -> dict[str, Any]:
    """A base with something added to the kernels of some modules; what is not named is the same array."""
    linear = dict(base["layers"]["linear"])
    for path, change in delta.items():
        kernel = linear[path]["kernel"]
        linear[path] = linear[path] | {"kernel": kernel + change.astype(kernel.dtype)}
    return base | {"layers": base["layers"] | {"linear": linear}}


class Model(NamedTuple):
    """A model as pure functions; the base is an argument, always (closed over, XLA folds it as a constant).

    - ``apply(base, tiers, batch, dropout=None) -> logits (C, E, labels)`` in float32. ``tiers`` are
      ``types.Local``, each stacked over its clients and in the order of the batch; all adapt the same
      modules, and no module is the plain base. ``dropout`` holds one key per client while training, None in
      evaluation.
    - ``score(base, tiers, batch, dropout=None) -> Score (C, E)``: what training and evaluation ask for.
    - ``init_base(key)``: random base weights; ``jax.eval_shape`` of it is the abstract base.
    - ``init_head(key)``: the head that training starts from.
    - ``modules``: path inside a layer -> size of each linear module that an adapter may name.
    - ``max_length``: the longest example, in tokens.
    - ``model_type`` and ``heads`` (of attention): ``config.json``'s, set by ``build_model``.
    - ``generate(base, tiers, tokens, lengths, ends, count) -> tokens (C, B, count)``: what a language model writes,
      as ``generate.generate``; None for a classifier and for encoders.
    """

    apply: Callable[..., Float[Array, "C E labels"]]
    score: Callable[..., Score]
    init_base: Callable[[Key[Array, ""]], dict[str, Any]]
    init_head: Callable[[Key[Array, ""]], Head]
    modules: dict[str, Target]
    naming: Naming
    vocab_size: int
    max_length: int
    model_type: str = ""
    heads: int = 1
    generate: Callable[..., Int[Array, "C B count"]] | None = None
