"""Real model definitions on meshes of eight virtual devices: `test_devices.py` runs this in a process of its own.

The same two rounds on one device, with clients over all devices, and with every axis in use.
"""

from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import toy
from jax.sharding import Mesh

from fslora_jax.federation.cohort import plan_layout
from fslora_jax.federation.feed import Feed, make_cohort
from fslora_jax.federation.local import Passes
from fslora_jax.federation.round import Cohort, constants_of, make_round
from fslora_jax.lora import product
from fslora_jax.methods import Server, Spec, fslora
from fslora_jax.models.families import build_model
from fslora_jax.program import Collective, collectives
from fslora_jax.sharding import AXES, base_shardings, client_groups, replicated

BERT = {
    "model_type": "bert",
    "vocab_size": toy.VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": toy.VOCAB + 1,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
WIDE_LLAMA = LLAMA | {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1}
"""Blocks of 4-bit numbers that every axis splits."""

MODELS = {
    "bert": (BERT, "mean", "none", ("attention.self.query", "output.dense"), None),
    "bert in passes": (BERT, "mean", "none", ("attention.self.query", "output.dense"), 2),
    "llama": (LLAMA, "native", "none", ("self_attn.k_proj", "mlp.down_proj"), None),
    "packed llama": (WIDE_LLAMA, "native", "nf4", ("self_attn.k_proj", "mlp.down_proj"), None),
}
"""Name -> (config.json, pooling, quantization, modules to adapt: one of each kind of split, rows of a pass)."""

MESHES = {"alone": (1, 1, 1), "clients": (8, 1, 1), "all": (2, 2, 2)}


class Rounds(NamedTuple):
    """Two rounds on one mesh: the server after them, all losses, the program's exchanges."""

    server: Server
    losses: list[np.ndarray]
    exchanges: list[Collective]


@cache
def played(name: str, mesh_name: str) -> Rounds:
    config, pooling, quantization, modules, rows = MODELS[name]
    model = build_model(
        config, num_labels=toy.LABELS, pooling=pooling, lora_dropout=0.3, quantization=quantization
    )
    spec = Spec({path: model.modules[path] for path in modules}, toy.R, scale=0.5)
    method = fslora(spec, optax.sgd(1.0))
    mesh = toy.mesh_of(*MESHES[mesh_name])
    feed = feed_of(mesh)
    optimizer = toy.OPTIMIZERS["momentum"][0]
    passes = rows and Passes(rows, skip=mesh_name != "all")
    options = {"local_steps": toy.STEPS.local_steps, "dropout": True, "passes": passes, "mesh": mesh}
    one_round = jax.jit(make_round(model.score, method, optimizer, feed.layout, **options))
    base = jax.jit(model.init_base)(jax.random.key(3))
    server = jax.jit(lambda key: method.init(key, model.init_head(key)))(jax.random.key(4))
    base = jax.device_put(base, base_shardings(mesh, base))
    server, constants = jax.device_put(server, replicated(mesh)), constants_of(5, mesh=mesh)
    program = one_round.lower(base, server, constants, make_cohort(toy.POPULATION, feed, [0], mesh)).compile()
    losses = []
    for t in range(2):
        cohort = make_cohort(toy.POPULATION, feed, [t], mesh)
        server, played = program(base, server, constants, cohort)
        losses.append(by_client(cohort, played.losses))
    return Rounds(
        server, losses, collectives(program.as_text(), dict(zip(AXES, MESHES[mesh_name], strict=True)))
    )


def feed_of(mesh: Mesh | None) -> Feed:
    layout = plan_layout(toy.RANKS, [toy.EVERYBODY], r=toy.R, tiered=True, groups=client_groups(mesh))
    return Feed(toy.STEPS, layout, lambda _: toy.EVERYBODY, toy.SHAPE)


def by_client(cohort: Cohort, losses: jax.Array) -> np.ndarray:
    ids = np.asarray(cohort.clients.id).ravel()
    return np.asarray(losses).reshape(len(ids), -1)[np.argsort(ids)][-len(toy.EVERYBODY) :]


def products(server: Server) -> dict[str, np.ndarray]:
    found = {path: np.asarray(product(pair)) for path, pair in server.weights.adapter.items()}
    return found | {f"head {k}": np.asarray(v) for k, v in next(iter(server.weights.head.values())).items()}


@pytest.mark.parametrize("mesh_name", ["clients", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_identity_7_any_mesh_is_one_device(name, mesh_name):
    """Products B A, the head and every loss, with dropout."""
    alone, spread = played(name, "alone"), played(name, mesh_name)
    expected, found = products(alone.server), products(spread.server)
    assert all(abs(x).max() > 0 for x in expected.values())
    for path, x in expected.items():
        np.testing.assert_allclose(found[path], x, rtol=1e-4, atol=1e-6, err_msg=path)
    # A loss near 0 is a difference of numbers near 1.
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-5, atol=3e-7)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.server))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exchanged_over_which_axis(name):
    """Clients meet once a round in all-reduces; frozen weights are gathered over fsdp, never over another axis."""
    for mesh_name in ("clients", "all"):
        exchanges = played(name, mesh_name).exchanges
        over_clients = [c for c in exchanges if "clients" in c.axes]
        assert {(c.kind, c.axes, c.times) for c in over_clients} == {("all-reduce", ("clients",), 1)}
    assert all(c.axes == ("fsdp",) for c in exchanges if c.kind == "all-gather" and c.times > 1)
    gathered = sum(c.times for c in exchanges if c.kind == "all-gather" and c.axes == ("fsdp",))
    assert gathered >= toy.STEPS.local_steps * toy.LAYERS
    assert any(c.kind == "all-reduce" and c.axes == ("tensor",) for c in exchanges)
