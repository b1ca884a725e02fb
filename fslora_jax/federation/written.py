"""What a language model's own words are worth: it writes greedily, and an answer is looked for in the text."""

from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from fslora_jax.config import DataConfig
from fslora_jax.data.answers import answer_of
from fslora_jax.data.examples import Examples
from fslora_jax.data.tokens import load_tokenizer
from fslora_jax.errors import UserError
from fslora_jax.federation.examples import tokenise_prompts
from fslora_jax.generate import write_on
from fslora_jax.models import Model
from fslora_jax.types import Local


def measure_written(
    folder: Path, model: Model, base: PyTree, held: Local, test: Examples, data: DataConfig, count: int
) -> dict[str, float]:
    """How many of the texts of at most ``count`` tokens give the right answer, and how many give any.

    As ``generated_accuracy`` and ``generated_answers``, of all examples and then of each group, under ``GROUP/``.
    ``folder`` is the model's, for its tokenizer.

    Raises:
      UserError: the examples have no options to look for.
    """
    if not test.options:
        raise UserError(f"generation: data.task {data.task} has no options to look for; expected commonsense")
    prompts, end = tokenise_prompts(folder, model, test, data, count)
    tokenizer = load_tokenizer(folder)
    texts = tokenizer.decode_batch(
        [ids.tolist() for ids in write_on(model, base, held, prompts, [end], count)]
    )
    names = test.label_names
    right = [names[label] for label in test.labels]
    said = [answer_of(text, name, names) for text, name in zip(texts, right, strict=True)]
    hits, any_of = (
        np.array([a == b for a, b in zip(said, right, strict=True)]),
        np.array([bool(a) for a in said]),
    )
    groups = np.array(test.groups or [""] * len(said))

    def of(rows: np.ndarray) -> dict[str, float]:
        values = {"generated_accuracy": hits, "generated_answers": any_of}
        return {name: float(value[rows].mean()) for name, value in values.items()}

    by_group = {f"{g}/{k}": v for g in sorted(set(test.groups)) for k, v in of(groups == g).items()}
    return of(np.ones(len(said), bool)) | by_group
