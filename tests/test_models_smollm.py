"""SmolLM2-135M's real weights: the same perplexity of English text as in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from fslora_jax.data.tokens import load_tokenizer
from fslora_jax.models import load_model
from fslora_jax.types import Batch, Local, Trainable

TEXTS = [
    "The tower of the old church can be seen from every street of the town, and its bell still rings at noon.",
    "When water freezes it expands, which is why a bottle that is full to the brim breaks in the cold.",
    "She opened the letter slowly, read it twice, and put it back into the drawer without a word.",
    "To bake bread you need flour, water, salt and yeast; everything else is patience.",
    "In 1969 two people walked on the moon while a third one waited in orbit above them.",
    "The film is long, but it never loses sight of the people it is about.",
]
PLAIN = Local(Trainable({}, {}), {}, {}, {})
"""One client without adapters."""


def batch_of(rows: list[list[int]]) -> Batch:
    """One client's right-padded texts, which ask for every next token."""
    length = max(map(len, rows))
    inside = np.array([[n < len(row) for n in range(length)] for row in rows], np.int32)
    places = np.array([[n if n < len(row) - 1 else -1 for n in range(length - 1)] for row in rows], np.int32)
    batch = Batch(
        tokens=np.array([row + [0] * (length - len(row)) for row in rows], np.int32),
        segments=inside * np.arange(1, len(rows) + 1)[:, None].astype(np.int32),
        positions=inside * np.arange(length, dtype=np.int32),
        types=np.zeros_like(inside),
        labels=np.zeros(len(rows), np.int32),
        weights=np.ones(len(rows), np.float32),
        places=places,
    )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch)


def losses(model, base, batch):
    """Mean loss of each text's next tokens."""
    score = jax.jit(model.score)(base, [PLAIN], batch)
    return np.asarray(score.loss / score.count)[0]


@pytest.fixture(scope="module")
def batch(smollm):
    return batch_of([encoding.ids for encoding in load_tokenizer(smollm).encode_batch(TEXTS)])


@pytest.fixture(scope="module")
def reference(smollm, batch):
    """The losses of transformers with the file as it dequantises it."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(smollm, gguf_file=next(smollm.glob("*.gguf")).name)
    found = []
    for tokens, segments in zip(batch.tokens[0], batch.segments[0], strict=True):
        ids = torch.tensor(np.asarray(tokens[segments > 0]))[None].long()
        with torch.no_grad():
            found.append(hf(input_ids=ids, labels=ids).loss.item())
    return np.array(found)


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(smollm, batch, reference):
    model, base = load_model(smollm, task="causal")
    found = losses(model, base, batch)
    np.testing.assert_allclose(np.exp(found), np.exp(reference), rtol=1e-3)
    assert np.exp(reference.mean()) < 60
