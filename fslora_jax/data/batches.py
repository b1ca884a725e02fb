"""Minibatches as pure functions: which examples a client sees when, and the arrays that hold them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Real

from fslora_jax.data import packing
from fslora_jax.data.tokens import TokenStore
from fslora_jax.errors import UserError
from fslora_jax.random import Purpose, host_rng
from fslora_jax.types import Batch

FILLER = -1
"""Stands for an example that is not there; it has no tokens and no weight."""


class BatchShape(NamedTuple):
    """The static shape of a batch: rows, tokens of a row, and predicted tokens of a row (0 with labels)."""

    rows: int
    row_length: int
    places: int


def stream(
    examples: Int[np.ndarray, " n"], seed: int, client: int, start: int, count: int
) -> Int[np.ndarray, " count"]:
    """Positions ``start`` to ``start + count`` of a client's endless stream of its ``examples``.

    The stream is one fresh permutation after another, so any window of it is found without its history.

    >>> window = stream(np.array([5, 6, 7]), 0, 0, 300, 6)
    >>> sorted(window[:3].tolist()), sorted(window[3:].tolist())
    ([5, 6, 7], [5, 6, 7])
    """
    n = len(examples)
    if n == 0:
        raise UserError(f"client {client} has no data; choose fewer clients or min_examples of 1")
    if n == 1:
        return np.repeat(examples, count)
    passes = range(start // n, (start + count) // n + 1)
    order = np.concatenate([host_rng(seed, Purpose.BATCH, client, i).permutation(n) for i in passes])
    return examples[order[start % n : start % n + count]]


def make_batch(
    store: TokenStore,
    labels: Real[np.ndarray, " n"],
    examples: Int[np.ndarray, "*lead E"],
    shape: BatchShape,
    pack: bool,
) -> Batch:
    """Lay the examples of each batch into rows, as NumPy arrays with the leading axes of ``examples``.

    With ``pack``, several share a row; else example ``e`` has row ``e``. ``shape_for`` tells the shape that it
    takes. Padding is token 0 of segment 0.
    """
    num_rows, row_length, num_places = shape
    *lead, num_examples = examples.shape
    chosen = examples.reshape(-1, num_examples)
    real = chosen != FILLER
    lengths = np.where(real, store.lengths_of(chosen), 0)
    rows = _rows(lengths, row_length, pack)
    if rows.max(initial=-1) >= num_rows:
        raise UserError(f"num_rows is {num_rows}, but a batch takes {rows.max() + 1} rows; use shape_for")
    first = (np.arange(len(chosen))[:, None] * num_rows + rows) * row_length + _starts(lengths, rows)

    count = lengths.ravel()
    source, within = _tokens_of(store, chosen, count)
    target = np.repeat(first.ravel(), count) + within
    segments = np.repeat(np.tile(np.arange(1, num_examples + 1), len(chosen)), count)
    cells = np.zeros((4, len(chosen) * num_rows * row_length), np.int32)
    cells[:, target] = store.tokens[source], segments, within, store.types[source]
    numbers = np.issubdtype(labels.dtype, np.floating)  # to predict; else classes
    kind = np.float32 if numbers else np.int32
    labels_of = np.where(real, labels[chosen], 0).astype(kind).reshape(examples.shape)
    weights = real.astype(np.float32).reshape(examples.shape)
    asked = target[store.learned[source] > 0] - 1  # a token is predicted at the one before it
    places = _places(asked, len(chosen) * num_rows, row_length, num_places).reshape(
        *lead, num_rows, num_places
    )
    return Batch._make((*cells.reshape(4, *lead, num_rows, row_length), labels_of, weights, places))


def shape_for(
    store: TokenStore, examples: Int[np.ndarray, "*lead E"], row_length: int, pack: bool
) -> BatchShape:
    """The smallest shape that holds any one of the batches."""
    lengths = np.where(examples != FILLER, store.lengths_of(examples), 0)
    rows = _rows(lengths, row_length, pack)
    batches = np.arange(rows.size) // rows.shape[-1]
    row_of = np.repeat(batches * rows.shape[-1] + rows.ravel(), lengths.ravel())
    by_row = np.bincount(row_of, weights=store.learned[_tokens_of(store, examples, lengths.ravel())[0]])
    return BatchShape(int(rows.max(initial=-1)) + 1, row_length, int(by_row.max(initial=0)))


def deal_out(
    store: TokenStore, examples: Int[np.ndarray, " m"], batch_examples: int, groups: int = 1
) -> Int[np.ndarray, "batches E"]:
    """Every example once, in batches of one size, as many for each of the ``groups``; fillers complete the last ones.

    Sorted by length and dealt out like cards, so that each batch has the same mix of lengths and takes as
    many rows as any other.
    """
    num_batches = -(-len(examples) // (batch_examples * groups)) * groups
    dealt = np.full((batch_examples, num_batches), FILLER)
    dealt.flat[: len(examples)] = examples[np.argsort(-store.lengths_of(examples), kind="stable")]
    return dealt.T


def _tokens_of(
    store: TokenStore, examples: Int[np.ndarray, "*lead E"], lengths: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Of each token of the examples in turn, its place in the store and in its example."""
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(store.offsets[examples].ravel(), lengths) + within, within


def _rows(lengths: Int[np.ndarray, "*lead E"], row_length: int, pack: bool) -> Int[np.ndarray, "*lead E"]:
    if pack:
        return packing.pack(lengths, row_length)
    packing.check_lengths(lengths, row_length)
    return np.broadcast_to(np.arange(lengths.shape[-1]), lengths.shape)


def _starts(lengths: Int[np.ndarray, "m E"], rows: Int[np.ndarray, "m E"]) -> Int[np.ndarray, "m E"]:
    earlier = np.tri(lengths.shape[-1], k=-1, dtype=bool)
    return np.einsum("mef,mf->me", (rows[:, :, None] == rows[:, None, :]) & earlier, lengths)


def _places(
    asked: Int[np.ndarray, " n"], num_rows: int, row_length: int, num_places: int
) -> Int32[np.ndarray, "rows T"]:
    """Flat cells as places within their rows, -1 where a row has fewer than ``num_places``."""
    rows, within = np.divmod(np.sort(asked), row_length)
    count = np.bincount(rows, minlength=num_rows)
    if count.max(initial=0) > num_places:
        raise UserError(f"a row asks for {count.max()} tokens, the shape has {num_places}; use shape_for")
    places = np.full((num_rows, num_places), -1, np.int32)
    places[rows, np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)] = within
    return places
