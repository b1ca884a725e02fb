"""Texts that are too long, labels that are new, clients with next to nothing: whole runs on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
from test_bad_input import refusal

from fslora_jax.config import make_config
from fslora_jax.federation.feed import local_examples
from fslora_jax.federation.setup import set_up

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")


def lines(path: Path, *rows: str) -> str:
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return str(path)


def test_very_long_lines_and_control_characters_are_cut_and_counted(world, capsys, tmp_path):
    long = "good film " * 100_000  # 1 MB
    rows = [f"{long},pos", "\x00dull\x07 \u202eplot\x1b,neg", *["a warm film,pos", "a cold film,neg"] * 10]
    data = lines(tmp_path / "train.csv", *rows)
    test = lines(tmp_path / "test.csv", *rows[1:], f"bad {long},neg", f"bad {long},neg")
    changes = {"data__name": data, "data__test_name": test, "federation__num_rounds": 1}
    runs.train(world, tmp_path / "run", **changes)
    said = "1 of 22 training texts and 2 of 23 held-out texts are longer than data.max_length = 12 tokens and are cut"
    assert said in " ".join(capsys.readouterr().err.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["truncated"] == {"train": 1, "held_out": 2}


def test_a_test_file_with_a_label_that_training_does_not_have(world, capsys, tmp_path):
    test = lines(tmp_path / "test.csv", "a film,pos", "a plot,neutral")
    config = runs.write_config(tmp_path / "c.yaml", world, data__test_name=test)
    message = refusal(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert f"{test}, line 3: label 'neutral' is not among label_names ('neg', 'pos')" in message


def test_clients_with_fewer_examples_than_a_batch_see_all_of_them(world):
    config = make_config(
        runs.settings(
            world, federation__num_clients=30, federation__clients_per_round=30, partition__name="iid"
        ),
        "test",
    )
    federation = set_up(config)
    population, ids = federation.task.population, np.arange(30)
    assert population.examples.sizes.max() < config.federation.batch_size
    chosen = local_examples(population, federation.feed.steps, ids, 0)
    for client, mine in zip(ids, chosen.reshape(30, -1), strict=True):
        assert set(mine.tolist()) == set(population.examples[client].tolist())
        assert np.ptp(np.unique(mine, return_counts=True)[1]) <= 1
