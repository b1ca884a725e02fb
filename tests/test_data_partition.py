"""Every example goes to exactly one client, whatever the numbers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.data.partition import (
    LISTED,
    PARTITIONS,
    Partition,
    check_partition,
    describe,
    dirichlet,
    iid,
    label_counts,
    natural,
    quantity,
    shards,
)
from fslora_jax.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)


def check_cover(partition, num_clients, n):
    assert len(partition) == num_clients
    assert sorted(np.concatenate(partition).tolist()) == list(range(n))
    assert all((np.diff(share) > 0).all() for share in partition)
    assert partition.sizes.tolist() == list(map(len, partition))
    assert partition.owners.tolist() == [c for c, share in enumerate(partition) for _ in share]


@given(seed=SEEDS, n=st.integers(1, 60), data=st.data())
def test_iid_covers_evenly(seed, n, data):
    num_clients = data.draw(st.integers(1, n))
    partition = iid(np.zeros(n, np.int32), num_clients, np.random.default_rng(seed))
    check_cover(partition, num_clients, n)
    assert max(map(len, partition)) - min(map(len, partition)) <= 1


@given(
    seed=SEEDS,
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    alpha=st.floats(1e-4, 1e6),
    min_examples=st.integers(0, 5),
    data=st.data(),
)
def test_dirichlet_covers_and_keeps_the_floor(seed, labels, alpha, min_examples, data):
    num_clients = data.draw(st.integers(1, max(1, len(labels) // max(1, min_examples))))
    floor = min(min_examples, len(labels) // num_clients)
    partition = dirichlet(np.array(labels), num_clients, alpha, np.random.default_rng(seed), floor)
    check_cover(partition, num_clients, len(labels))
    assert min(map(len, partition)) >= floor


def filled_up(labels, num_clients, alpha, rng, floor):
    """The rule of the floor as its words say it: gift by gift, over lists."""
    shares = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, cuts.astype(int)), strict=True):
            share.extend(part.tolist())
    for share in shares:
        while len(share) < floor:
            most = max(shares, key=len)
            share.append(most.pop(rng.integers(len(most))))
    return [sorted(share) for share in shares]


@given(
    seed=SEEDS,
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    alpha=st.sampled_from([0.01, 0.1, 1.0]),
    floor=st.integers(0, 6),
    data=st.data(),
)
def test_the_floor_is_filled_gift_by_gift(seed, labels, alpha, floor, data):
    num_clients = data.draw(st.integers(1, max(1, len(labels) // max(1, floor))))
    floor = min(floor, len(labels) // num_clients)
    rngs = np.random.default_rng(seed), np.random.default_rng(seed)
    found = dirichlet(np.array(labels), num_clients, alpha, rngs[0], floor)
    assert [share.tolist() for share in found] == filled_up(
        np.array(labels), num_clients, alpha, rngs[1], floor
    )
    assert rngs[0].integers(2**60) == rngs[1].integers(2**60)


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
def test_a_large_population_with_a_floor(name):
    clients, labels = 100_000, np.random.default_rng(0).integers(0, 3, 250_000)
    partition = PARTITIONS[name](labels, clients, alpha=0.1, rng=np.random.default_rng(0), min_examples=2)
    assert (np.bincount(partition.examples, minlength=len(labels)) == 1).all()
    assert partition.sizes.min() == 2
    assert partition.sizes.sum() == len(labels)
    listed = describe(label_counts(labels, partition, 3), "abc")["clients"]
    assert len(listed) == LISTED
    assert sum(listed[5].values()) == partition.sizes[5]


@pytest.mark.parametrize(
    ("name", "options"), [("iid", {}), ("quantity", {"alpha": 100}), ("dirichlet", {"alpha": 1e6})]
)
def test_proportions_converge_to_those_of_the_data(name, options):
    labels = np.arange(200_000) % 4 % 3
    partition = PARTITIONS[name](labels, 5, rng=np.random.default_rng(0), **options)
    assert describe(label_counts(labels, partition, 3), "abc")["label_skew"] < 0.006


def test_alpha_is_the_skew():
    labels = np.repeat(np.arange(4), 1000)

    def skew(alpha: float) -> float:
        counts = label_counts(labels, dirichlet(labels, 10, alpha, np.random.default_rng(0), 0), 4)
        return float(np.square(counts / 1000).sum(1).sum() / 4)

    assert skew(0.01) > 0.6
    assert skew(1e6) == pytest.approx(0.1, abs=2e-3)


def test_the_mean_squared_share_is_that_of_a_dirichlet():
    # For p ~ Dirichlet(alpha) over n clients, E sum p^2 = (1 + alpha) / (1 + n alpha).
    labels = np.repeat(np.arange(200), 100)
    counts = label_counts(labels, dirichlet(labels, 5, 0.5, np.random.default_rng(0), 0), 200)
    assert np.square(counts / 100).sum(0).mean() == pytest.approx(1.5 / 3.5, abs=0.03)
    assert counts.sum(1) / 20_000 == pytest.approx(np.full(5, 0.2), abs=0.04)


@pytest.mark.parametrize("name", sorted(PARTITIONS.keys() - {"natural"}))  # a function of its labels alone
def test_a_partition_is_a_function_of_its_generator(name):
    labels = np.arange(90) % 3
    options = {"shards": {"shards_per_client": 2}, "iid": {}}.get(name, {"alpha": 0.5})
    first, again, other = (
        PARTITIONS[name](labels=labels, num_clients=5, rng=np.random.default_rng(seed), **options)
        for seed in (0, 0, 1)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, other, strict=True))


@given(SEEDS)
def test_label_counts_agree_with_a_loop(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 20)
    partition = iid(labels, 4, rng)
    counts = label_counts(labels, partition, 5)
    assert counts.tolist() == [[sum(labels[share] == label) for label in range(5)] for share in partition]


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e300, float("nan")])
def test_a_bad_alpha(alpha):
    with pytest.raises(UserError, match=re.escape(f"alpha is {alpha}; expected above 0 to 1e6")):
        dirichlet(np.arange(4) % 2, 2, alpha, np.random.default_rng(0))


def test_too_few_examples():
    labels = np.arange(9) % 2
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"num_clients 5 with min_examples 2 needs 10 examples, but .* has 9"):
        dirichlet(labels, 5, 0.1, rng, 2)
    with pytest.raises(UserError, match="num_clients 10 with min_examples 1 needs 10 examples"):
        iid(labels, 10, rng)
    with pytest.raises(UserError, match="num_clients 0, min_examples 1: expected at least 1"):
        iid(labels, 0, rng)


def test_a_client_without_data_is_named():
    check_partition(Partition.of([np.array([0]), np.array([1])]))
    with pytest.raises(UserError, match=r"client 1 has no data \(2 of 3 clients\)"):
        check_partition(Partition.of([np.array([0, 1]), np.array([], int), np.array([], int)]))


@given(seed=SEEDS, labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), data=st.data())
def test_shards_cover_and_hold_few_labels(seed, labels, data):
    num_clients = data.draw(st.integers(1, len(labels)))
    each = data.draw(st.integers(1, len(labels) // num_clients))
    partition = shards(np.array(labels), num_clients, each, np.random.default_rng(seed))
    check_cover(partition, num_clients, len(labels))
    # A shard of equal labels has one; each border between two labels lies within one shard.
    held = sum(len(set(np.array(labels)[share])) for share in partition)
    assert held <= num_clients * each + len(set(labels)) - 1
    assert max(map(len, partition)) - min(map(len, partition)) <= each


@given(seed=SEEDS, n=st.integers(1, 60), alpha=st.floats(1e-2, 1e6), floor=st.integers(0, 3), data=st.data())
def test_quantity_skews_the_sizes_and_keeps_the_floor(seed, n, alpha, floor, data):
    num_clients = data.draw(st.integers(1, max(1, n // max(1, floor))))
    floor = min(floor, n // num_clients)
    partition = quantity(np.zeros(n, int), num_clients, alpha, np.random.default_rng(seed), floor)
    check_cover(partition, num_clients, n)
    assert min(map(len, partition)) >= floor


def test_quantity_leaves_the_labels_alone():
    labels = np.arange(20_000) % 2
    counts = label_counts(labels, quantity(labels, 5, 1.0, np.random.default_rng(0)), 2)
    assert np.ptp(counts.sum(1)) > 1000
    assert (counts / counts.sum(1, keepdims=True))[:, 0] == pytest.approx(np.full(5, 0.5), abs=0.05)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_natural_clients_are_the_labels(labels):
    owners = np.array(labels)
    partition = natural(owners, len(set(labels)), np.random.default_rng(0))
    check_cover(partition, len(set(labels)), len(labels))
    assert [set(owners[share]) for share in partition] == [{owner} for owner in sorted(set(labels))]


def test_natural_clients_that_do_not_fit():
    owners, rng = np.array([0, 0, 1, 1, 2]), np.random.default_rng(0)
    with pytest.raises(UserError, match=r"num_clients is 2, but the column names 3 clients .*; set it to 3"):
        natural(owners, 2, rng)
    with pytest.raises(UserError, match="2 clients with at least 2 examples, of 3 in all; set it to 2"):
        natural(owners, 3, rng, 2)


def test_small_natural_clients_are_left_out():
    partition = natural(np.array([2, 0, 1, 2, 0]), 2, np.random.default_rng(0), 2)
    assert [share.tolist() for share in partition] == [[1, 4], [0, 3]]


def test_a_description_counts_and_measures():
    found = describe(np.array([[3, 1], [0, 4]]), ["a", "b"])
    assert found["clients"] == [{"a": 3, "b": 1}, {"a": 0, "b": 4}]
    assert found["examples"] == {"least": 4, "median": 4.0, "most": 4}
    assert found["label_skew"] == pytest.approx(3 / 8)
