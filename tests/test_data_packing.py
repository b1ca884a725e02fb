"""First-fit decreasing against a naive loop and against the true optimum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.data.packing import pack
from fslora_jax.errors import UserError

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=24)


def naive(lengths: list[int], row_length: int) -> list[int]:
    free, rows = [], [0] * len(lengths)
    for example in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        fits = [row for row, room in enumerate(free) if room >= lengths[example]]
        if not fits:
            fits = [len(free)]
            free.append(row_length)
        rows[example] = fits[0]
        free[fits[0]] -= lengths[example]
    return rows


def optimum(lengths: list[int], row_length: int) -> int:
    """The fewest rows, by trying every choice of a row for each example (the next empty row once)."""

    def search(rest: list[int], free: list[int]) -> int:
        if not rest:
            return len(free)
        choices = [i for i, room in enumerate(free) if room >= rest[0]]
        tried = [search(rest[1:], [*free[:i], free[i] - rest[0], *free[i + 1 :]]) for i in choices]
        return min([*tried, search(rest[1:], [*free, row_length - rest[0]])])

    return search(sorted(lengths, reverse=True), [])


def rows_needed(lengths, row_length):
    return pack(lengths, row_length).max(initial=-1) + 1


@given(LENGTHS, st.integers(20, 50))
def test_packing_is_first_fit_decreasing_and_never_overfills(lengths, row_length):
    rows = pack(np.array(lengths), row_length)
    assert rows.tolist() == naive(lengths, row_length)
    assert np.bincount(rows, weights=lengths).max() <= row_length
    assert -(-sum(lengths) // row_length) <= rows.max() + 1 <= len(lengths)
    assert rows_needed(np.array(lengths), row_length) == rows.max() + 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7))
def test_packing_is_close_to_the_optimum(lengths):
    best = optimum(lengths, 20)
    assert best <= rows_needed(np.array(lengths), 20) <= 11 / 9 * best + 6 / 9


@given(st.integers(0, 2**32 - 1))
def test_batches_are_packed_independently(seed):
    lengths = np.random.default_rng(seed).integers(0, 21, (3, 2, 9))
    rows = pack(lengths, 20)
    assert rows.shape == lengths.shape
    for index in np.ndindex(3, 2):
        assert (rows[index] == pack(lengths[index], 20)).all()
    assert rows_needed(lengths, 20) == max(rows_needed(lengths[index], 20) for index in np.ndindex(3, 2))


def test_no_batches_need_no_rows():
    assert rows_needed(np.zeros((0, 4), int), 8) == 0


def test_an_example_longer_than_a_row():
    with pytest.raises(UserError, match="row_length is 8, but an example has 9 tokens"):
        pack(np.array([3, 9]), 8)
