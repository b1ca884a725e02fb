"""Runs that share a program: each finds what it finds alone, and none disturbs another."""

import jax
import numpy as np
import pandas as pd
import pytest
import runs
from runs import write_study

from fslora_jax.config import load_config, make_config
from fslora_jax.errors import UserError
from fslora_jax.federation import calls, loop
from fslora_jax.federation.running import Running
from fslora_jax.federation.together import joined, parted, program_of
from fslora_jax.study import run as study_run
from fslora_jax.study.points import nested

pytestmark = pytest.mark.usefixtures("no_figures", "evaluations_kept")
RATE = "client_optimizer.learning_rate"
PLAIN = {"lora.lora_dropout": 0.0, "federation.num_rounds": 2, "evaluate_every": 1, "checkpoint_every": 1}
GRIDS = {
    "rates": {"over": {"seed": [0, 1], RATE: [0.02, 0.2]}},
    "skew": {
        "set": {
            "client_optimizer.head_learning_rate": 0.3,
            "federation.rounds_per_call": 2,
            "evaluate_every": 2,
        },
        "over": {"partition.dirichlet_alpha": [0.5, 5.0]},
    },
    "remembering": {
        "set": {"federation.method": "fedsa_lora", "federation.sketching_ratios": [1.0]},
        "over": {"seed": [0, 1]},
    },
}


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    runs.write_config(folder / "base.yaml", world)
    return write_study(folder / "study.yaml", grids=GRIDS, set=PLAIN)


@pytest.fixture(scope="module")
def alone(world, study, tmp_path_factory):
    """The study's folder, each point in a program of its own; only read."""
    out = tmp_path_factory.mktemp("alone")
    runs.call(world, "study", study, "--out", out, "--together", 1)
    return out


def same(out, other, grids=None):
    """Every record of every run, to 1e-5 of its size."""
    found = sorted(path.parent.relative_to(other) for path in other.glob("*/*/summary.json"))
    for name in (name for name in found if grids is None or name.parts[0] in grids):
        for mine, its in zip(runs.records(out / name), runs.records(other / name), strict=True):
            assert mine == pytest.approx(its, rel=1e-5, abs=1e-6), name


def test_on_two_devices_of_a_cpu_too(world, study, alone, tmp_path):
    split = ["--set", "mesh.cpu_devices=2", "--grids", "skew"]
    done = runs.finish(runs.start(world, "study", study, "--out", tmp_path / "study", *split), 240)
    assert done.returncode == 0, done.stderr
    same(tmp_path / "study", alone, {"skew"})


def vmapped(one_round):
    return jax.vmap(one_round, in_axes=(None, 0, 0, 0))


@pytest.mark.parametrize("how", [None, vmapped], ids=["as on a CPU", "vmapped"])
def test_each_finds_what_it_finds_alone(world, study, alone, tmp_path, monkeypatch, capsys, how):
    if how is not None:
        monkeypatch.setattr(calls, "several_runs", how)
    runs.call(world, "study", study, "--out", tmp_path)
    assert capsys.readouterr().err.count("compiling the round of ") == 3
    same(tmp_path, alone)
    losses = pd.read_csv(tmp_path / "results.csv")["loss"]
    assert losses.nunique() == len(losses) == 8
    for weights in tmp_path.glob("*/*/adapter/adapter_model.safetensors"):
        mine, its = (np.fromfile(f, np.uint8) for f in (weights, alone / weights.relative_to(tmp_path)))
        assert mine.size == its.size


def test_a_run_that_diverges_leaves_the_others_alone(world, study, alone, tmp_path, capsys):
    grids = {"rates": {"over": {"seed": [0], RATE: [0.02, 1e30, 0.2]}}}
    path = write_study(study.parent / "diverges.yaml", grids=grids, set=PLAIN)
    said = runs.mistake(world, capsys, "study", path, "--out", tmp_path)
    assert "1 of 3 points failed; rates/0_1e+30: round 1" in said
    for rate in ("0.02", "0.2"):
        for mine, its in zip(
            runs.records(tmp_path / f"rates/0_{rate}"), runs.records(alone / f"rates/0_{rate}"), strict=True
        ):
            assert mine == pytest.approx(its, rel=1e-5, abs=1e-6)


def test_a_kill_between_two_checkpoints_of_one_round(world, study, alone, tmp_path, monkeypatch):
    """One run is a round ahead of the others then; all come to the same end."""
    save = Running.save

    def dies(self):
        if self.done == 1 and self.config.seed == 1:
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Running, "save", dies)
        with pytest.raises(SystemExit):
            runs.call(world, "study", study, "--out", tmp_path, "--grids", "rates")
    saved = {path.parts[-3] for path in tmp_path.glob("rates/*/checkpoints/1")}
    assert saved == {"0_0.02", "0_0.2"}
    runs.call(world, "study", study, "--out", tmp_path, "--grids", "rates")
    same(tmp_path, alone, ["rates"])


def test_where_memory_is_short_they_go_one_by_one(world, study, alone, tmp_path, monkeypatch, capsys):
    together = study_run.run_together

    def short(wanted, display):
        if len(wanted) > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return together(wanted, display)

    monkeypatch.setattr(study_run, "run_together", short)
    runs.call(world, "study", study, "--out", tmp_path, "--grids", "skew")
    said = " ".join(capsys.readouterr().err.split())
    assert "together: memory: RESOURCE_EXHAUSTED: Out of memory; raise federation.cohort_chunks" in said
    same(tmp_path, alone, ["skew"])


def test_a_mistake_in_one_is_its_own(world, study, alone, tmp_path, monkeypatch, capsys):
    set_up = loop.set_up

    def refuses(config, beside=None):
        if config.seed == 1:
            raise UserError("partition: client 3 has no examples")
        return set_up(config, beside)

    monkeypatch.setattr(loop, "set_up", refuses)
    said = runs.mistake(world, capsys, "study", study, "--out", tmp_path, "--grids", "rates")
    assert "2 of 4 points failed; rates/1_0.02: partition: client 3 has no examples" in said
    assert sorted(path.parent.name for path in tmp_path.glob("rates/*/summary.json")) == ["0_0.02", "0_0.2"]


@pytest.mark.parametrize(
    ("field", "shared"),
    [
        ("seed", True),
        (RATE, True),
        ("client_optimizer.head_learning_rate", True),
        ("partition.dirichlet_alpha", True),
        ("federation.local_steps", False),
        ("federation.sketching_ratios", False),
        ("lora.r", False),
        ("client_optimizer.momentum", False),
    ],
)
def test_which_runs_share_a_program(world, field, shared):
    values = load_config(world.config).model_dump()
    values["lora"]["lora_dropout"] = 0.0
    values["client_optimizer"]["name"] = "sgd"
    values["client_optimizer"]["weight_decay"] = 0.0
    other = {"federation.sketching_ratios": [0.75], "client_optimizer.momentum": 0.5}.get(field, 7)
    one, two = (make_config(nested(values, changes, "x"), "x") for changes in ({}, {field: other}))
    assert (program_of(one) == program_of(two)) == shared


def test_dropout_a_frozen_head_and_several_devices_need_a_program_of_their_own(world, monkeypatch):
    config = load_config(world.config)
    assert config.lora.lora_dropout
    assert program_of(config) is None
    lora = config.lora.model_copy(update={"lora_dropout": 0.0})
    plain = config.model_copy(update={"lora": lora})
    assert program_of(plain) is not None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        assert program_of(plain) is None
    frozen = lora.model_copy(update={"modules_to_save": ()})
    assert program_of(config.model_copy(update={"lora": frozen})) is None


def test_joined_and_parted_are_inverse():
    values = [{"x": jax.numpy.full(3, n), "key": jax.random.key(n)} for n in range(3)]
    for one, two in zip(values, parted(joined(values), 3), strict=True):
        assert (one["x"] == two["x"]).all()
        assert (jax.random.key_data(one["key"]) == jax.random.key_data(two["key"])).all()
    assert joined(values[:1]) is values[0]
