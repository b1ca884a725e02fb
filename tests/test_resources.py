"""Ranks of clients: in range, by the seed, and distributed as said."""

import json
import shutil

import numpy as np
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.config import Config, DataConfig, FederationConfig, ModelConfig, load_config, make_config
from fslora_jax.errors import UserError
from fslora_jax.federation.calls import cohort_of
from fslora_jax.federation.feed import counted_steps, round_seconds
from fslora_jax.federation.meter import head_values
from fslora_jax.federation.resources import (
    client_ranks,
    demand_of,
    device_kinds,
    draw_ranks,
    resources,
    training_flops,
)
from fslora_jax.federation.setup import set_up
from fslora_jax.methods import Client

pytestmark = pytest.mark.usefixtures("programs_kept")

DISTRIBUTIONS = ("uniform", "normal", "heavy_tail")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 40), st.integers(0, 99))
def test_ranks_are_in_their_range(name, n, least, width, seed):
    ranks = draw_ranks(name, n, least, least + width, np.random.default_rng(seed))
    assert ranks.shape == (n,)
    assert least <= ranks.min() <= ranks.max() <= least + width


def test_ranks_are_distributed_as_said():
    by_name = {name: draw_ranks(name, 20_000, 1, 32, np.random.default_rng(0)) for name in DISTRIBUTIONS}
    assert by_name["uniform"].mean() == pytest.approx(16.5, abs=0.2)
    assert by_name["uniform"].std() == pytest.approx(31 / 12**0.5, abs=0.2)
    assert by_name["normal"].mean() == pytest.approx(16.5, abs=0.2)
    assert by_name["normal"].std() == pytest.approx(31 / 6, abs=0.2)
    assert np.median(by_name["heavy_tail"]) <= 2
    assert by_name["heavy_tail"].max() == 32


@pytest.mark.parametrize("ranks", ["random", *DISTRIBUTIONS])
def test_draws_are_a_function_of_the_seed(ranks):
    federation = FederationConfig(num_clients=50, ranks=ranks, sketching_ratios=(0.25, 0.5))
    made = Config(model=ModelConfig(name="m"), data=DataConfig(name="d"), federation=federation)
    first, again, other = (client_ranks(made.model_copy(update={"seed": s})).tolist() for s in (0, 0, 1))
    assert first == again != other
    assert ranks != "random" or set(first) == {16, 32}


# A phone that is short of memory, a laptop that is short of time, and a desktop that has enough of both.
DEVICES = {
    "phone": {"memory_gb": 1.48e-4, "gflops": 0.02, "down_mbps": 2.0, "up_mbps": 0.5, "share": 2},
    "laptop": {"memory_gb": 1.0, "gflops": 0.0045, "down_mbps": 8.0, "up_mbps": 4.0},
    "desktop": {"memory_gb": 1.0, "gflops": 10.0, "down_mbps": 100.0, "up_mbps": 50.0},
}
CHANGES = {
    "federation__num_clients": 12,
    "federation__ranks": "device",
    "federation__devices": DEVICES,
    "federation__round_deadline": 0.29,
    "federation__clients_asked": 6,
    "federation__clients_per_round": 4,
    "federation__failure_rate": 0.2,
    "federation__min_local_steps": 1,
}


@pytest.fixture(scope="module")
def unequal(world):
    config = make_config(runs.settings(world, **CHANGES), "test")
    return config, set_up(config)


def test_a_device_gets_the_largest_k_that_it_can_hold_and_train_in_time(unequal):
    config, federation = unequal
    population, r = federation.task.population, config.lora.r
    lengths = population.store.lengths
    demand = demand_of(config, federation.task.model, lengths.mean(), np.square(lengths).mean())
    expected, short_of = {}, {}
    for name, device in config.federation.devices.items():
        times = {k: demand.traffic(device, k) + 2 * demand.step(device, k) for k in range(1, r + 1)}
        held = [k for k in times if demand.memory(k) <= device.memory_gb * 1e9]
        intime = [k for k in times if times[k] <= 0.29]
        expected[name] = min(max(held), max(intime))
        short_of[name] = max(held) < r, max(intime) < r
    assert short_of == {"phone": (True, False), "laptop": (False, True), "desktop": (False, False)}
    assert len(set(expected.values())) == 3
    names, kinds = device_kinds(config)
    assert population.ranks.tolist() == [expected[names[kind]] for kind in kinds]
    assert {names[kind] for kind in kinds} == set(DEVICES)


def test_the_clock_counts_operations_and_bits(unequal):
    config, federation = unequal
    population, task = federation.task.population, federation.task
    lengths = population.store.lengths
    names, kinds = device_kinds(config)
    for client, kind in enumerate(kinds):
        device, k = config.federation.devices[names[kind]], int(population.ranks[client])
        values = 2 * 2 * k * (16 + 16)  # query and value in two layers
        flops = training_flops(task.model, values, 4 * lengths.mean(), 4 * np.square(lengths).mean())
        head = 2 * 16 + 2
        drawn = 2 * 2 * k * (k < 8)  # who gets all is not told which
        down, up = 4 * (values + head + drawn), 4 * (values + head)
        seconds = 8 * (down / device.down_mbps + up / device.up_mbps) / 1e6 + 2 * flops / device.gflops / 1e9
        found = population.clock.seconds(0, *np.array([[client], [k], [2]]))[0]
        assert found == pytest.approx(seconds, rel=1e-6)


def test_who_downloads_what_all_send_waits_for_it(world):
    """FLoRA's clients get the factors of the whole cohort: on the clock as in the record of bytes."""
    of_a_byte = {
        "memory_gb": 1.0,
        "gflops": 1e9,
        "down_mbps": 8e-6,
        "up_mbps": 8e9,
    }  # a second down, nothing else
    config = make_config(
        runs.settings(
            world, federation__method="flora", federation__devices={"one": of_a_byte}, server_optimizer={}
        ),
        "test",
    )
    federation = set_up(config)
    population, ids = federation.task.population, federation.feed.cohort(0)
    clients = Client(ids, population.ranks[ids], np.ones(len(ids)))
    counted = federation.method.traffic(0, clients, head_values(federation)).down
    seconds = round_seconds(population, federation.feed.steps, ids, 0)
    assert seconds == pytest.approx(counted.max(), rel=1e-3)
    assert seconds > 4 * 4 * (16 + 16) * clients.k.sum()


def test_a_client_that_trains_alone_keeps_its_k_and_its_clock(unequal):
    config, federation = unequal
    ranks, times = federation.task.population.ranks, federation.task.population.clock
    lengths = federation.task.population.store.lengths
    for only in (0, len(ranks) - 1):
        alone = config.model_copy(
            update={"federation": config.federation.model_copy(update={"only_client": only})}
        )
        k, clock = resources(alone, federation.task.model, lengths.mean(), np.square(lengths).mean())
        assert k.tolist() == [ranks[only]]
        assert [x.tolist() for x in clock[1:]] == [[x[only]] for x in times[1:]]


def test_operations_of_a_step_by_hand():
    """One layer of one 3 to 5 matrix, an adapter of rank 2, texts of 4 and 6 tokens."""

    class Model:
        modules = {"m": type("Target", (), {"i": 3, "o": 5, "layers": 1})}

    expected = sum(4 * 3 * 5 * n + 6 * 2 * (3 + 5) * n + 3 * 4 * 3 * n * n for n in (4, 6))
    assert training_flops(Model, 2 * (3 + 5), 4 + 6, 16 + 36) == expected


def test_the_first_reports_count_and_the_others_weigh_nothing(unequal):
    _, federation = unequal
    population, steps = federation.task.population, federation.feed.steps
    late = 0
    for t in range(20):
        ids = federation.feed.cohort(t)
        done, counted = steps.done(12, t)[ids], counted_steps(population, steps, ids, t)
        seconds = population.clock.seconds(t, ids, population.ranks[ids], done)
        first = sorted((second, i) for i, second in enumerate(seconds) if done[i])[:4]
        assert np.flatnonzero(counted).tolist() == sorted(i for _, i in first)
        assert (counted[counted > 0] == done[counted > 0]).all()
        late += int((done > 0).sum() > 4)
        clients, batches = cohort_of(federation, t)
        weights = dict(zip(np.ravel(clients.id).tolist(), np.ravel(clients.weight).tolist(), strict=True))
        kept = ids[counted > 0]
        assert {c for c, weight in weights.items() if weight > 0} == set(kept.tolist())
        assert all(weights[c] == pytest.approx(1 / len(kept)) for c in kept.tolist())
        assert (np.asarray(batches.weights).sum((-1, -2)).ravel() > 0).sum() == len(kept)
    assert late > 5


def test_where_nobody_reports_there_is_no_loss_and_the_server_waits_for_the_slowest(world, tmp_path):
    changes = CHANGES | {"federation__failure_rate": 1 - 1e-9, "federation__num_rounds": 1}
    run = runs.train(world, tmp_path / "run", **changes)
    federation = set_up(load_config(run / "config.yaml"))
    population, steps, ids = federation.task.population, federation.feed.steps, federation.feed.cohort(0)
    everything = np.full(len(ids), steps.local_steps)
    seconds = population.clock.seconds(0, ids, population.ranks[ids], everything)
    record = runs.records(run)[1]
    assert record["clients/reported"] == 0
    assert "train/loss" not in record
    assert record["clock/simulated_seconds"] == pytest.approx(seconds.max()) and seconds.max() > 0


def test_a_run_keeps_simulated_time_and_goes_on_with_it(world, unequal, tmp_path):
    _, federation = unequal
    run = runs.train(world, tmp_path / "run", **CHANGES)
    population, total = federation.task.population, 0.0
    for record in runs.records(run)[1:]:
        ids = federation.feed.cohort(record["round"] - 1)
        counted = counted_steps(population, federation.feed.steps, ids, record["round"] - 1)
        total += population.clock.seconds(record["round"] - 1, ids, population.ranks[ids], counted)[
            counted > 0
        ].max()
        assert record["clock/simulated_seconds"] == pytest.approx(total)
        assert record["clients/reported"] == (counted > 0).sum()
    assert (run / "figures" / "clock.png").is_file()

    whole = runs.results(run)
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "summary.json").unlink()
    runs.call(world, "train", run.with_suffix(".yaml"), "--run-dir", run)
    assert runs.results(run) == whole
    assert json.loads((run / "summary.json").read_text())["rounds"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation__devices": {}, "federation__clients_asked": None}, "federation.ranks: device needs"),
        ({"federation__ranks": "turn"}, "federation.round_deadline: found 0.29, but only ranks: device"),
        ({"federation__clients_asked": 3}, "federation.clients_asked: found 3, expected 4"),
        ({"federation__clients_asked": 13}, r"to 12 \(num_clients\)"),
        (
            {"federation__clients_per_round": None},
            "clients_asked: found 6 without federation.clients_per_round",
        ),
        ({"federation__devices__phone__gflop": 1}, "unknown setting federation.devices.phone.gflop"),
        (
            {"federation__round_deadline": 1e-6},
            "federation.devices.desktop: k = 1 takes .* s a round, more than .*round_deadline of 1e-06",
        ),
        (
            {"federation__devices__phone__memory_gb": 1e-9},
            "phone: k = 1 takes 0.000136 GB, more than its memory_gb of 1e-09",
        ),
    ],
)
def test_devices_that_do_not_fit(world, changes, words):
    with pytest.raises(UserError, match=words):
        set_up(make_config(runs.settings(world, **(json.loads(json.dumps(CHANGES)) | changes)), "test"))
