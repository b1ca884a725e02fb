"""Checks that need several devices: `test_devices.py` runs them in a process of its own, with eight virtual ones.

One device is the truth here: whole rounds on a mesh against the same rounds on one device, or against the oracle.
"""

import json
from functools import partial

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import toy
from compare import check_with_oracle, close, flat, fslora_with
from contract_methods import check_with_hand, replayed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from fslora_jax.bench.engines import engine_round
from fslora_jax.config import make_config
from fslora_jax.federation.cohort import plan_layout
from fslora_jax.federation.feed import Feed, make_cohort
from fslora_jax.federation.local import ClientOptimizer
from fslora_jax.federation.round import constants_of
from fslora_jax.methods import METHODS, Method, Server, fedit
from fslora_jax.methods.wrappers.over_the_air import over_the_air
from fslora_jax.models import build_model, weights
from fslora_jax.models.families import find_family
from fslora_jax.models.table import sources
from fslora_jax.sharding import CLIENTS, replicated

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}

MOMENTUM, ADAMW = toy.OPTIMIZERS["momentum"][0], toy.OPTIMIZERS["adamw"][0]


def test_identity_7_eight_devices_are_the_equations():
    """Three clients on eight devices, so most are empty; a server with momentum would show what they touched."""
    found = toy.play(fslora_with("momentum"), MOMENTUM, mesh=toy.mesh_of(8))
    check_with_oracle(found, "momentum", "momentum")
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found.servers[-1]))


def test_identity_7_eight_devices_are_one_with_dropout():
    """Whose masks are the client's own."""
    alone, spread = (
        toy.play(toy.METHOD, MOMENTUM, dropout=0.4, tiered=False, mesh=mesh)
        for mesh in (None, toy.mesh_of(8))
    )
    close(flat(spread.servers[-1].weights), flat(alone.servers[-1].weights), 5e-6)
    close(spread.losses, alone.losses)


@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_are_the_equations_of_every_method(name):
    found = replayed(name, "devices", toy.mesh_of(8), cohorts=toy.COHORTS[:1])
    check_with_hand(name, found, "momentum", toy.COHORTS[:1])
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found.servers[-1]))


def test_the_worst_channel_on_any_device_sets_the_gain():
    """Three clients on eight devices: a maximum over devices, and noise that is the same on all."""
    method = METHODS["fslora"].make(toy.SPEC, toy.SERVERS["average"][0])
    method = over_the_air(method, toy.SPEC, threshold=0.2)
    alone, spread = (toy.play(method, MOMENTUM, tiered=False, mesh=mesh) for mesh in (None, toy.mesh_of(8)))
    close(flat(spread.servers[-1].weights), flat(alone.servers[-1].weights), 5e-6)


def test_identity_7_two_devices_with_chunks_in_tiers_are_the_equations():
    """Seven clients in eight slots: two devices, two chunks, two slots each."""
    cohorts = [toy.EVERYBODY, toy.EVERYBODY]
    found = toy.play(toy.METHOD, ADAMW, cohorts=cohorts, mesh=toy.mesh_of(2), chunks=2)
    check_with_oracle(found, "adamw", cohorts=cohorts)
    assert len(plan_layout(toy.RANKS, cohorts, r=toy.R, tiered=True, groups=2, chunks=2).tiers) == 2


def program(slots: int, method: Method, optimizer: ClientOptimizer) -> str:
    """The round on eight devices with ``slots`` clients each."""
    mesh, clients = toy.mesh_of(8), 8 * slots
    population = toy.make_population(ranks=np.full(clients, 2))
    ids = np.arange(clients)
    layout = plan_layout(population.ranks, [ids], r=toy.R, tiered=True, groups=8)
    cohort = make_cohort(population, Feed(toy.STEPS, layout, lambda _: ids, toy.SHAPE), [0], mesh)
    server, base = jax.device_put((toy.start(method), toy.BASE), replicated(mesh))
    one_round = toy.compiled_round(method, optimizer, layout, 0.0, mesh)
    return one_round.lower(base, server, constants_of(5, mesh=mesh), cohort).compile().as_text()


def exchanged() -> dict[str, int]:
    """The sum of adapter and head, and by how many each component was trained, in 4 bytes each."""
    adapter_and_head = sum(x.size for x in jax.tree.leaves(toy.start(toy.METHOD).weights))
    return {"all-reduce": 4 * (adapter_and_head + len(toy.TARGETS) * toy.LAYERS * toy.R)}


@pytest.mark.parametrize("slots", [1, 3])
def test_devices_exchange_one_sum_of_the_adapter_whatever_the_cohort(slots):
    assert hlo.collectives(program(slots, toy.METHOD, MOMENTUM)) == exchanged()


def test_the_check_sees_a_gradient_summed_over_devices(monkeypatch):
    """Without a copy of the server for each device, autodiff would add up the gradients; JAX's types refuse it."""
    honest = jax.lax.pcast

    def broken(x, *args, **kwargs):
        return x if isinstance(x, Server) else honest(x, *args, **kwargs)

    monkeypatch.setattr(jax.lax, "pcast", broken)
    with pytest.raises(TypeError, match="must have equal types"):
        program(1, fedit(toy.SPEC, optax.sgd(1.0)), toy.OPTIMIZERS["sgd"][0])


def test_the_check_sees_other_collectives():
    mesh = toy.mesh_of(8)
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P(CLIENTS)))
    for spec, kind in ((P(), "all-gather"), (P(None, CLIENTS), "all-to-all")):
        text = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, spec)).lower(x).compile().as_text()
        assert kind in hlo.collectives(text)


def test_the_cohort_is_fed_the_same_on_any_mesh():
    layout = plan_layout(toy.RANKS, [toy.EVERYBODY], r=toy.R, tiered=True, groups=4, chunks=2)
    feed = Feed(toy.STEPS, layout, lambda _: toy.EVERYBODY, toy.SHAPE)
    alone, spread = (make_cohort(toy.POPULATION, feed, [1], mesh) for mesh in (None, toy.mesh_of(4)))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_weights_are_placed_by_path_and_read_once_and_only_where_they_live(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    model = build_model(BERT, num_labels=2, pooling="mean")
    abstract = jax.eval_shape(model.init_base, jax.random.key(0))
    rng = np.random.default_rng(0)
    table = sources(find_family(BERT), abstract)
    tensors = {source.name: rng.normal(size=source.shape).astype(np.float32) for source in table}
    save_file(tensors, tmp_path / "model.safetensors")
    mesh = jax.make_mesh((2, 2, 2), ("clients", "fsdp", "tensor"))
    asked, read = {}, []

    def placement(path, shape):
        asked[path] = shape
        return NamedSharding(mesh, P(None, "fsdp", "tensor") if path.endswith("kernel") else P())

    fill = weights._fill
    monkeypatch.setattr(weights, "CHUNK", 40)
    monkeypatch.setattr(
        weights, "_fill", lambda target, *rest: read.append(target.size) or fill(target, *rest)
    )
    load = partial(weights.load_model, tmp_path, num_labels=2, pooling="mean")
    base = load(placement=placement)[1]
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(base))
    jax.tree.map(np.testing.assert_array_equal, base, load()[1])
    assert asked["layers/linear/attention.self.query/kernel"] == (3, 16, 16)
    kernel = base["layers"]["linear"]["attention.self.query"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 8, 8)}


def test_engines_of_the_benchmark_do_the_same_round(tmp_path):
    """DrJAX spreads its clients over all devices, three of them for nobody; a Python loop has one device.

    Clients fail, and those who report weigh by their examples.
    """
    uneven = {"federation__failure_rate": 0.4, "federation__client_weights": "examples", "seed": 1}
    changes = {"federation__clients_per_round": None, "server_optimizer": {}} | uneven
    config = make_config(runs.settings(runs.make_world(tmp_path), **changes), "test")
    played = {name: engine_round(name, config) for name in ("tiered", "drjax", "loop")}
    assert {name: f.mesh and f.mesh.size for name, (f, _) in played.items()} == {
        "tiered": 8,
        "drjax": 8,
        "loop": None,
    }
    expected, *others = (jax.device_get(one_round().weights) for _, one_round in played.values())
    for found in others:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, expected)
