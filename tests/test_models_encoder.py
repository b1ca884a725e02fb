"""Encoders against transformers, torch and PEFT; what packing, tiers and dropout may and may not change."""

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mpnet import modeling_mpnet

from fslora_jax import lora
from fslora_jax.errors import UserError
from fslora_jax.models import attention, build_model, encoder, family, layers, load_model
from fslora_jax.types import Batch, Local, Pair, Trainable

LENGTHS = (7, 3, 5, 4, 10)
LABELS = (0, 2, 1, 1, 0)
PADDED = [[0], [1], [2], [3], [4]]
PACKED = [[0, 1], [2, 3], [4]]
PADDED_BY_ONE = ("roberta", "xlm-roberta", "mpnet")
"""Families whose padding is token 1, and whose positions start behind it."""
RNG = np.random.default_rng(0)
TOKENS = [RNG.integers(3, 50, n) for n in LENGTHS]


def types_of(family, n):
    """Two texts for BERT; the others have one token type, or none."""
    return (np.arange(n) > n // 2).astype(int) * (family == "bert")


def make_batch(family, rows, clients=1, shape=(5, 16), examples=7):
    """The examples named by ``rows``, one list a row; rows and examples are filled up to one shape for all."""
    tokens, segments, positions, types = np.zeros((4, *shape), int)
    tokens += family in PADDED_BY_ONE
    for b, row in enumerate(rows):
        start = 0
        for e in row:
            here = slice(start, start := start + LENGTHS[e])
            tokens[b, here], segments[b, here] = TOKENS[e], e + 1
            positions[b, here], types[b, here] = np.arange(LENGTHS[e]), types_of(family, LENGTHS[e])
    labels = np.resize(LABELS, examples)
    weights = (np.arange(examples) < len(LENGTHS)).astype(np.float32)
    batch = Batch(tokens, segments, positions, types, labels, weights, np.zeros((shape[0], 0), int))
    return jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * clients)), batch)


def make_tier(model, head, clients, k, seed=0, modules=None):
    """Random non-zero factors, different for each client; every client has the same head."""
    rng = np.random.default_rng(seed)
    targets = {path: model.modules[path] for path in (model.modules if modules is None else modules)}

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape, scale=0.2).astype(np.float32))

    adapter = {
        p: Pair(normal(clients, t.layers, k, t.i), normal(clients, t.layers, k, t.o))
        for p, t in targets.items()
    }
    scale = {p: jnp.abs(normal(clients, t.layers, k)) * 4 for p, t in targets.items()}
    heads = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), head)
    return Local(Trainable(adapter, heads), scale, scale, {})


def loss_and_logits(weights, apply, base, tiers, batch, dropout):
    """The sum over clients of their mean cross-entropy over real examples."""
    tiers = [tier._replace(weights=w) for tier, w in zip(tiers, weights, strict=True)]
    logits = apply(base, tiers, batch, dropout)
    logp = (jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.labels, logits.shape[-1])).sum(-1)
    return -((logp * batch.weights).sum(-1) / batch.weights.sum(-1)).sum(), logits


grad = jax.jit(jax.grad(loss_and_logits, has_aux=True), static_argnames="apply")


def gradients(model, base, tiers, batch, dropout=None):
    """Gradients of all that clients train, by tier, and the logits."""
    return grad([tier.weights for tier in tiers], model.apply, base, tiers, batch, dropout)


def logits_of(model, base, tiers, batch, dropout=None):
    return jax.jit(model.apply)(base, tiers, batch, dropout)


def assert_close(got, want, tolerance):
    """Every leaf, relative to the largest value of that leaf."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-6), jax.tree_util.keystr(path)


def torch_logits(tiny, hf):
    """The logits of all examples, each alone in its row with padding masked."""
    mask = torch.tensor([[float(i < n) for i in range(10)] for n in LENGTHS])
    ids = torch.full(mask.shape, tiny.hf.config.pad_token_id)
    types = torch.zeros_like(ids)
    for e, n in enumerate(LENGTHS):
        ids[e, :n], types[e, :n] = torch.tensor(TOKENS[e]), torch.tensor(types_of(tiny.family, n))
    inputs = {"token_type_ids": types} if tiny.family == "bert" else {}
    logits = hf(input_ids=ids, attention_mask=mask, **inputs).logits
    if tiny.pooling == "mean":
        return (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return logits


def plain(tiny):
    return make_tier(tiny.model, tiny.head, clients=1, k=1, modules=[])


def test_logits_equal_transformers(tiny):
    logits = logits_of(tiny.model, tiny.base, [plain(tiny)], make_batch(tiny.family, PADDED))
    with torch.no_grad():
        expected = torch_logits(tiny, tiny.hf).numpy()
    assert np.abs(expected).max() > 0.5
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0, :5], expected, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"
)  # peft calls transformers' alias
def test_lora_gradients_equal_torch_and_peft(tiny):
    k, alpha = 3, 6.0
    tier = make_tier(tiny.model, tiny.head, clients=1, k=k)
    factor = lora.lora_scale(k, alpha, use_rslora=True)
    tier = tier._replace(scale=jax.tree.map(lambda leaf: jnp.full_like(leaf, factor), tier.scale))
    config = peft.LoraConfig(
        r=k,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=True,
        target_modules=list(tiny.model.modules),
        task_type=tiny.model.naming.task_type,
    )
    assert type(tiny.hf).__name__ == tiny.model.naming.architecture
    wrapped = peft.get_peft_model(copy.deepcopy(tiny.hf), config).eval()
    values = dict(wrapped.named_parameters())

    def factors(path, layer):
        prefix = f"base_model.model.{tiny.model.naming.layer_prefix.format(layer=layer)}{path}.lora_"
        return values[f"{prefix}A.default.weight"], values[f"{prefix}B.default.weight"]

    for path, pair in tier.weights.adapter.items():
        for layer in range(pair.a.shape[1]):
            a, b = factors(path, layer)
            a.data = torch.tensor(np.asarray(pair.a[0, layer]))
            b.data = torch.tensor(np.asarray(pair.b[0, layer].T))
    torch.nn.functional.cross_entropy(torch_logits(tiny, wrapped), torch.tensor(LABELS)).backward()

    (got,), _ = gradients(tiny.model, tiny.base, [tier], make_batch(tiny.family, PACKED))
    for path, pair in got.adapter.items():
        for layer in range(pair.a.shape[1]):
            a, b = (leaf.grad.numpy() for leaf in factors(path, layer))
            assert np.abs(a).max() > 1e-5
            assert_close(Pair(pair.a[0, layer], pair.b[0, layer]), Pair(a, b.T), 2e-4)
    for module, leaves in got.head.items():
        top, dot, rest = module.partition(".")
        prefix = f"base_model.model.{top}.modules_to_save.default{dot}{rest}"
        assert_close(leaves["kernel"][0], values[f"{prefix}.weight"].grad.numpy().T, 2e-4)
        assert_close(leaves["bias"][0], values[f"{prefix}.bias"].grad.numpy(), 2e-4)


def test_packing_changes_neither_logits_nor_gradients(tiny):
    tier = make_tier(tiny.model, tiny.head, clients=1, k=3)
    padded, packed = (
        gradients(tiny.model, tiny.base, [tier], make_batch(tiny.family, rows)) for rows in (PADDED, PACKED)
    )
    assert np.isfinite(packed[1]).all()  # two of the seven examples are fillers without a token
    assert_close(packed, padded, 1e-5)
    alone = make_batch(tiny.family, [[0]], shape=(1, LENGTHS[0]), examples=1)
    logits = logits_of(tiny.model, tiny.base, [tier], alone)
    assert_close(packed[1][:, :1], logits, 1e-5)


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


def test_bfloat16_is_near_float32(tiny):
    model, base = load_model(tiny.folder, num_labels=3, pooling=tiny.pooling, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    batch = make_batch(tiny.family, PACKED)
    tier = make_tier(model, tiny.head, clients=1, k=3)
    grads, half = gradients(model, base, [tier], batch)
    _, full = gradients(tiny.model, tiny.base, [tier], batch)
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, half))} == {jnp.dtype("float32")}
    half, full = half[:, :5], full[:, :5]
    assert 0 < np.linalg.norm(half - full) / np.linalg.norm(full) < 2e-2


CONFIG = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 22,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.2,
    "hidden_act": "gelu",
}


@functools.cache
def bert(clients=1, lora_dropout=0.0):
    """A model with random weights and an adapter on everything."""
    model = build_model(CONFIG, num_labels=3, pooling="mean", lora_dropout=lora_dropout)
    head = model.init_head(jax.random.key(1))
    return model, jax.jit(model.init_base)(jax.random.key(0)), make_tier(model, head, clients, k=3)


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


OPTIONS = family.Options("sequence", 3, "mean", jnp.dtype("float32"), 0.5, "xla", "frozen")


def test_each_module_draws_its_own_mask():
    config = encoder.Config(**{name: CONFIG[name] for name in encoder.Config._fields})
    query, key, *others = "abcdefgh"
    layer = encoder.EncoderLayer(config, encoder.Names(query, key, *others), OPTIONS, nnx.Rngs(0))
    layer.linear[key] = layer.linear[query]
    pair, scale = Pair(jnp.ones((1, 2, 16)), jnp.ones((1, 2, 16))), jnp.ones((1, 2))
    own = [{query: (pair, scale), key: (pair, scale)}]
    x = jax.random.normal(jax.random.key(1), (1, 2, 3, 16))
    for keys, same in ((None, True), (jax.random.split(jax.random.key(2), 1), False)):
        assert jnp.array_equal(layer.project(query, x, own, keys), layer.project(key, x, own, keys)) == same


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_keeps_the_mean(rate):
    dropped = layers.drop(jax.random.key(0), rate, jnp.ones((100, 1000)))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / (1 - rate)], rtol=1e-6)
    np.testing.assert_allclose(dropped.mean(), 1, atol=5 * (rate / (1 - rate) / 1e5) ** 0.5)


def test_scores_are_float32_under_bfloat16():
    q, k, v = (s * jax.random.normal(jax.random.key(n), (1, 2, 8, 16)) for n, s in enumerate((8, 8, 1)))
    # One head of width 16: its scale 1/4 is exact in bfloat16, so only the scores can differ.
    half = [m.astype(jnp.bfloat16) for m in (q, k, v)]
    exact = [m.astype(jnp.float32) for m in half]
    bias = jnp.zeros((1, 2, 1, 8, 8))
    got = attention.attention(*half, bias, head_dim=16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), attention.attention(*exact, bias, head_dim=16), atol=2e-2
    )


@pytest.mark.parametrize("act", layers.ACTIVATIONS)
def test_activations_equal_transformers(act):
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    expected = transformers.activations.ACT2FN[act](torch.tensor(x)).numpy()
    np.testing.assert_allclose(layers.ACTIVATIONS[act](x), expected, atol=1e-6)


def test_relative_buckets_equal_transformers():
    positions = torch.arange(300)
    expected = modeling_mpnet.MPNetEncoder.relative_position_bucket(positions - positions[:, None])
    np.testing.assert_array_equal(encoder.relative_buckets(jnp.arange(300)), expected)


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


def test_abstract_and_random_base_agree_with_a_loaded_one(tiny):
    abstract = jax.eval_shape(tiny.model.init_base, jax.random.key(0))
    random = jax.jit(tiny.model.init_base)(jax.random.key(0))
    for other in (tiny.base, random):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == jax.tree.map(
            lambda x: (x.shape, x.dtype), abstract
        )
    query = random["layers"]["linear"][next(iter(tiny.model.modules))]["kernel"]
    assert not jnp.array_equal(query[0], query[1])
    np.testing.assert_allclose(query.std(), 0.02, rtol=0.1)


def test_what_a_model_says_of_itself(tiny):
    sizes = {path: (t.i, t.o, t.layers) for path, t in tiny.model.modules.items()}
    found = {
        name.split(".", 4)[4]: (module.in_features, module.out_features, 3)
        for name, module in tiny.hf.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layer." in name
    }
    assert sizes == found
    assert tiny.model.max_length == (20 if tiny.family in PADDED_BY_ONE else 22)
    assert tiny.model.vocab_size == 50
    head = tiny.model.init_head(jax.random.key(0))
    assert jax.tree.map(jnp.shape, head) == jax.tree.map(jnp.shape, tiny.head)


def test_roberta_base_head_has_the_papers_size():
    config = CONFIG | {"model_type": "roberta", "hidden_size": 768, "pad_token_id": 1}
    head = build_model(config, num_labels=2, pooling="native").init_head(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(head)) == 592_130


def test_unknown_or_unequal_modules_are_refused():
    model, base, tier = bert()
    adapter = tier.weights.adapter
    unknown = tier._replace(weights=tier.weights._replace(adapter={"query": adapter["output.dense"]}))
    fewer = tier._replace(weights=tier.weights._replace(adapter={"output.dense": adapter["output.dense"]}))
    for tiers in ([unknown], [tier, fewer], []):
        with pytest.raises(UserError, match=r"^adapter: .*at least one tier.*'attention\.self\.query'"):
            model.apply(base, tiers, make_batch("bert", PADDED))


def test_minilm_equals_transformers(minilm):
    hf = transformers.BertModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    model, base = load_model(minilm, num_labels=384, pooling="mean")
    identity = {"classifier": {"kernel": jnp.eye(384), "bias": jnp.zeros(384)}}
    tier = make_tier(model, identity, clients=1, k=1, modules=[])
    pooled = logits_of(model, base, [tier], make_batch("bert", PACKED))[0]
    for e, tokens in enumerate(TOKENS):
        ids, types = torch.tensor(tokens)[None], torch.tensor(types_of("bert", LENGTHS[e]))[None]
        with torch.no_grad():
            states = hf(input_ids=ids, token_type_ids=types).last_hidden_state
        np.testing.assert_allclose(pooled[e], states[0].mean(0), atol=2e-5)
