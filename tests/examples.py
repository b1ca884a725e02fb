"""Five short texts as batches in several layouts, clients with random adapters, and what a model makes of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fslora_jax.models import build_model
from fslora_jax.types import Batch, Local, Pair, Trainable

LENGTHS = (7, 3, 5, 4, 10)
LABELS = (0, 2, 1, 1, 0)
PADDED = [[0], [1], [2], [3], [4]]
PACKED = [[0, 1], [2, 3], [4]]
PADDED_BY_ONE = ("roberta", "xlm-roberta", "mpnet")
"""Families whose padding is token 1, and whose positions start behind it."""
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(3, 50, n) for n in LENGTHS]


def types_of(family, n):
    """Two texts for BERT; the others have one token type, or none."""
    return (np.arange(n) > n // 2).astype(int) * (family == "bert")


def make_batch(family, rows, clients=1, shape=(5, 16), examples=7, left=False):
    """The examples named by ``rows``, one list a row; all is filled up to one shape, rows perhaps on the left."""
    tokens, segments, positions, types = np.zeros((4, *shape), int)
    tokens += 1  # padding, which some families' positions in torch depend on
    places = np.full(shape, -1)
    for b, row in enumerate(rows):
        start, asked = shape[1] - sum(LENGTHS[e] for e in row) if left else 0, 0
        for e in row:
            here = slice(start, start := start + LENGTHS[e])
            tokens[b, here], segments[b, here] = TOKENS[e], e + 1
            positions[b, here], types[b, here] = np.arange(LENGTHS[e]), types_of(family, LENGTHS[e])
            places[b, asked : (asked := asked + LENGTHS[e] - 1)] = np.arange(here.start, here.stop - 1)
    labels = np.resize(LABELS, examples)
    weights = (np.arange(examples) < len(LENGTHS)).astype(np.float32)
    batch = Batch(tokens, segments, positions, types, labels, weights, places)
    return jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * clients)), batch)


def make_tier(model, head, clients, k, seed=0, modules=None):
    """Random non-zero factors, different for each client; every client has the same head."""
    rng = np.random.default_rng(seed)
    targets = {path: model.modules[path] for path in (model.modules if modules is None else modules)}

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.2).astype(np.float32))

    adapter = {
        p: Pair(normal(clients, t.layers, k, t.i), normal(clients, t.layers, k, t.o))
        for p, t in targets.items()
    }
    scale = {p: jnp.abs(normal(clients, t.layers, k)) * 4 for p, t in targets.items()}
    heads = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), head)
    return Local(Trainable(adapter, heads), scale, scale, {})


def loss_and_logits(weights, apply, base, tiers, batch, dropout):
    """The sum over clients of their mean cross-entropy over real examples."""
    tiers = [tier._replace(weights=w) for tier, w in zip(tiers, weights, strict=True)]
    logits = apply(base, tiers, batch, dropout)
    logp = (jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.labels, logits.shape[-1])).sum(-1)
    return -((logp * batch.weights).sum(-1) / batch.weights.sum(-1)).sum(), logits


grad = jax.jit(jax.grad(loss_and_logits, has_aux=True), static_argnames="apply")


def gradients(model, base, tiers, batch, dropout=None):
    """Gradients of all that clients train, by tier, and the logits."""
    return grad([tier.weights for tier in tiers], model.apply, base, tiers, batch, dropout)


def logits_of(model, base, tiers, batch, dropout=None):
    return jax.jit(model.apply)(base, tiers, batch, dropout)


def assert_close(got, want, tolerance):
    """Every leaf, relative to the largest value of that leaf."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6), jax.tree_util.keystr(path)


CONFIG = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.2,
    "hidden_act": "gelu",
}


@functools.cache
def bert(clients=1, lora_dropout=0.0, pooling="mean"):
    """A model with random weights and an adapter on everything."""
    model = build_model(CONFIG, num_labels=3, pooling=pooling, lora_dropout=lora_dropout)
    head = model.init_head(jax.random.key(1))
    return model, jax.jit(model.init_base)(jax.random.key(0)), make_tier(model, head, clients, k=3)
