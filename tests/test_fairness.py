"""Clients one by one: what each held out, under the global adapter and under its own, against a loop over clients."""

import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax import hub
from fslora_jax.data.batches import make_batch, shape_for
from fslora_jax.data.examples import take
from fslora_jax.data.partition import Partition, hold_back
from fslora_jax.errors import UserError
from fslora_jax.federation.client import train_clients
from fslora_jax.federation.division import divide
from fslora_jax.federation.examples import load_examples, tokenise
from fslora_jax.federation.fairness import evaluate_clients, summary
from fslora_jax.federation.results import load_round
from fslora_jax.federation.setup import global_model
from fslora_jax.methods import whole

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")

CLIENTS = 5


@pytest.fixture(scope="module")
def run(world):
    """Clients that hold 0 to some ten examples out; three of five train at a time."""
    changes: dict[str, Any] = {"partition__held_out": 0.3, "partition__dirichlet_alpha": 0.4}
    changes |= {"client_optimizer__schedule": "constant", "federation__num_rounds": 2}
    return runs.train(world, world.folder / "fair", **changes)


@pytest.fixture(scope="module")
def printed(world, run) -> tuple[dict[str, float], list[dict[str, Any]]]:
    found = evaluate_clients(run, personalised=True)
    return found, runs.records(run, "clients.jsonl")


def by_hand(run):
    """Loss and accuracy of each client, each alone in one padded batch: under the global adapter and its own."""
    config, federation, server, _ = load_round(run, None)
    task, folder = federation.task, hub.resolve_model(config.model.name)
    train = load_examples(config.data, config.seed, folder)[0]
    held = divide(config, train)[1]
    base, weights = global_model(federation, server)
    own = dict(train_clients(config, federation, server, range(CLIENTS)))
    for client in range(CLIENTS):
        mine = take(train, held[client])
        if not len(mine.labels):
            continue
        store, everything = tokenise(folder, task.model, mine, config.data), np.arange(len(mine.labels))[None]
        shape = shape_for(store, everything, 12, False)
        batch = make_batch(store, mine.labels, everything, shape, False)
        for prefix, local in (("", whole(federation.spec, weights)), ("personalised/", own[client])):
            score = jax.jit(task.model.score)(base, [jax.tree.map(lambda x: x[None], local)], batch)
            means = {"loss": score.loss.mean(), "accuracy": score.correct.mean()}
            yield client, {prefix + name: float(value) for name, value in means.items()}


def test_every_client_gets_what_it_gets_alone(run, printed):
    _, records = printed
    of_client = {record["client"]: record for record in records}
    seen = set()
    for client, expected in by_hand(run):
        for name, value in expected.items():
            assert of_client[client][name] == pytest.approx(value, rel=1e-4), (client, name)
        seen.add(client)
    assert seen == set(of_client) and len({r["examples"] for r in records}) > 1
    assert any(r["loss"] != pytest.approx(r["personalised/loss"], rel=1e-3) for r in records)


def test_the_summary_is_over_clients(printed):
    found, records = printed
    assert found == summary(records) and found["clients"] == len(records)
    losses = [record["personalised/loss"] for record in records]
    assert found["personalised/loss/worst_decile"] == pytest.approx(max(losses))
    assert found["personalised/loss/std"] == pytest.approx(np.std(losses))
    assert found["accuracy/mean"] == pytest.approx(np.mean([record["accuracy"] for record in records]))


def test_the_worst_tenth_of_many():
    records = [{"client": c, "accuracy": c / 20} for c in range(20)]
    assert summary(records)["accuracy/worst_decile"] == pytest.approx(0.025)


def test_two_devices_say_the_same(world, run, printed):
    """Five clients in two groups of devices: slots stay empty."""
    flags = "import os; os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=2'"
    process = runs.start(world, "eval", run, "--per-client", "--personalised", driver=flags)
    done = runs.finish(process)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(printed[0], rel=1e-4)


def test_refusals(world, finished, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = (run / "config.yaml").read_text().replace("schedule: constant", "schedule: linear")
    (tmp_path / "run" / "config.yaml").write_text(config)
    with pytest.raises(UserError, match="schedule linear has come to a rate of 0"):
        evaluate_clients(tmp_path / "run", personalised=True)
    with pytest.raises(UserError, match=r"partition.held_out: 0 of each client's examples are none"):
        evaluate_clients(finished)
    for argv in (["--personalised"], ["--max-length", 8], ["--generate"], ["--per-client", "--generate"]):
        with pytest.raises(SystemExit, match="2"):
            runs.call(world, "eval", run, *argv)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 0.99), st.integers(0, 9))
def test_held_out_shares(sizes, fraction, seed):
    """Every example once, on one of the two sides of its own client; as many as the fraction says."""
    numbers = np.random.default_rng(seed).permutation(sum(sizes))
    partition = Partition.of([np.sort(part) for part in np.split(numbers, np.cumsum(sizes)[:-1])])
    train, held = hold_back(partition, fraction, np.random.default_rng(seed))
    assert held.sizes.tolist() == [int(fraction * size) for size in sizes]
    assert train.sizes.min() >= 1
    for client, share in enumerate(partition):
        assert sorted([*train[client], *held[client]]) == share.tolist()
    again = hold_back(partition, fraction, np.random.default_rng(seed))
    assert again[1].examples.tolist() == held.examples.tolist()
