"""Methods in whole runs: a stop and a second start, what a run that moves its base exports, what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import runs
import torch
import transformers
from test_bad_input import refusal

from fslora_jax.config import make_config
from fslora_jax.federation.meter import Meter
from fslora_jax.federation.setup import initial_server, set_up

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("no_figures", "programs_kept"),
]

PLAIN = {"server_optimizer": {"name": "sgd"}}
CHANGES: dict[str, dict[str, Any]] = {
    "hetlora": {"federation__method_options": {"decay": 0.7, "least_rank": 1, "tail_penalty": 0.1}},
    "fedsa_lora": {"federation__sketching_ratios": [1.0]},
    "flora": PLAIN,
}
"""Ranks and factors that clients keep, and a base that moves."""


def changes_of(method: str) -> dict[str, Any]:
    return {"federation__method": method, **CHANGES.get(method, {})}


@pytest.fixture(scope="module")
def flora_run(world) -> Path:
    return runs.train(world, world.folder / "flora", **changes_of("flora"))


class Stopped(Exception):
    """In place of a kill, whose processes would each compile again."""


def stopping(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """The next run stops in the round after ``last``, before anything of it is written."""
    measure = Meter.measure

    def stop(self, t: int, *rest):
        if t == last:
            raise Stopped
        return measure(self, t, *rest)

    monkeypatch.setattr(Meter, "measure", stop)


@pytest.mark.parametrize("method", CHANGES)
def test_a_stopped_run_ends_as_one_that_was_not(world, flora_run, tmp_path, method):
    """Four rounds at once are two and two: the third is played twice, and what it left with clients is forgotten."""
    whole = flora_run
    if method != "flora":
        whole = runs.train(world, tmp_path / "whole", **changes_of(method))
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 3)
        with pytest.raises(Stopped):
            runs.train(world, tmp_path / "run", **changes_of(method))
    assert [record["round"] for record in runs.records(tmp_path / "run")] == [0, 1, 2, 3]
    runs.train(world, tmp_path / "run", **changes_of(method))
    assert runs.results(tmp_path / "run") == runs.results(whole)
    assert len(runs.records(whole)) == 5


def test_a_base_that_moved_is_exported_as_an_adapter_and_as_a_model(world, flora_run, capsys, tmp_path):
    """The run's own evaluation, PEFT's logits of the adapter, and those of the merged model are one."""
    data, losses = ("--data", world.data, "--max-length", 12), []
    for folder in (flora_run, flora_run / "adapter"):
        capsys.readouterr()
        runs.call(world, "eval", folder, *data)
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    runs.call(world, "export", flora_run, "--merged", "--out", tmp_path / "merged")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(world.model), flora_run / "adapter").eval()
    merged, tokens = load(tmp_path / "merged").eval(), torch.arange(2, 12)[None]
    found, expected = (model(input_ids=tokens).logits.detach().numpy() for model in (merged, adapted))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    said = json.loads((flora_run / "adapter" / "adapter_config.json").read_text())
    assert said["lora_alpha"] == said["r"] > runs.SETTINGS["lora"]["r"]
    message = refusal(world, capsys, "export", flora_run, "--client", 1, "--out", tmp_path / "client")
    assert "flora changes the base" in message and "--merged" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation__method": "fedlt"}, "federation.method: unknown 'fedlt'; did you mean fedit?"),
        ({"federation__wrappers": {"personalize": {}}}, "unknown 'personalize'; did you mean personalise?"),
        (
            {"federation__method_options": {"redrawn": True}},
            "federation.method_options: unknown setting redrawn; did you mean redraw?",
        ),
        (
            changes_of("hetlora") | {"federation__method_options": {"decay": 1.5}},
            "federation.method_options: decay: found 1.5",
        ),
        ({"federation__ranks": "uniform", "federation__rank_range": [1, 9]}, "federation.rank_range"),
        (
            {"federation__method": "ffa_lora"},
            "ffa_lora trains all r components at every client; set turn and [1.0]",
        ),
        (
            {"federation__method": "flexlora"},
            "the server's step of flexlora is its own; leave out server_optimizer",
        ),
        (
            changes_of("flora") | {"model__quantization": "int8"},
            "model.quantization: found int8, but flora merges",
        ),
        (
            {
                "federation__method": "fed_sb",
                "federation__sketching_ratios": [1.0],
                "lora__init_from": "some/folder",
            },
            "lora.init_from: found some/folder, but fed_sb trains other factors",
        ),
        (
            {"federation__method": "rac_lora", "federation__sketching_ratios": [1.0], "lora__r": 17, **PLAIN},
            "lora.r: found 17, but a module has 16 features; expected at most as many",
        ),
    ],
    ids=str,
)
def test_a_method_that_does_not_fit_is_refused(world, capsys, tmp_path, changes, words):
    config = runs.write_config(tmp_path / "config.yaml", world, **changes)
    assert words in refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("method", ["fslora", "flora"])
def test_a_federated_run_with_narrow_products_is_near_one_without(world, tmp_path, method):
    """FLoRA moves the base in float32, and only then is it narrowed."""
    losses = []
    for products in ("same", "bfloat16"):
        folder = tmp_path / products
        changes = changes_of(method) | {"federation__num_rounds": 3, "model__products": products}
        run = runs.train(world, folder, **changes)
        losses.append([line["train/loss"] for line in runs.records(run) if "train/loss" in line])
    assert len(losses[0]) == 3 and losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_a_method_that_starts_afresh_goes_on_from_an_adapter(world, finished, tmp_path):
    """The adapter's product is in the base before the first round, so the first evaluation is the old run's last."""
    options = {
        **changes_of("flora"),
        "federation__num_rounds": 1,
        "lora__init_from": str(finished / "adapter"),
    }
    first = runs.records(runs.train(world, tmp_path / "run", **options))[0]
    assert first["eval/loss"] == pytest.approx(runs.records(finished)[-1]["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_fed_sb_starts_from_first_minibatches_of_any_length(world, seed):
    """They are not dealt by length as those of a round are, and may need more rows."""
    changes = {
        **changes_of("fed_sb"),
        "federation__sketching_ratios": [1.0],
        "federation__local_steps": 10,
        "seed": seed,
    }
    config = make_config(runs.settings(world, **changes), "test")
    federation = set_up(config)
    server = initial_server(config, federation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(server.weights))
