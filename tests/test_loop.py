"""Whole runs: what their metrics say, and settings that must not, or must, change them."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fslora_jax.config import load_config, make_config
from fslora_jax.data.batches import BatchShape
from fslora_jax.federation import books, feed, shapes
from fslora_jax.federation.calls import Programs, calls_of, cohort_of
from fslora_jax.federation.cohort import sample_cohort
from fslora_jax.federation.meter import Meter
from fslora_jax.federation.optimizer import make_client_optimizer
from fslora_jax.federation.setup import set_up, with_feed

Q_RANK = 2 * 2 * (16 + 16)
"""Values of a unit of rank: query and value in two layers, 16 to 16."""


def close(a: Path, b: Path) -> None:
    """Equal metrics to 1e-4; traffic exactly."""
    for one, other in zip(runs.records(a), runs.records(b), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_metrics_are_one_object_a_round(finished):
    records = runs.records(finished)
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4]
    for record in records:
        t = record["round"]
        names = {"round"}
        names |= {"eval/loss", "eval/accuracy"} if t % 2 == 0 else set()
        names |= {"train/loss", "clients/reported", "traffic/down_bytes", "traffic/up_bytes"} if t else set()
        assert set(record) == names
        assert all(np.isfinite(value) for value in record.values())
    assert records[-1]["eval/loss"] < records[0]["eval/loss"]
    clock = runs.records(finished, "timings.jsonl")
    assert [record["round"] for record in clock] == [1, 2, 3, 4]
    assert all(record["seconds"] > 0 for record in clock)
    for record in clock:
        whole = record["seconds"] + record["data_wait"]
        assert record["data_wait_share"] == pytest.approx(record["data_wait"] / whole)
        assert record["host_mb"] > 50
    assert 0 <= json.loads((finished / "summary.json").read_text())["data_wait_share"] < 1


def test_the_summary_repeats_the_metrics(finished):
    summary, records = json.loads((finished / "summary.json").read_text()), runs.records(finished)
    for when, record in (("before", records[0]), ("after", records[-1])):
        assert summary[when] == {k: v for k, v in record.items() if k.startswith("eval/")}
    assert summary["up_bytes"] == records[-1]["traffic/up_bytes"]
    assert summary["down_bytes"] == records[-1]["traffic/down_bytes"]


def test_traffic_is_what_the_cohorts_send(finished):
    """By hand: k components of every module and the head each way, and downward the indices of four draws."""
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    head = sum(x.size for name, x in tensors.items() if ".lora_" not in name)
    ranks = [2, 4, 2, 4, 2]
    up = down = 0
    for record in runs.records(finished)[1:]:
        cohort = sample_cohort(0, record["round"] - 1, 5, 3)
        up += sum(4 * (ranks[c] * Q_RANK + head) for c in cohort)
        down += sum(4 * (ranks[c] * Q_RANK + head + 4 * ranks[c]) for c in cohort)
        assert (record["traffic/up_bytes"], record["traffic/down_bytes"]) == (up, down)


@pytest.mark.parametrize(
    "changes",
    [{"federation__layout": "masked"}, {"federation__cohort_chunks": 2}, {"data__packing": False}],
    ids=lambda changes: next(iter(changes)),
)
def test_how_it_is_computed_does_not_change_the_result(world, finished, tmp_path, changes):
    """Layout and chunks keep minibatches; without packing they are dealt anew, so only the first evaluation agrees."""
    run = runs.train(world, tmp_path / "run", **changes)
    if "data__packing" in changes:
        assert runs.records(run)[0] == pytest.approx(runs.records(finished)[0], abs=1e-4)
    else:
        close(run, finished)


def played(world, run_dir, monkeypatch, seconds, **changes):
    """A run, in which order rounds were given to the devices and seen by the host, and the servers they were given."""
    events, servers = [], []

    def of(self, server, *rest):
        step = program(self, server, *rest)

        def given(base, server, *others):
            events.append(("given", len(servers) + 1))
            servers.append(server)
            return step(base, server, *others)

        return given

    program, measure = Programs.of, Meter.measure
    monkeypatch.setattr(Programs, "of", of)
    monkeypatch.setattr(
        Meter, "measure", lambda self, t, seen: events.append(("seen", t + 1)) or measure(self, t, seen)
    )
    monkeypatch.setattr(books, "AHEAD_SECONDS", seconds)
    return runs.train(world, run_dir, evaluate_every=4, checkpoint_every=3, **changes), events, servers


@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
def test_devices_have_the_next_round_before_the_host_sees_the_last(world, tmp_path, monkeypatch):
    """But for a checkpoint, and for the end. Long rounds are seen one by one, and it is the same run."""
    run, events, servers = played(world, tmp_path / "ahead", monkeypatch, seconds=math.inf)
    order = "given 1, given 2, seen 1, given 3, seen 2, seen 3, given 4, seen 4"
    assert ", ".join(f"{what} {t}" for what, t in events) == order
    assert all(leaf.is_deleted() for server in servers for leaf in jax.tree.leaves(server)), "not replaced"
    monkeypatch.undo()
    other, events, _ = played(world, tmp_path / "one by one", monkeypatch, seconds=0.0)
    assert events == [(what, t) for t in (1, 2, 3, 4) for what in ("given", "seen")]
    assert runs.results(run) == runs.results(other)


def test_what_clients_remember_is_seen_before_the_next_round(world, tmp_path, monkeypatch):
    _, events, _ = played(world, tmp_path / "run", monkeypatch, math.inf, federation__method="hetlora")
    assert events == [(what, t) for t in (1, 2, 3, 4) for what in ("given", "seen")]


def test_a_run_of_a_cpu_as_two_devices_is_the_same(world, finished, tmp_path):
    config = runs.write_config(tmp_path / "run.yaml", world, mesh__cpu_devices=2)
    counted = "import atexit, jax; atexit.register(lambda: print('devices:', len(jax.devices())))"
    done = runs.finish(runs.start(world, "train", config, "--run-dir", tmp_path / "run", driver=counted))
    assert done.returncode == 0, done.stderr
    assert "devices: 2" in done.stdout
    close(tmp_path / "run", finished)


VARIANTS = {
    "everything else": {
        "client_optimizer": {
            "name": "sgd",
            "momentum": 0.9,
            "learning_rate": 0.05,
            "head_learning_rate": 0.2,
            "max_grad_norm": 1.0,
            "schedule": "cosine",
            "warmup_rounds": 1,
        },
        "server_optimizer": {"name": "adam", "learning_rate": 0.02, "options": {"b1": 0.8}},
        "model__pooling": "mean",
        "lora__use_rslora": False,
        "lora__lora_dropout": 0.0,
        "federation__share_sketch": True,
        "federation__client_weights": "examples",
        "federation__clients_per_round": None,
        "partition__name": "iid",
    },
    "federated LoRA": {
        "federation__method": "fedit",
        "federation__sketching_ratios": [1.0],
        "model__dtype": "bfloat16",
        "lora__target_modules": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
        "server_optimizer": {},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_settings_train_too(world, tmp_path, name):
    run = runs.train(world, tmp_path / "run", **VARIANTS[name])
    records = runs.records(run)
    assert records[-1]["eval/loss"] < records[0]["eval/loss"]
    assert len({record["train/loss"] for record in records[1:]}) == 4


def federation_of(world: runs.World, **changes):
    config = make_config(runs.settings(world, **changes), "test")
    return config, set_up(config)


def test_sampled_cohorts_differ_from_round_to_round_and_are_of_their_size(world):
    _, federation = federation_of(world, federation__num_rounds=20)
    cohorts = [federation.feed.cohort(t) for t in range(20)]
    assert {len(set(cohort.tolist())) for cohort in cohorts} == {3}
    assert len({tuple(cohort) for cohort in cohorts}) > 5
    assert set(np.concatenate(cohorts)) == set(range(5))


def test_a_round_that_needs_more_rows_than_were_planned_gets_them(world, tmp_path, monkeypatch):
    changes = {"data__row_length": 12, "lora__lora_dropout": 0.0, "federation__num_rounds": 2}
    rows, enough = [], shapes.PLANNED
    for planned in (enough, 1):  # all rounds are laid out beforehand, then only the first
        monkeypatch.setattr(shapes, "PLANNED", planned)
        _, federation = federation_of(world, **changes)
        rows.append([cohort_of(federation, t).batches.tokens.shape[-2] for t in (0, 1)])
        runs.train(world, tmp_path / str(planned), **changes)
    assert rows == [[4, 4], [3, 4]]
    close(tmp_path / str(enough), tmp_path / "1")


def test_several_rounds_in_one_call_are_the_same_to_the_bit(world, tmp_path, monkeypatch):
    """With XLA's usual optimisations; what the tests leave out of them moves the last bit."""
    monkeypatch.delenv("XLA_FLAGS")
    first = "from fslora_jax.cli import main\nmain({!r})"
    commands = [
        ["train", str(world.config), "--run-dir", str(tmp_path / n), "--federation.rounds-per-call", n]
        for n in ("1", "8")  # calls of two, as every second round is evaluated
    ]
    ended = runs.finish(runs.start(world, *commands[1], driver=first.format(commands[0])))
    assert ended.returncode == 0, ended.stderr
    assert runs.results(tmp_path / "8") == runs.results(tmp_path / "1")
    clock = runs.records(tmp_path / "8", "timings.jsonl")
    assert [record["round"] for record in clock] == [1, 2, 3, 4]
    assert clock[0] | {"round": 2} == clock[1]  # both have their call's mean


def test_rounds_of_a_call_have_one_shape(world):
    _, federation = federation_of(world, data__row_length=12)
    planned = with_feed(federation, shape=federation.feed.shape._replace(rows=3))  # rounds need 3, 4, 3 and 4
    together = cohort_of(planned, *range(4))
    for i in range(4):
        alone = cohort_of(federation, i)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a[i], b)


@given(
    done=st.integers(0, 30),
    rounds=st.integers(1, 30),
    call=st.integers(1, 9),
    every=st.tuples(*[st.integers(1, 12)] * 2),
)
def test_calls_cover_the_rounds_and_end_at_evaluations_and_checkpoints(world, done, rounds, call, every):
    changes = {"num_rounds": done + rounds, "rounds_per_call": call}
    config = load_config(world.config)
    config = config.model_copy(
        update={
            "federation": config.federation.model_copy(update=changes),
            "evaluate_every": every[0],
            "checkpoint_every": every[1],
        }
    )
    calls = calls_of(config, done)
    found = [one.rounds for one in calls]
    assert [t for rounds in found for t in rounds] == list(range(done, done + rounds))
    ends = {rounds.stop for rounds in found}
    assert all(t in ends for t in range(done + 1, done + rounds) if t % every[0] == 0 or t % every[1] == 0)
    assert max(map(len, found)) <= call
    short = [rounds.stop for rounds in found if len(rounds) < call]
    assert all(t % every[0] == 0 or t % every[1] == 0 or t == done + rounds for t in short)
    for one in calls:
        last = one.rounds.stop == done + rounds
        assert one.evaluates == (last or one.rounds.stop % every[0] == 0)
        assert one.saves == (last or one.rounds.stop % every[1] == 0)


@given(*[st.integers(1, 40)] * 4, st.integers(1, 4))
def test_a_grown_shape_holds_what_is_needed(rows, places, more_rows, more_places, split):
    shape, needed = (BatchShape(a, 64, b) for a, b in ((rows * split, places), (more_rows, more_places)))
    found = feed.fitting(shape, needed, split)
    assert found.rows >= needed.rows
    assert found.places >= needed.places
    assert found.rows % split == 0
    assert found == feed.fitting(shape, found, split)
    if shape.rows >= needed.rows and shape.places >= needed.places:
        assert found == shape


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_weights_of_the_average(world, weights):
    _, federation = federation_of(world, federation__client_weights=weights)
    clients = cohort_of(federation, 0).clients
    found = dict(zip(np.ravel(clients.id).tolist(), np.ravel(clients.weight).tolist(), strict=True))
    cohort = federation.feed.cohort(0)
    sizes = np.array(
        [len(federation.task.population.examples[c]) if weights == "examples" else 1 for c in cohort]
    )
    assert found == pytest.approx(dict(zip(cohort.tolist(), sizes / sizes.sum(), strict=True)), rel=1e-6)
    assert len(set(sizes.tolist())) > 1 or weights == "uniform"


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("linear", 1, [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", 0, [(1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]),
        ("constant", 2, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_over_a_run_of_four_rounds_of_two_steps(world, schedule, warmup, rates):
    config = load_config(world.config).client_optimizer.model_copy(
        update={"learning_rate": 1.0, "schedule": schedule, "warmup_rounds": warmup}
    )
    rate = make_client_optimizer(config, num_rounds=4, local_steps=2).schedule
    np.testing.assert_allclose([rate(step) for step in range(8)], rates, atol=1e-6)


def test_texts_in_pairs_and_a_test_file_of_its_own(world, tmp_path):
    """Headerless TSV with columns by position, two texts, labels in a given order."""
    pairs = [
        "a film\tgood plot\t1",
        "the plot\tbad film\t0",
        "warm film\tthe plot\t1",
        "cold film\ta plot\t0",
    ]
    for name, count in (("train.tsv", 12), ("test.tsv", 2)):
        (tmp_path / name).write_text("\n".join(pairs * count) + "\n")
    _, federation = federation_of(
        world,
        data__name=str(tmp_path / "train.tsv"),
        data__test_name=str(tmp_path / "test.tsv"),
        data__text_columns=[0, 1],
        data__label_column=2,
        data__label_names=[1, 0],
    )
    assert federation.task.label_names == ("1", "0")
    assert federation.task.test.batches.weights.sum() == 8
    assert federation.task.test.batches.types.max() == 1
    np.testing.assert_array_equal(federation.task.population.labels[:4], [0, 1, 0, 1])


LEAVES = {
    "client_optimizer": {"name": "sgd", "learning_rate": 1e4},
    "server_optimizer": {"learning_rate": 3e38},
    "federation__local_steps": 1,
    "evaluate_every": 30,
    "federation__num_rounds": 30,
    "lora__lora_dropout": 0.0,
}
"""The first step of the server leaves float32; the losses of its round are of before."""


def test_weights_that_left_the_finite_numbers_are_not_saved(world, tmp_path, capsys):
    config = runs.write_config(tmp_path / "c.yaml", world, **LEAVES, checkpoint_every=1)
    said = runs.mistake(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert "round 1: the server's weights are not finite; lower client_optimizer.learning_rate" in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("call", [1, 4])
def test_the_rounds_before_one_that_diverges_are_recorded(world, tmp_path, capsys, call):
    changes = {**LEAVES, "checkpoint_every": 30, "federation__rounds_per_call": call}
    config = runs.write_config(tmp_path / "c.yaml", world, **changes)
    said = runs.mistake(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert re.search(r"round 2: client \d+: loss nan at local step 1", said)
    for name, expected in (("metrics.jsonl", [0, 1]), ("timings.jsonl", [1])):
        assert [record["round"] for record in runs.records(tmp_path / "run", name)] == expected


def test_merged_weights_that_left_the_finite_numbers_are_not_saved(world, tmp_path, capsys):
    """FLoRA merges factors into the base and starts new ones, which say nothing of the product."""
    changes = {
        "federation__method": "flora",
        "client_optimizer": {"name": "sgd", "learning_rate": 1e30},
        "lora__lora_alpha": 1e8,
        "server_optimizer": {},
        "federation__local_steps": 1,
        "lora__lora_dropout": 0.0,
        "evaluate_every": 30,
        "federation__num_rounds": 30,
        "checkpoint_every": 1,
    }
    config = runs.write_config(tmp_path / "c.yaml", world, **changes)
    said = runs.mistake(world, capsys, "train", config, "--run-dir", tmp_path / "run")
    assert "round 1: the server's weights are not finite; lower client_optimizer.learning_rate" in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
