"""What every encoder family promises, against transformers, torch and PEFT; one table, a few programs a row."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import FAMILIES
from examples import (
    CONFIG,
    LABELS,
    LENGTHS,
    PACKED,
    PADDED,
    PADDED_BY_ONE,
    TOKENS,
    assert_close,
    gradients,
    logits_of,
    make_batch,
    make_tier,
    types_of,
)

from fslora_jax import lora
from fslora_jax.errors import UserError
from fslora_jax.models import build_model, load_model
from fslora_jax.models.families import find_family
from fslora_jax.models.fields import WITHOUT_INFLUENCE
from fslora_jax.models.weights import sources
from fslora_jax.types import Pair


def torch_logits(tiny, hf, left=False):
    """The logits of all examples, each alone in its row with padding masked."""
    mask, types, places = torch.zeros((3, len(LENGTHS), 10), dtype=torch.long)
    ids = torch.full_like(mask, tiny.hf.config.pad_token_id)
    for e, n in enumerate(LENGTHS):
        here = slice(10 - n, 10) if left else slice(n)
        ids[e, here], types[e, here] = torch.tensor(TOKENS[e]), torch.tensor(types_of(tiny.family, n))
        mask[e, here], places[e, here] = 1, torch.arange(n)
    inputs = {"token_type_ids": types} if tiny.family == "bert" else {}
    if tiny.family not in PADDED_BY_ONE:  # which count from the first token that is no padding
        inputs["position_ids"] = places
    logits = hf(input_ids=ids, attention_mask=mask, **inputs).logits
    if tiny.pooling == "mean":
        return (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return logits


def plain(tiny, head=None):
    return make_tier(tiny.model, tiny.head if head is None else head, clients=1, k=1, modules=[])


def test_logits_equal_transformers_in_every_layout(tiny):
    layouts = [make_batch(tiny.family, rows) for rows in (PADDED, PACKED)]
    layouts.append(make_batch(tiny.family, PADDED, left=True))
    with torch.no_grad():
        expected = [torch_logits(tiny, tiny.hf)] * 3
        if tiny.pooling == "mean":  # transformers' own classifiers would read padding on the left
            expected[2] = torch_logits(tiny, tiny.hf, left=True)
    assert expected[0].abs().max() > 0.5
    for batch, want in zip(layouts, expected, strict=True):
        logits = logits_of(tiny.model, tiny.base, [plain(tiny)], batch)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits[0, :5], want, atol=1e-4)


@pytest.mark.parametrize("kept", [[], [1]], ids=["embeddings", "second layer"])
def test_parts_equal_transformers(tiny, kept):
    """A model of fewer layers; with the mean, every feature is an answer."""
    hf, head = copy.deepcopy(tiny.hf), tiny.head
    parent, _, name = tiny.model.naming.layer_prefix.partition(".{layer}")[0].rpartition(".")
    stack = hf.get_submodule(parent)
    setattr(stack, name, torch.nn.ModuleList([getattr(stack, name)[n] for n in kept]))
    if tiny.pooling == "mean":
        hf.classifier = torch.nn.Identity()
        head = {"classifier": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}}
    base = tiny.base | {"layers": jax.tree.map(lambda leaf: leaf[np.array(kept, int)], tiny.base["layers"])}
    logits = logits_of(tiny.model, base, [plain(tiny, head)], make_batch(tiny.family, PACKED))
    with torch.no_grad():
        np.testing.assert_allclose(logits[0, :5], torch_logits(tiny, hf), atol=1e-5)


def test_the_table_names_every_tensor_of_the_file(tiny):
    abstract = jax.eval_shape(tiny.model.init_base, jax.random.key(0))
    found = {source.name: source.shape for source in sources(find_family(tiny.hf.config.to_dict()), abstract)}
    assert found == {name: tuple(value.shape) for name, value in tiny.hf.base_model.state_dict().items()}


UNUSED = {"distilbert": {"dropout", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"}}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_the_config_counts(model_type):
    """Changed, it is refused, or it changes the weights' shapes, or else the program."""
    config = transformers.AutoConfig.for_model(model_type, **FAMILIES[model_type]).to_dict()
    batch = make_batch(model_type, PADDED)

    def program(fields):
        model = build_model(fields, num_labels=3, pooling="native")
        base = jax.eval_shape(model.init_base, jax.random.key(0))
        tier = make_tier(model, model.init_head(jax.random.key(0)), clients=1, k=1, modules=[])
        return jax.tree.map(
            jnp.shape, base
        ), lambda: jax.jit(model.apply).lower(base, [tier], batch).as_text()

    def other(value):
        return not value if isinstance(value, bool) else "silu" if isinstance(value, str) else 2 * value

    before = program(config)
    text = before[1]()
    skipped = {*WITHOUT_INFLUENCE, *UNUSED.get(model_type, ()), "model_type"}
    fields = [name for name in config if name not in skipped]
    assert len(fields) > 8
    for name in fields:
        try:
            after = program(config | {name: other(config[name])})
        except UserError as error:
            assert f"config.json: {name} is" in str(error)
            continue
        assert after[0] != before[0] or after[1]() != text, name


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
