"""What clients hold, where they are many: tiers, packed rows, dropout, and one product with the frozen weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import (
    LENGTHS,
    PACKED,
    PADDED,
    assert_close,
    bert,
    grad,
    gradients,
    logits_of,
    make_batch,
    make_tier,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora_jax.errors import UserError
from fslora_jax.models.kernels import laid_out
from fslora_jax.types import Batch


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(LENGTHS))), room=st.integers(10, 16))
def test_order_of_rows_and_examples_is_free(order, room):
    model, base, tier = bert()
    rows, free = [[]], room
    for e in order:
        if LENGTHS[e] > free:
            rows, free = [*rows, []], room
        rows[-1].append(e)
        free -= LENGTHS[e]
    reference, logits = (logits_of(model, base, [tier], make_batch("bert", r)) for r in (PADDED, rows))
    assert_close(logits, reference, 1e-5)


def test_tiers_of_different_rank_equal_each_client_alone():
    model, base, _ = bert(lora_dropout=0.3)
    head = model.init_head(jax.random.key(0))
    modules = ["attention.self.query", "output.dense"]
    tiers = [make_tier(model, head, clients=c, k=k, seed=k, modules=modules) for c, k in ((2, 2), (1, 5))]
    batches = [make_batch("bert", rows) for rows in (PACKED, [[1, 2], [4], [0, 3]])]
    batch = jax.tree.map(lambda a, b: jnp.concatenate([a, b, a]), *batches)
    keys = jax.random.split(jax.random.key(0), 3)
    together, logits = gradients(model, base, tiers, batch, keys)
    for client, (tier, place) in enumerate([(0, 0), (0, 1), (1, 0)]):
        own = jax.tree.map(lambda leaf, p=place: leaf[p : p + 1], tiers[tier])
        mine = jax.tree.map(lambda leaf, p=place: leaf[p : p + 1], together[tier])
        one = jax.tree.map(lambda leaf, c=client: leaf[c : c + 1], (batch, keys))
        (alone,), logits_alone = gradients(model, base, [own], *one)
        assert_close(logits[client : client + 1], logits_alone, 1e-5)
        assert_close(mine, alone, 1e-5)


def test_layers_with_arrays_of_their_own_drop_what_a_loop_drops():
    """Also in the last one, of which only first tokens are asked."""
    model, base, tier = bert(2, lora_dropout=0.3, pooling="native")
    batch, keys = make_batch("bert", PACKED, clients=2), jax.random.split(jax.random.key(0), 2)
    expected = gradients(model, base, [tier], batch, keys)
    assert_close(gradients(model, laid_out(base, remat="none"), [tier], batch, keys), expected, 1e-5)


def test_dropout_is_on_the_adapters_input_only():
    model, base, _ = bert(lora_dropout=0.5)
    tier = make_tier(
        model, model.init_head(jax.random.key(1)), clients=2, k=3, modules=["intermediate.dense"]
    )
    batch, keys = make_batch("bert", PACKED, clients=2), jax.random.split(jax.random.key(0), 2)
    bare = tier._replace(weights=tier.weights._replace(adapter={}))
    assert_close(*(logits_of(model, base, [bare], batch, k) for k in (keys, None)), 0)
    off, on, again, swapped = (
        logits_of(model, base, [tier], batch, k) for k in (None, keys, keys, keys[::-1])
    )
    assert_close(again, on, 0)
    assert np.abs(on - off).max() > 1e-3
    assert np.abs(on - swapped).max() > 1e-3


def test_every_layer_drops_other_features():
    """Of one token: what is dropped has no gradient at the first factor."""
    model, base, _ = bert(lora_dropout=0.5)
    path = "intermediate.dense"
    tier = make_tier(model, model.init_head(jax.random.key(1)), clients=1, k=3, modules=[path])
    token, example = jnp.ones((1, 1, 1), int), jnp.ones((1, 1))
    batch = Batch(token, token, 0 * token, 0 * token, example.astype(int), example, token[..., :0])
    (found,), _ = gradients(model, base, [tier], batch, jax.random.split(jax.random.key(0), 1))
    kept = np.asarray(found.adapter[path].a[0] != 0).any(-2)
    assert kept.shape == (3, 16)
    assert len({tuple(layer) for layer in kept.tolist()}) == 3
    assert 0 < kept.sum() < kept.size


def test_frozen_products_merge_clients_and_base_has_no_gradient():
    clients = 5
    model, base, tier = bert(clients)
    batch = make_batch("bert", PACKED, clients=clients)
    args = ([tier.weights], model.apply, base, [tier], batch, None)
    text = grad.lower(*args).compile().as_text()
    rows = clients * batch.tokens[0].size
    # Six products forward and six backward, none repeated by the rematerialisation, each over all clients.
    wide = re.findall(rf"= f32\[{rows},(?:16|24)\]\S* dot\(", text)
    assert len(wide) == 12
    assert not re.search(rf"\[{clients},(?:1,|3,)?(?:16,16|16,24|24,16)\]", text), "a copy of a base weight"
    assert "scatter(" not in text, "a gradient of an embedding"


def test_unknown_or_unequal_modules_are_refused():
    model, base, tier = bert()
    adapter = tier.weights.adapter
    unknown = tier._replace(weights=tier.weights._replace(adapter={"query": adapter["output.dense"]}))
    fewer = tier._replace(weights=tier.weights._replace(adapter={"output.dense": adapter["output.dense"]}))
    for tiers in ([unknown], [tier, fewer], []):
        with pytest.raises(UserError, match=r"^adapter: .*at least one tier.*'attention\.self\.query'"):
            model.apply(base, tiers, make_batch("bert", PADDED))
