"""A batch gives each example back exactly; a window of a stream needs no history."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora_jax.data.batches import FILLER, BatchShape, deal_out, make_batch, shape_for, stream
from fslora_jax.data.tokens import TokenStore
from fslora_jax.errors import UserError
from fslora_jax.types import Batch

SEEDS = st.integers(0, 2**32 - 1)
LENGTH = 12


def random_store(seed: int, n: int = 30) -> tuple[TokenStore, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, n)
    total = lengths.sum()
    tokens, types = rng.integers(0, 99, total).astype(np.int32), rng.integers(0, 2, total).astype(np.int8)
    return TokenStore(tokens, np.append(0, np.cumsum(lengths)), types, 0 * types), rng.integers(1, 4, n)


def check_batch(batch: Batch, store: TokenStore, labels: np.ndarray, examples: np.ndarray) -> None:
    """Each example of one batch lies whole and in order in one row, and there is nothing else."""
    for e, example in enumerate(examples):
        row, column = np.nonzero(batch.segments == e + 1)
        where = slice(store.offsets[example], store.offsets[example + 1])
        real = example != FILLER
        length = store.lengths[example] if real else 0
        assert len(set(row)) == real
        assert column.tolist() == list(range(column[0], column[0] + length)) if real else not len(column)
        assert batch.positions[row, column].tolist() == list(range(length))
        if real:
            assert (batch.tokens[row, column] == store.tokens[where]).all()
            assert (batch.types[row, column] == store.types[where]).all()
        assert batch.labels[e] == (labels[example] if real else 0)
        assert batch.weights[e] == real
    padding = np.asarray(batch.segments) == 0
    assert padding.sum() == padding.size - store.lengths[examples[examples != FILLER]].sum()
    for cells in (batch.tokens, batch.positions, batch.types):
        assert not np.asarray(cells)[padding].any()


@given(seed=SEEDS, pack=st.booleans(), slack=st.integers(0, 2), numbers=st.booleans())
def test_a_batch_gives_each_example_back(seed, pack, slack, numbers):
    store, labels = random_store(seed)
    labels = (labels / 4).astype(np.float32) if numbers else labels
    examples = np.random.default_rng(seed).integers(FILLER, 30, (2, 3, 7))
    shape = shape_for(store, examples, LENGTH, pack)
    shape = shape._replace(rows=shape.rows + slack)
    batch = make_batch(store, labels, examples, shape, pack)
    assert batch.tokens.shape == (2, 3, shape.rows, LENGTH)
    kind = np.float32 if numbers else np.int32
    assert [a.dtype for a in batch] == [np.int32] * 4 + [kind, np.float32, np.int32]
    for index in np.ndindex(2, 3):
        check_batch(Batch._make(part[index] for part in batch), store, labels, examples[index])


def test_without_packing_an_example_has_its_own_row():
    store, labels = random_store(0)
    batch = make_batch(store, labels, np.arange(5), BatchShape(5, LENGTH, 0), False)
    segments = np.asarray(batch.segments)
    assert segments[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert ((segments > 0).sum(1) == store.lengths[:5]).all()


@given(SEEDS)
def test_packing_takes_no_more_rows(seed):
    store, _ = random_store(seed)
    examples = np.random.default_rng(seed).integers(0, 30, (4, 6))
    assert (
        shape_for(store, examples, LENGTH, True).rows <= shape_for(store, examples, LENGTH, False).rows == 6
    )


@pytest.mark.parametrize("pack", [True, False])
def test_an_example_longer_than_a_row(pack):
    store = TokenStore(np.ones(9, np.int32), np.array([0, 3, 9]), *np.zeros((2, 9), np.int8))
    with pytest.raises(UserError, match="row_length is 5, but an example has 6 tokens"):
        make_batch(store, np.zeros(2, int), np.array([0, 1]), BatchShape(2, 5, 0), pack)


@pytest.mark.parametrize("pack", [True, False])
def test_too_few_rows(pack):
    store = TokenStore(np.ones(9, np.int32), np.array([0, 3, 9]), *np.zeros((2, 9), np.int8))
    with pytest.raises(UserError, match="num_rows is 1, but a batch takes 2 rows"):
        make_batch(store, np.zeros(2, int), np.array([0, 1]), BatchShape(1, 8, 0), pack)


@given(SEEDS, st.integers(1, 30), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_evaluation_sees_every_example_once(seed, n, batch_examples, groups, pack):
    store, _ = random_store(seed)
    examples = np.random.default_rng(seed).permutation(30)[:n]
    unique = np.arange(100, 130)  # labels that tell the examples apart
    dealt = deal_out(store, examples, batch_examples, groups)
    shape = shape_for(store, dealt, LENGTH, pack)
    batches = [make_batch(store, unique, chosen, shape, pack) for chosen in dealt]
    assert len({tuple(a.shape for a in batch) for batch in batches}) == 1
    assert len(batches) == groups * -(-n // (groups * batch_examples))
    seen = np.concatenate([np.asarray(b.labels)[np.asarray(b.weights) > 0] for b in batches])
    assert sorted(seen.tolist()) == sorted((100 + examples).tolist())
    for batch in batches:
        chosen = np.where(np.asarray(batch.weights) > 0, np.asarray(batch.labels) - 100, FILLER)
        check_batch(batch, store, unique, chosen)


@given(SEEDS, st.booleans(), st.integers(0, 3))
def test_a_language_model_is_asked_for_every_learned_token_once(seed, pack, slack):
    store, labels = random_store(seed)
    rng = np.random.default_rng(seed)
    learned = rng.integers(0, 2, len(store.tokens)).astype(np.int8)
    learned[store.offsets[:-1]] = 0
    store = store._replace(learned=learned, tokens=np.arange(len(learned), dtype=np.int32))
    examples = rng.permutation(30)[:8].reshape(2, 4)
    shape = shape_for(store, examples, LENGTH, pack)
    batch = make_batch(store, labels, examples, shape._replace(places=shape.places + slack), pack)
    asked = []
    for tokens, segments, places in zip(batch.tokens, batch.segments, batch.places, strict=True):
        for b, row in enumerate(places):
            assert (np.diff(row[row >= 0]) > 0).all()
            asked += tokens[b, row[row >= 0] + 1].tolist()
            assert (segments[b, row[row >= 0]] == segments[b, row[row >= 0] + 1]).all()
    expected = [t for e in examples.flat for t in range(*store.offsets[e : e + 2]) if learned[t]]
    assert sorted(asked) == sorted(expected)
    if shape.places:
        with pytest.raises(UserError, match="use shape_for"):
            make_batch(store, labels, examples, shape._replace(places=shape.places - 1), pack)


def test_evaluation_of_nothing_has_no_batches():
    store, _ = random_store(0)
    assert deal_out(store, np.zeros(0, int), 4).shape == (0, 4)


def test_dealing_fills_the_rows():
    # In the given order, one of the ten batches would get everything that is long.
    lengths = np.where(np.arange(500) % 10 == 0, 120, 8)
    total = lengths.sum()
    store = TokenStore(
        np.ones(total, np.int32), np.append(0, np.cumsum(lengths)), *np.zeros((2, total), np.int8)
    )
    dealt = deal_out(store, np.arange(500), 50)
    shape = shape_for(store, dealt, 128, True)
    batches = [make_batch(store, np.zeros(500, int), chosen, shape, True) for chosen in dealt]
    assert min(map(fill, batches)) > 0.9


def test_fill_counts_real_tokens():
    store = TokenStore(np.zeros(6, np.int32), np.array([0, 2, 6]), *np.zeros((2, 6), np.int8))
    assert fill(make_batch(store, np.zeros(2, int), np.array([0, 1]), BatchShape(2, 6, 0), False)) == 0.5
    assert fill(make_batch(store, np.zeros(2, int), np.array([0, 1]), BatchShape(1, 6, 0), True)) == 1.0


def fill(batch) -> float:
    """The part of the batch that is tokens of examples, not padding."""
    return float(np.mean(batch.segments > 0))


@given(SEEDS, st.integers(0, 50), st.integers(1, 9), st.integers(0, 40), st.integers(0, 30))
def test_a_window_is_a_part_of_one_long_stream(seed, client, n, start, count):
    examples = np.random.default_rng(seed).permutation(100)[:n]
    whole = stream(examples, seed, client, 0, 80)
    assert stream(examples, seed, client, start, count).tolist() == whole[start : start + count].tolist()
    for i in range(80 // n):
        assert sorted(whole[i * n : (i + 1) * n].tolist()) == sorted(examples.tolist())


def test_streams_differ_by_pass_client_and_seed():
    examples = np.arange(50)
    streams = [stream(examples, *path, 50) for path in ((0, 0, 0), (0, 0, 50), (0, 1, 0), (1, 0, 0))]
    assert len({tuple(s.tolist()) for s in streams}) == 4


def test_a_client_without_data_has_no_stream():
    with pytest.raises(UserError, match="client 3 has no data"):
        stream(np.zeros(0, int), 0, 3, 0, 4)
