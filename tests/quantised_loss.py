"""What packing the frozen base costs: held-out loss of sentiment and perplexity of English, for each format.

``python tests/quantised_loss.py SENTENCES`` takes that many sentences for training a linear head on MiniLM, and
a twentieth of them for SmolLM2; the models and the movie sentences are the packaged ones.
"""

import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from test_models_smollm import PLAIN, batch_of

from fslora_jax import hub
from fslora_jax.data.tokens import load_tokenizer
from fslora_jax.models import load_model
from fslora_jax.models.quantise import QUANTISATIONS
from fslora_jax.types import Local, Trainable

HELD_OUT = 500
PIECE = 100
"""Sentences of one batch."""


def sentences(number: int) -> tuple[list[str], np.ndarray]:
    path = hub.resolve_dataset("cornell-movie-review-data/rotten_tomatoes").path
    assert path is not None
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))[:number]
    return [rows[n]["text"] for n in order], np.array([int(rows[n]["label"]) for n in order])


def sentiment(name: str, number: int) -> dict[str, float]:
    """A logistic regression on mean-pooled, frozen MiniLM."""
    folder = hub.resolve_model("sentence-transformers/all-MiniLM-L6-v2")
    texts, labels = sentences(number + HELD_OUT)
    model, base = load_model(folder, num_labels=384, pooling="mean", quantization=name)
    head = {"classifier": {"kernel": jnp.eye(384)[None], "bias": jnp.zeros((1, 384))}}
    apply = jax.jit(lambda base, batch: model.apply(base, [Local(Trainable({}, head), {}, {}, {})], batch)[0])
    ids = [encoding.ids[:64] for encoding in load_tokenizer(folder).encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    vectors = np.zeros((len(ids), 384))
    for start in range(0, len(ids), PIECE):
        piece = order[start : start + PIECE]
        vectors[piece] = apply(base, batch_of([ids[n] for n in piece]))
    fitted = LogisticRegression(C=0.1, max_iter=1000).fit(vectors[HELD_OUT:], labels[HELD_OUT:])
    loss = log_loss(labels[:HELD_OUT], fitted.predict_proba(vectors[:HELD_OUT]))
    return {"loss": float(loss), "accuracy": float(fitted.score(vectors[:HELD_OUT], labels[:HELD_OUT]))}


def english(name: str, number: int) -> dict[str, float]:
    """Perplexity of the next token over all sentences."""
    folder = hub.resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer = load_tokenizer(folder)
    model, base = load_model(folder, task="causal", quantization=name)
    score = model.score(
        base, [PLAIN], batch_of([e.ids for e in tokenizer.encode_batch(sentences(number)[0])])
    )
    loss = float(score.loss.sum() / score.count.sum())
    return {"loss": loss, "perplexity": float(np.exp(loss)), "tokens": float(score.count.sum())}


if __name__ == "__main__":
    for name in ("none", *QUANTISATIONS):
        print(name, sentiment(name, int(sys.argv[1])), english(name, int(sys.argv[1]) // 20), flush=True)
