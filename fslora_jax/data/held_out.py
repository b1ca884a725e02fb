"""Held-out examples as batches, with what is needed to put the answers back in order and to compare options."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, Real

from fslora_jax.data.batches import deal_out, make_batch, shape_for
from fslora_jax.data.examples import Examples
from fslora_jax.data.tokens import TokenStore
from fslora_jax.types import Batch

BATCH = 64
"""Examples of an evaluation batch."""


class HeldOut(NamedTuple):
    """Equally shaped batches on a leading axis; ``slots`` says which row each place of each holds, -1 none.

    A row is an example, or one of its options: ``owner`` is the example and ``right`` says that the option is
    the right one. ``labels`` and ``groups`` (empty where there are none) are the rows'. ``truncated`` counts the rows
    that were too long.
    """

    batches: Batch
    slots: Int[np.ndarray, "batches E"]
    owner: Int[np.ndarray, " rows"]
    right: Bool[np.ndarray, " rows"]
    labels: Real[np.ndarray, " rows"]
    groups: tuple[str, ...]
    truncated: int = 0


def each_option(examples: Examples) -> tuple[Examples, Int[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
    """A row for each option of each example, whose example it is, and whether it is the right one.

    Examples without options are their own rows.
    """
    n = len(examples.labels)
    if not examples.options:
        return examples, np.arange(n), np.ones(n, bool)
    prompts, completions = examples.texts
    owner = np.repeat(np.arange(n), [len(options) for options in examples.options])
    chosen = [option for options in examples.options for option in options]
    right = np.array([option == completions[i] for option, i in zip(chosen, owner, strict=True)])
    groups = tuple(examples.groups[i] for i in owner) if examples.groups else ()
    texts = [prompts[i] for i in owner], chosen
    return examples._replace(texts=texts, labels=examples.labels[owner], groups=groups), owner, right


def hold_out(
    store: TokenStore,
    rows: Examples,
    owner: Int[np.ndarray, " rows"],
    right: Bool[np.ndarray, " rows"],
    row_length: int,
    pack: bool,
    groups: int = 1,
) -> HeldOut:
    """Every row once, in batches; ``rows``, ``owner`` and ``right`` as ``each_option`` has them.

    So many ``groups`` of devices can share the batches.
    """
    slots = deal_out(store, np.arange(len(owner)), min(BATCH, -(-len(owner) // groups)), groups)
    shape = shape_for(store, slots, row_length, pack)
    batches = [make_batch(store, rows.labels, chosen, shape, pack) for chosen in slots]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    return HeldOut(stacked, slots, owner, right, rows.labels, rows.groups, store.truncated)
