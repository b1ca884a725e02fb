"""A check that needs two devices and no more: `test_devices.py` runs it in a process of its own.

What it found came of all threads of a process being devices at work.
"""

import hlo
import jax
import numpy as np
import toy

from fslora_jax.evaluate import make_evaluation
from fslora_jax.methods import Spec
from fslora_jax.models import build_model
from fslora_jax.sharding import over_clients, replicated
from fslora_jax.types import Batch, Trainable

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}


def test_devices_share_an_evaluation_and_find_what_one_finds():
    """Products so large, and so many, that XLA would cut operations up: that made several CPU devices wrong."""
    model = build_model(BERT, num_labels=2, pooling="mean")
    base, head = model.init_base(jax.random.key(0)), model.init_head(jax.random.key(1))
    rng, shape = np.random.default_rng(0), (8, 28, 64)
    halves = np.arange(64) // 32
    batches = Batch(
        tokens=rng.integers(0, 50, shape),
        segments=np.broadcast_to(1 + 2 * np.arange(28)[:, None] + halves, shape),
        positions=np.broadcast_to(np.arange(64) % 32, shape),
        types=np.zeros(shape, int),
        labels=rng.integers(0, 2, (8, 56)),
        weights=np.ones((8, 56), np.float32),
        places=np.zeros((*shape[:2], 0), int),
    )
    spec, weights = Spec({}, 1, 1.0), Trainable({}, head)
    alone = make_evaluation(model.score, spec)(base, weights, batches)
    mesh = toy.mesh_of(2)
    shared = make_evaluation(model.score, spec, mesh)
    spread = shared(
        *jax.device_put((base, weights), replicated(mesh)), jax.device_put(batches, over_clients(mesh))
    )
    assert all(x.sharding.is_fully_replicated for x in spread)
    for part in spread.loss.addressable_shards:
        np.testing.assert_allclose(part.data, alone.loss, rtol=1e-5)
    program = shared.lower(base, weights, batches).compile().as_text()
    assert set(hlo.collectives(program)) == {"all-gather"}
