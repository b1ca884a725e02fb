"""Runs with ranks by module, from an adapter folder, with a frozen head; and what they export."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from adapter_cases import edit_config
from safetensors.numpy import load_file, save_file
from test_bad_input import refusal

from fslora_jax.adapters.read import read_adapter
from fslora_jax.adapters.schema import CONFIG, WEIGHTS
from fslora_jax.config import make_config
from fslora_jax.federation.client import train_clients
from fslora_jax.federation.setup import initial_server, set_up
from fslora_jax.rundir import keep_start, open_run, own_start

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")

ONE_ROUND = {"federation__num_rounds": 1, "lora__lora_dropout": 0.0, "client_optimizer__schedule": "constant"}
PATTERNS = {"rank_pattern": {"value": 3}, "alpha_pattern": {"value": 5.0}}
SHAPE = {f"lora__{name}": value for name, value in PATTERNS.items()}


@pytest.fixture(scope="module")
def mixed(world) -> Path:
    """One round with ranks of their own for the values."""
    return runs.train(world, world.folder / "mixed", **ONE_ROUND, **SHAPE)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def ranks(folder: Path) -> dict[str, int]:
    return {m.rpartition(".")[2]: r for m, r in read_adapter(folder).spec.ranks().items()}


def test_traffic_follows_the_ranks_of_the_modules(mixed):
    """k = 2 and 4 of 8 are 1 and 2 of 3, rounded up from 1.5; three of the five clients take part."""
    summary = json.loads((mixed / "summary.json").read_text())
    held = {2: {"query": 2, "value": 1}, 4: {"query": 4, "value": 2}}
    layers, width = runs.SIZES["num_hidden_layers"], runs.SIZES["hidden_size"]
    (head,) = {
        tier["up_bytes"] - 4 * sum(held[tier["k"]].values()) * layers * 2 * width for tier in summary["tiers"]
    }
    adapter = tensors(mixed / "adapter")
    assert head == sum(value.nbytes for name, value in adapter.items() if "lora" not in name)
    for tier in summary["tiers"]:
        assert tier["down_bytes"] - tier["up_bytes"] == 4 * sum(held[tier["k"]].values()) * layers


def test_all_clients_are_exported_each_at_its_own_ranks(world, mixed, capsys, tmp_path):
    runs.call(world, "export", mixed, "--all-clients", "--out", tmp_path / "all")
    assert capsys.readouterr().out == f"PEFT adapters: {tmp_path / 'all'}\n"
    listed = json.loads((tmp_path / "all" / "clients.json").read_text())
    assert [entry["k"] for entry in listed] == [2, 4, 2, 4, 2]
    for entry in listed:
        found = ranks(tmp_path / "all" / entry["folder"])
        assert found == {2: {"query": 2, "value": 1}, 4: {"query": 4, "value": 2}}[entry["k"]]
    runs.call(world, "export", mixed, "--client", 3, "--out", tmp_path / "three")
    alone, among = tensors(tmp_path / "three"), tensors(tmp_path / "all" / "client-3")
    assert alone.keys() == among.keys()
    for name in alone:
        np.testing.assert_allclose(alone[name], among[name], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "three" / CONFIG).read_bytes() == (tmp_path / "all" / "client-3" / CONFIG).read_bytes()
    runs.call(world, "export", mixed, "--all-clients", "--out", tmp_path / "all")  # replaces its own


def test_the_merged_model_of_a_run_evaluates_as_its_adapter(world, mixed, capsys, tmp_path):
    """Merged, with an adapter of zeros and the same head."""
    runs.call(world, "export", mixed, "--merged", "--max-shard-gb", "0.00001", "--out", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    zeros = runs.train(
        world,
        tmp_path / "zeros",
        **ONE_ROUND,
        model__name=str(tmp_path / "merged"),
        client_optimizer__learning_rate=1e-30,
    )
    head = {k: v for k, v in tensors(mixed / "adapter").items() if "lora" not in k}
    save_file(tensors(zeros / "adapter") | head, zeros / "adapter" / WEIGHTS)
    data = ("--data", world.data, "--max-length", 12)
    capsys.readouterr()
    losses = []
    for folder in (mixed, zeros):
        runs.call(world, "eval", folder / "adapter", *data)
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def start_from(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**ONE_ROUND, **SHAPE, "lora__init_from": str(folder), **changes}


def test_a_run_goes_on_from_an_adapter_and_its_head_can_be_frozen(world, mixed, tmp_path):
    run = runs.train(
        world, tmp_path / "run", **start_from(mixed / "adapter", lora__modules_to_save=[], evaluate_every=1)
    )
    first, last = runs.records(run)[0], runs.records(mixed)[-1]
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    before, after = tensors(mixed / "adapter"), tensors(run / "adapter")
    assert before.keys() == after.keys()
    for name in before:
        assert np.array_equal(before[name], after[name]) == ("lora" not in name), name
    summary = json.loads((run / "summary.json").read_text())
    layers, width = runs.SIZES["num_hidden_layers"], runs.SIZES["hidden_size"]
    assert summary["tiers"][0]["up_bytes"] == 4 * 3 * layers * 2 * width


def test_a_run_keeps_what_it_starts_from(world, mixed, capsys, tmp_path):
    """A frozen head lies nowhere else; the folder may go once the run has begun."""
    shutil.copytree(mixed / "adapter", tmp_path / "given")
    changes = start_from(
        tmp_path / "given", lora__modules_to_save=[], federation__num_rounds=2, checkpoint_every=1
    )
    run = runs.train(world, tmp_path / "run", **changes)
    expected = tensors(run / "adapter")
    shutil.rmtree(tmp_path / "given")
    capsys.readouterr()
    runs.call(world, "eval", run)
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(
        runs.records(run)[-1]["eval/loss"], rel=1e-5
    )
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "2")
    runs.call(world, "train", tmp_path / "run.yaml", "--run-dir", run)
    assert all(np.array_equal(value, tensors(run / "adapter")[name]) for name, value in expected.items())


def test_the_merged_model_of_a_packed_run_has_the_bases_own_weights(world, tmp_path):
    """int8 is how the base is held, not what the adapter is added to."""
    run = runs.train(world, tmp_path / "run", **ONE_ROUND, model__quantization="int8")
    runs.call(world, "export", run, "--merged", "--out", tmp_path / "merged")
    base, merged = (load_file(folder / "model.safetensors") for folder in (world.model, tmp_path / "merged"))
    adapter, scale = tensors(run / "adapter"), 8.0 / np.sqrt(8)
    for name, value in base.items():
        module = f"base_model.model.bert.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            value = value + scale * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(merged[f"bert.{name}"], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora__r": 4}, "query has rank 8 and scale 2.82843"),
        ({"lora__alpha_pattern": {}}, "value has rank 3 and scale 2.88675"),
        ({"lora__target_modules": ["query", "key", "value"]}, "key has no adapter in "),
        ({"lora__r": 16}, "set lora: {r: 8, lora_alpha: 8.0, use_rslora: true, rank_pattern: {bert"),
        ({"model__pooling": "mean"}, "task_type is SEQ_CLS, but the model has TOKEN_CLS"),
        (
            {"data__label_names": ["pos", "neg"]},
            "has the labels ['neg', 'pos'], but the data has ['pos', 'neg']",
        ),
        (
            {"lora__modules_to_save": ["pooler"]},
            "lora.modules_to_save: found ['pooler']; expected ['classifier']",
        ),
        ({"lora__init_from": "no/such/folder"}, "adapter_config.json: no such file"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(world, mixed, capsys, tmp_path, changes, words):
    config = runs.write_config(tmp_path / "config.yaml", world, **start_from(mixed / "adapter") | changes)
    assert words in refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")


def test_an_adapter_of_another_base_is_refused_and_both_are_named(world, mixed, capsys, tmp_path):
    runs.call(world, "export", mixed, "--out", tmp_path / "other")
    edit_config(tmp_path / "other", base_model_name_or_path="some/other-model")
    config = runs.write_config(tmp_path / "config.yaml", world, **start_from(tmp_path / "other"))
    message = refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert f"adapts some/other-model, but model.name is {world.model}" in message


def test_another_start_of_a_run_that_had_not_begun_is_its_own(world, mixed, finished, tmp_path):
    """What an attempt of another config has copied before it ended is not what this one says."""
    run = tmp_path / "run"
    for folder in (mixed, finished):
        config = make_config(runs.settings(world, lora__init_from=str(folder / "adapter")), "test")
        with open_run(run, config):
            keep_start(run, config)
            kept = Path(own_start(run, config).lora.init_from)
    assert kept.parent == run
    assert (kept / "adapter_config.json").read_bytes() == (
        finished / "adapter" / "adapter_config.json"
    ).read_bytes()


def test_clients_that_would_fail_are_exported_as_if_they_did_not(world):
    """What is exported is what `eval --personalised` scores: a client's adapter after all of its steps."""
    held = []
    for rate in (0.0, 0.6):
        config = make_config(runs.settings(world, federation__failure_rate=rate), "test")
        federation = set_up(config)
        server = initial_server(config, federation)
        assert federation.feed.steps.done(5, 0).all() == (rate == 0)
        held.append([local for _, local in train_clients(config, federation, server, range(5))])
    jax.tree.map(np.testing.assert_array_equal, *held)
