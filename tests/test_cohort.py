"""Who takes part and where each client sits, for any ranks, cohort size and number of lanes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.federation.cohort import EMPTY, Layout, place, plan_layout, sample_cohort
from fslora_jax.federation.feed import dealt

SEEDS = st.integers(0, 2**31)


@given(seed=SEEDS, clients=st.integers(1, 30), data=st.data())
def test_a_cohort_is_a_sorted_set_of_clients(seed, clients, data):
    size = data.draw(st.integers(1, clients))
    cohort = sample_cohort(seed, 3, clients, size)
    assert len(cohort) == size
    assert (np.diff(cohort) > 0).all()
    assert 0 <= cohort[0] <= cohort[-1] < clients
    assert (cohort == sample_cohort(seed, 3, clients, size)).all()


def test_every_client_takes_part_as_often():
    rounds, clients, size = 4000, 10, 3
    cohorts = np.array([sample_cohort(0, t, clients, size) for t in range(rounds)])
    share = np.bincount(cohorts.ravel()) / rounds
    assert abs(share - size / clients).max() < 5 * np.sqrt(0.3 * 0.7 / rounds)
    assert (sample_cohort(1, 0, 100, 50) != sample_cohort(2, 0, 100, 50)).any()


@st.composite
def populations(draw):
    clients = draw(st.integers(1, 25))
    r = draw(st.sampled_from([8, 64]))
    ranks = np.array(draw(st.lists(st.integers(1, r), min_size=clients, max_size=clients)))
    size = draw(st.integers(1, clients))
    seed = draw(SEEDS)
    cohorts = [sample_cohort(seed, t, clients, size) for t in range(4)]
    return r, ranks, cohorts


@given(
    population=populations(),
    groups=st.integers(1, 3),
    chunks=st.integers(1, 3),
    tiered=st.booleans(),
    most=st.integers(1, 8),
)
def test_one_layout_seats_every_cohort(population, groups, chunks, tiered, most):
    r, ranks, cohorts = population
    layout = plan_layout(ranks, cohorts, r=r, tiered=tiered, groups=groups, chunks=chunks, max_tiers=most)
    chunks = min(chunks, -(-len(cohorts[0]) // groups))
    assert len(layout.caps) == -(-len(cohorts[0]) // (groups * chunks))
    assert sorted(layout.caps, reverse=True) == list(layout.caps)
    assert max(layout.caps) <= r
    assert len(layout.tiers) == len(set(layout.caps)) <= (most if tiered else 1)
    assert sum(count for _, count in layout.tiers) == len(layout.caps)
    if not tiered:
        assert set(layout.caps) == {r}
    for cohort in cohorts:
        own, loads = ranks[cohort], np.random.default_rng(len(cohort)).integers(0, 9, len(cohort))
        seats = place(own, loads, layout)
        taken = seats != EMPTY
        assert seats.shape == (groups * chunks, len(layout.caps))
        assert sorted(seats[taken]) == list(range(len(cohort)))
        assert (np.where(taken, own[seats], 0) <= np.array(layout.caps)).all()
        assert_tiers_by_load(np.where(taken, loads[seats], -1), layout)


def assert_tiers_by_load(loads, layout):
    """Lane by lane a tier's loads fall, so that lanes hold what is alike, and the first ones most."""
    start = 0
    for _, count in layout.tiers:
        assert (np.diff(loads[:, start : start + count].ravel()) <= 0).all()
        start += count


@given(population=populations(), chunks=st.integers(1, 6))
def test_slots_are_no_larger_than_needed(population, chunks):
    """Without rounding, each cap is the rank of some client of the population; one cohort on one lane fits exactly."""
    r, ranks, cohorts = population
    layout = plan_layout(ranks, cohorts, r=r, tiered=True, chunks=chunks, max_tiers=r)
    assert set(layout.caps) <= set(ranks.tolist())
    alone = plan_layout(ranks, cohorts[:1], r=r, tiered=True, max_tiers=r)
    assert list(alone.caps) == sorted(ranks[cohorts[0]], reverse=True)
    own = ranks[cohorts[0]]
    assert (own[place(own, own, alone)[0]] == alone.caps).all()


@pytest.mark.parametrize(
    ("ranks", "most", "tiers"),
    [
        ([8, 16, 32, 48], 3, ((48, 1), (32, 1), (16, 2))),
        ([8, 16, 32, 48], 1, ((48, 4),)),
        ([1, 2, 2, 2, 2, 4], 2, ((4, 1), (2, 5))),
        ([1, 2, 7, 7, 8], 2, ((8, 3), (2, 2))),
    ],
)
def test_tiers_become_one_where_that_adds_the_least_rank(ranks, most, tiers):
    everybody = np.arange(len(ranks))
    layout = plan_layout(np.array(ranks), [everybody], r=64, tiered=True, max_tiers=most)
    assert layout.tiers == tiers


def test_no_group_has_more_chunks_than_clients():
    layout = plan_layout(np.array([2, 4, 8, 8, 8]), [np.arange(5)], r=8, tiered=True, groups=2, chunks=99)
    assert layout == ((8,), 2, 3)


def test_a_layout_for_one_cohort_need_not_hold_another():
    ranks = np.array([1, 1, 8])
    layout = plan_layout(ranks, [np.array([0, 1])], r=8, tiered=True)
    assert layout.caps == (1, 1)
    assert ranks[1:][place(ranks[1:], np.ones(2, int), layout)].max() > max(layout.caps)


@pytest.mark.parametrize(("size", "lanes"), [(5, 2), (3, 8), (1, 1), (8, 4)])
def test_empty_slots_are_the_last_ones(size, lanes):
    layout = Layout((size,) * -(-size // lanes), groups=lanes)
    seats = place(np.full(size, size), np.arange(size), layout).ravel()
    assert seats.tolist() == [*range(size - 1, -1, -1), *[EMPTY] * (seats.size - size)]


def test_like_clients_share_a_lane_and_groups_of_devices_share_the_work():
    ranks, loads = np.array([8, 8, 8, 8, 4, 4, 4, 4]), np.array([1, 7, 6, 2, 9, 3, 8, 2])
    layout = Layout((8, 4), groups=2, chunks=2)
    seats = place(ranks, loads, layout)
    assert loads[seats].tolist() == [[7, 9], [6, 8], [2, 3], [1, 2]]
    by_group = dealt(loads[seats], groups=2)
    assert by_group.tolist() == [[[7, 9], [1, 2]], [[6, 8], [2, 3]]]
