"""Planning: programs for devices that are not here, and what is read off them."""

import importlib.util
import json
import math
import os
import re
import signal
from collections import Counter

import jax
import numpy as np
import pytest
import runs
import yaml
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractMesh, AxisType

from fslora_jax.chips import GIB, Chip
from fslora_jax.config import make_config
from fslora_jax.data.batches import BatchShape
from fslora_jax.errors import UserError
from fslora_jax.federation.method import make_method
from fslora_jax.methods import METHODS, Spec
from fslora_jax.models.families import build_model
from fslora_jax.plan import topology
from fslora_jax.plan.abstract import abstract_arguments, abstract_model, with_places
from fslora_jax.plan.apart import apart
from fslora_jax.plan.command import plan_command
from fslora_jax.plan.compiled import Compiled, layout_of, round_of, text_of
from fslora_jax.plan.search import Job, Plan, Setting, best, moved, plans
from fslora_jax.plan.show import print_plans
from fslora_jax.program import Collective, collectives, matmul_flops
from fslora_jax.sharding import AXES, client_groups

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


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=4] {'axis_1'}", ("clients",)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=2] {'a','c'}", ("clients", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'a'}", ("fsdp", "tensor")),
        ("replica_groups=mesh['a'=16] {'a':(4)2}", ("fsdp",)),
        ("replica_groups={}", ("clients", "fsdp", "tensor")),
    ],
)
def test_axes_of_groups_however_they_are_written(groups, axes):
    line = f"  %sum = f32[10]{{0}} all-reduce(%p), channel_id=5, {groups}\n"
    text = f"ENTRY %main (p: f32[10]) -> f32[10] {{\n{line}}}\n"
    assert collectives(text, SIZES) == [Collective("all-reduce", axes, 40, 1)]


def test_a_device_that_exchanges_with_itself_alone_is_not_told():
    each = ",".join(f"{{{n}}}" for n in range(8))
    line = f"  %sum = f32[10]{{0}} all-reduce(%p), channel_id=5, replica_groups={{{each}}}\n"
    text = f"ENTRY %main (p: f32[10]) -> f32[10] {{\n{line}}}\n"
    assert collectives(text, {"clients": 1, "fsdp": 8, "tensor": 1}) == []


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


BERT = {
    **runs.SIZES,
    "model_type": "bert",
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def tiny(**changes):
    named = {"model": {"name": "m"}, "data": runs.SETTINGS["data"] | {"name": "d"}}
    return make_config(runs.SETTINGS | named | changes, "test")


def model_of(config, **options):
    return build_model(BERT, num_labels=2, lora_dropout=config.lora.lora_dropout, **options)


def traced(config):
    chosen = config.model
    model = model_of(config, dtype=chosen.dtype, attention=chosen.attention, remat=chosen.remat)
    layout = layout_of(config, model, 1)
    arguments = abstract_arguments(config, model, BatchShape(3, 12, 0), layout)
    return jax.jit(round_of(config, model, layout, None)).trace(*arguments)


CUDNN = "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"


def exported(platform, config, sizes=None, rows=4):
    """The real round, lowered here for another platform, and how often each of its custom calls stands in it."""
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3) if sizes else None
    model = model_of(config, dtype=config.model.dtype, attention=config.model.attention)
    layout = layout_of(config, model, client_groups(mesh))
    arguments = abstract_arguments(config, model, BatchShape(rows, 16, 0), layout)
    if mesh is not None:
        arguments = with_places(arguments, mesh, [])
    found = jax.export.export(
        jax.jit(round_of(config, model, layout, mesh)),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in CUDNN],
    )(*arguments)
    assert found.platforms == (platform,)
    assert found.nr_devices == math.prod(sizes or (1,))
    return found, Counter(re.findall(r"custom_call @([\w$]+)", found.mlir_module()))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_round_lowers_for_one_device_of_another_platform(platform):
    """Nothing in it is for CPUs alone: no call of a host's library, no exchange."""
    found, calls = exported(platform, tiny())
    assert found.nr_devices == 1
    assert not calls
    assert "stablehlo.while" in found.mlir_module()
    assert not re.search(r"all_reduce|all_gather|all_to_all|collective|reduce_scatter", found.mlir_module())


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("sizes", [(4, 1, 1), (2, 2, 2)], ids=str)
def test_clients_meet_in_one_sum_when_lowered_for_a_mesh_of_another_platform(platform, sizes):
    """Adapter, head and component counts, summed over ``clients`` after the loop over chunks;
    what the devices of one group exchange is not in the module yet, the platform's partitioner puts it in."""
    config = tiny(federation=runs.SETTINGS["federation"] | {"cohort_chunks": 2})
    text = exported(platform, config, sizes)[0].mlir_module()
    assert set(re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", text)) == {"all_reduce"}
    main = re.search(r"func\.func public @main.*?\n  }", text, re.S)[0]
    sums = re.findall(r'^( +)%\S+ = "stablehlo.all_reduce".*?-> tensor<([\dx]*)xf32>', main, re.S | re.M)
    assert len(sums) == text.count("stablehlo.all_reduce")
    groups = np.arange(math.prod(sizes)).reshape(sizes[0], -1).T.tolist()
    assert set(re.findall(r"replica_groups = dense<(.*?)>", main)) == {str(groups)}
    layers, width, r, labels, modules = 2, runs.SIZES["hidden_size"], 8, 2, 2
    values = sum(math.prod(map(int, shape.split("x"))) for _, shape in sums)
    counts = (
        2 * modules * layers * r
    )  # by how many each component was trained; one for both factors when compiled
    assert values == modules * layers * r * 2 * width + (width + 1) * labels + counts
    (loop,) = {len(spaces) for spaces in re.findall(r"^( +)%\S+ = stablehlo\.while", main, re.M)[:1]}
    assert {len(spaces) for spaces, _ in sums} == {loop}


@pytest.fixture
def gpu(monkeypatch):
    """What JAX would say where there is a GPU with cuDNN 9.10."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.parametrize(
    ("attention", "dtype", "flash"),
    [
        ("auto", "bfloat16", True),
        ("auto", "float32", False),
        ("cudnn", "bfloat16", True),
        ("xla", "bfloat16", False),
    ],
)
def test_flash_attention_is_in_the_program_for_a_gpu(gpu, attention, dtype, flash):
    """Forward and backward; nothing else leaves XLA."""
    config = tiny(model={"name": "m", "attention": attention, "dtype": dtype})
    _, calls = exported("cuda", config)
    assert set(calls) == (set(CUDNN) if flash else set())


def operations(jaxpr):
    """Of a program, the bodies of loops once."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from operations(inner)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("frozen", 1), ("full", 2)])
def test_the_gradient_of_flash_attention_has_what_it_gave(gpu, remat, times):
    """Only full recomputation asks it anew, and only that needs a loop over the layers, forward and back, on a GPU."""
    config = tiny(model={"name": "m", "attention": "cudnn", "dtype": "bfloat16", "remat": remat})
    found = list(operations(traced(config).jaxpr.jaxpr))
    names = Counter(equation.primitive.name for equation in found)
    assert names["dot_product_attention_fwd_wrapper"] == times
    assert names["dot_product_attention_bwd_wrapper"] == 1
    loops = [e for e in found if e.primitive.name == "scan" and asks_attention(e.params["jaxpr"].jaxpr)]
    assert len(loops) == 2 + 2 * (remat == "full"), "of chunks and steps, and of layers"


def asks_attention(jaxpr) -> bool:
    return any(e.primitive.name.startswith("dot_product_attention") for e in operations(jaxpr))


def test_cudnn_is_refused_where_there_is_no_gpu():
    config = tiny(model={"name": "m", "attention": "cudnn", "dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"model\.attention is 'cudnn', .* cpu; set model\.attention: auto"):
        exported("tpu", config)


def test_operations_grow_with_steps_and_not_with_chunks():
    once = matmul_flops(traced(tiny()).jaxpr.jaxpr)
    f = runs.SETTINGS["federation"]
    twice = matmul_flops(traced(tiny(federation=f | {"local_steps": 4})).jaxpr.jaxpr)
    chunked = matmul_flops(traced(tiny(federation=f | {"cohort_chunks": 3})).jaxpr.jaxpr)
    assert 1.9 * once < twice < 2.1 * once
    assert 0.9 * once < chunked < 1.1 * once


def trained_by(method, **wrappers):
    """A tiny config that the method takes."""
    plain = {"server_optimizer": {}, "model": {"name": "m"}}
    f = runs.SETTINGS["federation"] | {"method": method, "wrappers": wrappers}
    if METHODS[method].make(Spec({}, 8, 1.0), tiny().server_optimizer.build()).traits.full_rank:
        f |= {"sketching_ratios": [1.0]}
    return tiny(federation=f, **plain)


@pytest.mark.parametrize("method", METHODS)
def test_the_round_of_every_method_is_planned(method):
    assert matmul_flops(traced(trained_by(method)).jaxpr.jaxpr) > 0


@pytest.mark.parametrize(
    ("method", "wrapper"), [("fslora", "compress"), ("hetlora", "personalise"), ("hafl", "personalise")]
)
def test_what_clients_remember_is_an_argument_of_the_round(method, wrapper):
    config = trained_by(method, **{wrapper: {}})
    model, found = model_of(config), make_method(config, Spec({}, 8, 1.0))
    layout = layout_of(config, model, 1)
    memory = abstract_arguments(config, model, BatchShape(3, 12, 0), layout)[-1].clients.memory
    assert found.traits.remembers
    assert {x.shape[:3] for x in jax.tree.leaves(memory)} == {(1, 1, 3)}
    assert len(memory) == 1 + (method == "hetlora")
    assert matmul_flops(traced(config).jaxpr.jaxpr) > 0


def test_a_plan_packs_the_base_as_a_run_does(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    held = {}
    for quantization in ("none", "int8"):
        config = tiny(model={"name": str(tmp_path), "quantization": quantization})
        base = jax.eval_shape(abstract_model(config, 2).init_base, jax.random.key(0))
        held[quantization] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base["layers"]))
    assert 0.25 * held["none"] < held["int8"] < 0.5 * held["none"]


def test_a_client_that_trains_alone_is_planned_at_its_own_rank():
    """Ratios of 0.25 and 0.5 in turn; one slot, whatever the cohort's size."""
    for client, k in ((0, 2), (3, 4)):
        config = tiny(federation=runs.SETTINGS["federation"] | {"only_client": client})
        assert layout_of(config, model_of(config), 1).caps == (k,)


CHIP = Chip(memory=16 * GIB, flops=1e12, memory_rate=1e12, link_rate=1e12)


def linear(base=2.0, each=1.2, more=0.0, most=math.inf):
    """A compiler whose programs take so many GiB: of weights in each group, for each client at a time, and besides.

    Beyond ``most`` there is no program, and nothing measured.
    """

    def compiler(config):
        mesh, f = config.mesh, config.federation
        sizes = {"clients": 8 // (mesh.fsdp * mesh.tensor), "fsdp": mesh.fsdp, "tensor": mesh.tensor}
        slots = -(-config.clients_per_round // sizes["clients"])
        at_once = -(-slots // f.cohort_chunks)
        group = mesh.fsdp * mesh.tensor
        inputs, temporaries = base / group, (more + each * at_once) / group
        if inputs + temporaries > most:
            return Compiled(sizes, flops=1e12, failure="RESOURCE_EXHAUSTED")
        return Compiled(
            sizes,
            slots=slots,
            arguments=round(inputs * GIB),
            temporaries=round(temporaries * GIB),
            flops=1e12,
            read=1e12 * f.cohort_chunks,
        )

    return compiler


def searched(compiler, clients=160, chunks=1, fsdp=1, tries=4, rows=4, heads=2):
    """The plans of 160 clients, 20 on each of 8 devices."""
    f = runs.SETTINGS["federation"] | {"num_clients": clients, "clients_per_round": None}
    config = tiny(federation=f | {"cohort_chunks": chunks}, mesh={"fsdp": fsdp})
    return list(plans(config, Job(clients, rows, heads, 8, CHIP), compiler, tries))


@pytest.mark.parametrize(
    ("compiler", "chunks", "tried"),
    [
        (linear(each=1.2), 1, [1, 2]),  # 10 x 1.2 and 2 are 14 of 16 GiB
        (linear(each=1.2, more=3.0), 1, [1, 2, 3]),  # 2 chunks should fit, were there nothing but clients
        (linear(each=1.2, most=16), 1, [1, 20, 2]),  # nothing is measured at first
        (linear(each=1.2, more=3.0, most=16), 1, [1, 20, 7, 3]),
        (linear(each=1.2, most=13), 1, [1, 20, 2, 3]),  # the compiler wants some of the memory for itself
        (linear(each=0.1), 1, [1]),
        (linear(each=0.1), 4, [4, 1]),  # memory is free: more clients at a time
        (linear(each=1.2), 20, [20, 2]),
        (linear(each=1.2), 2, [2]),
        (linear(each=0.0), 5, [5, 1]),
    ],
)
def test_as_many_clients_at_a_time_as_should_fit(compiler, chunks, tried):
    found = searched(compiler, chunks=chunks)
    assert [plan.setting for plan in found] == [Setting(n, 1, 1) for n in tried]
    assert best(found) is found[-1]
    assert found[-1].fits


def test_where_one_client_does_not_fit_weights_are_spread_and_then_heads():
    found = searched(linear(base=100.0, each=24.0), tries=9)
    assert [plan.setting[1:] for plan in found] == [(1, 1), (1, 1), (2, 1), (4, 1), (4, 2)]
    assert [plan.setting.chunks for plan in found] == [1, 20, 40, 80, 160]
    assert not any(plan.fits for plan in found[:-1])
    assert found[-1].fits
    assert [plan.clients for plan in found] == [160] * 5
    assert len(searched(linear(base=100.0, each=24.0), tries=3)) == 3
    assert {p.setting[1:] for p in searched(linear(base=1e4), tries=9, rows=2, heads=3)} == {(1, 1), (2, 1)}


def test_settings_that_do_not_go_together_are_a_try_that_failed():
    def compiler(config):
        if config.mesh.fsdp == 2:
            raise UserError("mesh.fsdp: found 2")
        return linear(base=60.0)(config)

    found = searched(compiler, tries=9)
    assert [plan.setting[1:] for plan in found] == [(1, 1), (1, 1), (2, 1), (4, 1), (4, 1)]
    assert [plan.compiled.failure for plan in found if plan.setting.fsdp == 2] == ["mesh.fsdp: found 2"]
    with pytest.raises(UserError, match="found 2"):
        searched(compiler, fsdp=2)


def test_a_compiler_that_dies_is_a_try_that_failed():
    """It dies where several clients meet."""

    def compiler(config):
        if config.federation.cohort_chunks < 20:
            return apart(signal.raise_signal, signal.SIGKILL)
        return linear(each=13.0)(config)

    found = searched(compiler)
    assert [plan.setting.chunks for plan in found] == [1, 20]
    assert "the compiler died" in found[0].compiled.failure
    assert [plan.fits for plan in found] == [False, True]
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match="gpu:8"):
        apart(topology.chip_of, "gpu:8")


def printed(capsys, found, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_plans(found, "v5e:2x4")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("compiler", "options", "line"),
    [
        (linear(), {}, "suggested: --federation.cohort-chunks 2 --mesh.fsdp 1 --mesh.clients -1"),
        (linear(), {"chunks": 2}, "suggested: the config's own settings"),
        (
            linear(each=0.1),
            {"chunks": 4},
            "suggested: --federation.cohort-chunks 1 --mesh.fsdp 1 --mesh.clients -1",
        ),
        (
            linear(base=100.0, each=24.0),
            {"tries": 5},
            "suggested: --federation.cohort-chunks 160 --mesh.fsdp 4 --mesh.clients -1 --mesh.tensor 2",
        ),
        (
            linear(base=1e4),
            {},
            "no try fits: more chips, model.remat: full, a smaller batch, or --tries for more settings",
        ),
    ],
)
def test_what_is_suggested(capsys, monkeypatch, compiler, options, line):
    assert printed(capsys, searched(compiler, **options), monkeypatch).splitlines()[-1] == line


def test_the_bound_decides_among_those_that_fit():
    plan = searched(linear(each=0.1))[0]
    few, many = (plan._replace(setting=Setting(n, 1, 1)) for n in (2, 4))
    near, far = (few._replace(link_seconds=factor * plan.seconds) for factor in (1.04, 1.06))
    assert best([many, few]) is few
    assert best([many, near]) is near, "as good"
    assert best([many, far]) is many
    assert best([many._replace(fits=False)]) is None


def test_the_table_fits_a_terminal(capsys, monkeypatch):
    """Of the largest numbers that are likely."""
    sizes = {"clients": 1024, "fsdp": 16, "tensor": 1}
    exchanges = [Collective("all-reduce", ("clients",), 11_800_000, 1)]
    compiled = Compiled(
        sizes, arguments=80 * 2**30, temporaries=12 * 2**30, flops=1905e12, exchanges=exchanges
    )
    large = Plan(Setting(128, 16, 1), 131_072, compiled, True, 0.0123, 0.01, 0.01)
    dead = large._replace(compiled=Compiled(sizes, failure="the compiler died"), fits=False)
    said = printed(
        capsys, [large, dead._replace(compute_seconds=0.0, memory_seconds=0.0, link_seconds=0.0)], monkeypatch
    )
    assert "…" not in said
    for part in ("clients/s", "1024x16x1", "10,656,260", "1,905", "0.0123", "92.00"):
        assert part in said
    assert "1024x16x1, chunks 128: all-reduce over clients: 11.8 MB a round" in said
    assert "1024x16x1, chunks 128: the compiler died" in said


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v6e:0x4", "v7:4x4", "cpu:0", "gpu:8"]
)
def test_an_unknown_slice_is_named(name):
    with pytest.raises(UserError, match=f"--topology: found '{name}'; expected such as v5e:4x4"):
        topology.chip_of(name)


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fslora_jax\[plan\]'"):
        topology.devices_of("v5e:4x4")


LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "initializer_range": 0.02,
}


def plan_of(folder, name, *argv, fields=BERT):
    """`fslora plan` in a process of its own: it settles what JAX takes for its devices."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(fields))
    world = runs.World(folder, folder / "model", folder / "none.csv", folder / "cache", folder / "tiny.yaml")
    runs.write_config(world.config, world)
    done = runs.finish(runs.start(world, "plan", world.config, "--topology", name, *argv), 500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_for_eight_cpus_reads_no_weights(tmp_path):
    file = tmp_path / "plan.json"
    plan_of(tmp_path, "cpu:8", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--rows", "3", "--json", file)
    said = json.loads(file.read_text())
    (found,) = said["plans"]
    assert said["best"] is None, "a CPU has no data sheet"
    assert found["mesh"] == {"clients": 2, "fsdp": 2, "tensor": 2}
    assert found["batch"]["rows"] == 4, "as many on each of two devices"
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
    said = json.loads(file.read_text())
    (found,) = said["plans"]
    assert found["fits"]
    assert said["best"]["federation"] == {"cohort_chunks": 1}
    assert [(c["kind"], c["axes"]) for c in found["collectives"]] == [("all-reduce", ["clients"])]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("remat", ["none", "frozen", "full"])
def test_a_plan_of_a_decoder_for_a_tpu_slice(tmp_path, remat):
    """libtpu 0.0.42.1 dies on other ways to write attention and its gradient, where `full` computes them anew."""
    file = tmp_path / "plan.json"
    settings = (
        f"--model.dtype bfloat16 --model.remat {remat} --data.max-length 128 --num-labels 0 --json {file}"
    )
    targets = ["--lora.target-modules", "q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    plan_of(tmp_path, "v5e:2x2", "--federation.num-clients", "16", *settings.split(), *targets, fields=LLAMA)
    (found,) = json.loads(file.read_text())["plans"]
    assert found["fits"]
    assert [(c["kind"], c["axes"]) for c in found["collectives"]] == [("all-reduce", ["clients"])]


def test_a_compiler_whose_programs_cannot_be_read_is_named():
    class Program:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    with pytest.raises(UserError, match=r"libtpu: .* pip install 'jax\[tpu\]=="):
        text_of(Program())


def test_a_file_that_cannot_be_written_is_told_before_anything_is_compiled(tmp_path):
    config = runs.SETTINGS | {"model": {"name": "no/model"}, "data": runs.SETTINGS["data"] | {"name": "d"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"--json: {tmp_path} cannot be written: Is a directory"):
        plan_command([str(tmp_path / "c.yaml"), "--topology", "cpu:1", "--json", str(tmp_path)])
