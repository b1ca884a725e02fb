"""Curves of scaling: what their points are, that a point is a real round, and that a folder is gone on with."""

import json
from functools import partial

import jax
import numpy as np
import pandas as pd
import pytest
import runs

from fslora_jax.config import make_config
from fslora_jax.errors import UserError
from fslora_jax.models.kernels import laid_out
from fslora_jax.plan.abstract import abstract_model
from fslora_jax.scale import command
from fslora_jax.scale import measure as measuring
from fslora_jax.scale.curves import CURVES, Point, changed
from fslora_jax.scale.measure import measure
from fslora_jax.scale.worker import analysed, ready_round, sizes_of

FIELDS = {
    **runs.SIZES,
    "model_type": "bert",
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
CLIENTS, R, WIDTH, LAYERS, LABELS = 4, 8, 16, 2, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four clients of one rank, one module."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "config.json").write_text(json.dumps(FIELDS))
    values = {
        "model": {"name": str(folder)},
        "data": {"name": "none", "max_length": 8},
        "lora": {"r": R, "target_modules": ["query"]},
        "federation": {
            "num_clients": CLIENTS,
            "local_steps": 1,
            "batch_size": 2,
            "sketching_ratios": [0.5],
        },
    }
    return make_config(values, "test")


def points(name, config, value):
    return {point.line: point for point in CURVES[name].points(config, value)}


def test_more_clients_are_more_chunks_of_as_many_at_a_time(config):
    for n in (4, 8, 64):
        f = points("cohort", config, n)["chunked"].config.federation
        assert (f.num_clients, f.cohort_chunks) == (n, n // CLIENTS)


def test_all_clients_have_the_rank_of_the_point(config):
    found = points("rank", config, 2)
    assert {line: (p.config.lora.r, p.config.federation.layout) for line, p in found.items()} == {
        "tiered, r = 8": (8, "tiered"),
        "masked, r = 8": (8, "masked"),
        "tiered, r = 4 k": (8, "tiered"),
    }
    for p in found.values():
        (ratio,) = p.config.federation.sketching_ratios
        assert ratio * p.config.lora.r == 2
    assert list(points("rank", config, 16)) == ["tiered, r = 4 k"]


def test_weak_and_strong_scaling(config):
    found = points("devices", config, 2)
    clients = {line: p.config.federation.num_clients for line, p in found.items()}
    assert clients == {
        "strong": 4,
        "weak": 8,
        "strong, two processes": 4,
        "weak, two processes": 8,
    }
    assert {(p.devices, p.processes) for p in found.values()} == {(2, 1), (2, 2)}
    assert {p.processes for p in points("devices", config, 4).values()} == {1, 2, 4}
    assert list(points("devices", config, 1)) == ["strong", "weak"]
    assert points("devices", config, 2)["weak"].config.federation.cohort_chunks == 1


def rounds(point, folder):
    return ready_round(point, abstract_model(point.config, LABELS, point.fields), folder)


def test_a_point_is_a_round_on_texts_of_one_length(config, tmp_path):
    point = points("length", config, 12)["one text a row"]
    facts, one_round = rounds(point, tmp_path)
    found = one_round()
    assert 0 < found["feed_seconds"] < found["seconds"]
    tokens = CLIENTS * 2 * 12 * 4 * 4  # clients, texts, tokens; four arrays of 4 bytes
    made = jax.eval_shape(abstract_model(config, LABELS).init_base, jax.random.key(0))
    weights = 4 * sizes_of(jax.eval_shape(partial(laid_out, remat=config.model.remat), made))
    assert tokens + weights < facts["arguments"] < 1.2 * (tokens + weights)
    assert facts["exchanged"] == 0
    assert facts["outputs"] == analysed(point, abstract_model(point.config, LABELS))["outputs"]


def test_texts_longer_than_the_model_takes_are_refused(config, tmp_path):
    point = points("length", config, 21)["one text a row"]
    with pytest.raises(UserError, match=r"data.max_length: found 21, .* takes at most 20 tokens"):
        rounds(point, tmp_path)


def test_a_point_whose_clients_remember_something(config, tmp_path):
    wrapped = changed(config, federation={"wrappers": {"personalise": {"parts": ["b"]}}})
    plain, own = (
        rounds(points("length", c, 12)["one text a row"], tmp_path / name)
        for name, c in (("plain", config), ("own", wrapped))
    )
    assert own[0]["arguments"] > plain[0]["arguments"]
    assert own[1]()["seconds"] > 0


def test_what_two_processes_exchange_is_one_sum_of_the_adapter(config):
    """Each of two devices sends half of a ring's two turns: adapter, head and component counts once."""
    record = measure(points("devices", config, 2)["strong, two processes"], repeats=1)
    values = LAYERS * R * 2 * WIDTH + (WIDTH + 1) * LABELS + LAYERS * R
    assert record["exchanged"] == 4 * values
    assert record["seconds"] == np.median(record["all_seconds"])
    assert record["seconds_per_client"] == record["seconds"] / CLIENTS
    assert record["peak_bytes"] > 2e8


@pytest.mark.parametrize(
    ("seconds", "repeats", "timed"), [(1.0, 3, 5), (9.0, 3, 3), (0.01, 3, 50), (0.01, 60, 60)]
)
def test_short_rounds_are_timed_more_often(monkeypatch, seconds, repeats, timed):
    monkeypatch.setattr(measuring, "ask_all", lambda workers, command: [{"seconds": seconds}])
    assert len(measuring.timed([], repeats)) == timed


def test_larger_models_are_compiled_and_not_run(config):
    small, large = (points("model", config, w)["width / 64 layers"] for w in (64, 128))
    assert not small.runs
    found = [analysed(p, abstract_model(p.config, LABELS, p.fields)) for p in (small, large)]
    assert 6 < found[1]["flops"] / found[0]["flops"] < 9  # twice the layers of nearly four times the products
    assert found[1]["temporaries"] > found[0]["temporaries"]


def test_points_that_are_there_are_not_measured_again(config, tmp_path, monkeypatch, capsys):
    asked = []

    def measured(point: Point, repeats: int):
        asked.append((point.x, repeats))
        return {"line": point.line, "x": point.x, "clients": point.x, "seconds": point.x / 8} | dict.fromkeys(
            ("seconds_per_client", "peak_bytes", "temporaries", "all_seconds"), 2.0
        )

    monkeypatch.setattr(command, "measure", measured)
    world = runs.World(tmp_path, tmp_path, tmp_path, tmp_path / "cache", tmp_path / "x.yaml")
    world.config.write_text(json.dumps(config.model_dump(mode="json")))
    out = tmp_path / "out"
    runs.call(world, "scale", "cohort", world.config, "--out", out, "--values", 8, 16, "--repeats", 2)
    runs.call(world, "scale", "cohort", world.config, "--out", out, "--values", 8, 16, 32)
    assert asked == [(8, 2), (16, 2), (32, 3)]
    assert pd.read_csv(out / "cohort.csv")["x"].tolist() == [8, 16, 32]
    assert json.loads((out / "cohort.json").read_text())["machine"]["cores"]
    drawn = {path.name for path in out.glob("*.png")}
    assert drawn == {f"cohort_{column}.png" for column in CURVES["cohort"].drawn}
    assert "seconds per client, largest over smallest 1.00" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cohort.json").write_text('{"points": []}')
    for argv, message in (
        (["--out", tmp_path / "other"], "cohort.json: has no 'config'"),
        (["--lora.r", 4], "holds points of another config"),
        (["--repeats", 0], "expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            runs.call(world, "scale", "cohort", world.config, "--out", out, *argv)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ranks"], "unknown curve 'ranks'; did you mean rank?"),
        ([], "no curve; expected one of cohort, rank"),
        (["cohort"], "scale cohort: no config file; expected fslora scale cohort CONFIG.yaml"),
    ],
)
def test_a_curve_must_be_named(world, capsys, argv, message):
    with pytest.raises(SystemExit):
        runs.call(world, "scale", *argv)
    assert message in capsys.readouterr().err
