"""Planning: programs for devices that are not here, and what is read off them."""

import importlib.util
import json
from collections import Counter

import jax
import pytest
import runs

from fslora_jax.config import make_config
from fslora_jax.data.batches import BatchShape
from fslora_jax.errors import UserError
from fslora_jax.models.families import build_model
from fslora_jax.plan import topology
from fslora_jax.plan.compiled import abstract_arguments, layout_of, round_of, text_of
from fslora_jax.plan.search import moved, ways
from fslora_jax.program import Collective, collectives, matmul_flops

SIZES = {"clients": 4, "fsdp": 2, "tensor": 2}

PROGRAM = """\
HloModule jit_round

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = bf16[4,6]{1,0} all-gather(%w), channel_id=1, replica_groups=[8,2]<=[4,2,2]T(0,2,1), dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%limit (p: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w2 = (s32[], f32[8]) while(%p), condition=%limit, body=%inner
  %ar = (f32[3]{0}, f32[2]{0}) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%again (p: f32[8]) -> f32[8] {
  %more = bf16[4,6]{1,0} all-gather(%w), channel_id=3, replica_groups=[8,2]<=[4,2,2]T(0,2,1), dimensions={0}
}

%copied (p: f32[8]) -> f32[8] {
  %same = bf16[4,6]{1,0:T(8,128)} all-gather(%w), channel_id=3, replica_groups=[8,2]<=[4,2,2]T(0,2,1), dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w1 = (s32[], f32[8]) while(%p), condition=%limit, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %f1 = f32[8] fusion(%p), kind=kCustom, calls=%again
  %f2 = f32[8] fusion(%f1), kind=kCustom, calls=%copied
  %start = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), channel_id=4, replica_groups={{0,4,8,12}}, dimensions={0}
  %sum = f32[10]{0} all-reduce(%p), channel_id=5, replica_groups=[1,16]<=[16], to_apply=%add
  %cut1 = f32[7]{0} all-reduce(%a), channel_id=7, replica_groups={{0,4,8,12}}, to_apply=%add
  %cut2 = f32[7]{0:T(128)} all-reduce(%b), channel_id=7, replica_groups={{0,4,8,12}}, to_apply=%add
  %cut3 = f32[9]{0} all-reduce(%c), channel_id=7, replica_groups={{0,4,8,12}}, to_apply=%add
  ROOT %move = f32[8]{0} collective-permute(%p), channel_id=6, source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_with_their_axes_bytes_and_times():
    found = collectives(PROGRAM, SIZES)
    assert Counter(found) == Counter(
        [
            Collective("all-gather", ("fsdp",), 48, 15),
            Collective("all-reduce", ("tensor",), 20, 3),
            Collective("all-gather", ("fsdp",), 48, 1),
            Collective("all-gather", ("clients",), 32, 1),
            Collective("all-reduce", ("clients", "fsdp", "tensor"), 40, 1),
            Collective("collective-permute", ("tensor",), 32, 1),
            *[Collective("all-reduce", ("clients",), 28, 1)] * 2,
            Collective("all-reduce", ("clients",), 36, 1),
        ]
    )


@pytest.mark.parametrize(
    ("kind", "bytes"), [("all-reduce", 120), ("all-gather", 60), ("reduce-scatter", 240), ("all-to-all", 80)]
)
def test_what_a_ring_of_four_moves(kind, bytes):
    assert moved(Collective(kind, ("clients",), 80, 1), {"clients": 4}) == bytes


def tiny(**changes):
    named = {"model": {"name": "m"}, "data": runs.SETTINGS["data"] | {"name": "d"}}
    return make_config(runs.SETTINGS | named | changes, "test")


def model_of(config, **options):
    fields = {
        **runs.SIZES,
        "model_type": "bert",
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    return build_model(fields, num_labels=2, lora_dropout=config.lora.lora_dropout, **options)


def traced(config):
    model = model_of(config)
    layout = layout_of(config, model, config.federation.cohort_chunks)
    arguments = abstract_arguments(config, model, BatchShape(3, 12, 0), layout)
    return jax.jit(round_of(config, model, layout, None)).trace(*arguments)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_round_lowers_for_other_platforms(platform):
    config = tiny()
    model = model_of(config)
    layout = layout_of(config, model, 1)
    arguments = abstract_arguments(config, model, BatchShape(3, 12, 0), layout)
    exported = jax.export.export(jax.jit(round_of(config, model, layout, None)), platforms=[platform])(
        *arguments
    )
    assert exported.platforms == (platform,)
    assert "while" in exported.mlir_module()


def test_operations_grow_with_steps_and_not_with_chunks():
    once = matmul_flops(traced(tiny()).jaxpr.jaxpr)
    f = runs.SETTINGS["federation"]
    twice = matmul_flops(traced(tiny(federation=f | {"local_steps": 4})).jaxpr.jaxpr)
    chunked = matmul_flops(traced(tiny(federation=f | {"cohort_chunks": 3})).jaxpr.jaxpr)
    assert 1.9 * once < twice < 2.1 * once
    assert 0.9 * once < chunked < 1.1 * once


def test_ways_to_save_memory_keep_the_clients():
    found = list(ways(tiny(), 8))
    assert [(w.federation.cohort_chunks, w.mesh.fsdp) for w in found] == [(1, 1), (1, 2), (2, 4), (3, 8)]
    assert all(w.clients_per_round == 3 for w in found)


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v7:4x4", "cpu:0", "gpu:8"])
def test_an_unknown_slice_is_named(name):
    with pytest.raises(UserError, match=f"--topology: found '{name}'; expected such as v5e:4x4"):
        topology.chip_of(name)


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fslora_jax\[plan\]'"):
        topology.devices_of("v5e:4x4")


def plan_of(folder, name, *argv):
    """`fslora plan` in a process of its own: it settles what JAX takes for its devices."""
    (folder / "model").mkdir()
    fields = {
        **runs.SIZES,
        "model_type": "bert",
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    (folder / "model" / "config.json").write_text(json.dumps(fields))
    world = runs.World(folder, folder / "model", folder / "none.csv", folder / "cache", folder / "tiny.yaml")
    runs.write_config(world.config, world)
    done = runs.finish(runs.start(world, "plan", world.config, "--topology", name, *argv), 500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_for_eight_cpus_reads_no_weights(tmp_path):
    file = tmp_path / "plan.json"
    plan_of(tmp_path, "cpu:8", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--json", file)
    (found,) = json.loads(file.read_text())["plans"]
    assert found["mesh"] == {"clients": 2, "fsdp": 2, "tensor": 2}
    assert found["fits"] is None
    assert found["bytes"]["arguments"] > 0 < found["bytes"]["temporaries"]
    over = {(c["kind"], *c["axes"]) for c in found["collectives"]}
    assert {("all-reduce", "clients"), ("all-gather", "fsdp"), ("all-reduce", "tensor")} <= over
    assert {kind for kind, *axes in over if "clients" in axes} == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_plan_for_a_tpu_slice(tmp_path):
    """The TPU compiler once trained the cohort twice, for adapters and heads apart."""
    file = tmp_path / "plan.json"
    plan_of(tmp_path, "v5e:4x4", "--federation.num-clients", "16", "--json", file)
    (found,) = json.loads(file.read_text())["plans"]
    assert found["fits"]
    assert [(c["kind"], c["axes"]) for c in found["collectives"]] == [("all-reduce", ["clients"])]


def test_a_compiler_whose_programs_cannot_be_read_is_named():
    class Program:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    with pytest.raises(UserError, match=r"libtpu: .* pip install 'jax\[tpu\]=="):
        text_of(Program())
