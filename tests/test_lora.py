"""LoRA factors: initial values, the low-rank product, clients of several ranks, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fslora_jax import lora
from fslora_jax.lora import Target
from fslora_jax.methods import Spec, traffic
from fslora_jax.types import Pair

MODULES = {
    "attention.self.query": Target(8, 8, 2),
    "attention.output.dense": Target(8, 8, 2),
    "output.dense": Target(16, 8, 2),
}


def random_pair(rng: np.random.Generator, *lead: int, i: int = 5, o: int = 4) -> Pair:
    return Pair(*(jnp.float32(rng.normal(size=(*lead, d))) for d in (i, o)))


def test_initial_factors():
    adapter = lora.init_adapter(jax.random.key(0), MODULES, dict.fromkeys(MODULES, 64))
    assert list(adapter) == list(MODULES)
    for name, target in MODULES.items():
        a, b = adapter[name]
        bound = 1 / np.sqrt(target.i)
        assert a.shape == (target.layers, 64, target.i)
        assert b.shape == (target.layers, 64, target.o)
        assert (b == 0).all()
        assert abs(a).max() <= bound
        assert float(a.std()) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    first, other = adapter["attention.self.query"].a, adapter["attention.output.dense"].a
    assert not np.allclose(first, other)
    assert not np.allclose(first[0], first[1])


def test_initial_factors_have_the_law_of_kaiming():
    """PEFT's: ``torch.nn.init.kaiming_uniform_(A, a=sqrt(5))``."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch.empty(400, 48)
    torch.nn.init.kaiming_uniform_(theirs, a=np.sqrt(5))
    ours = lora.init_adapter(jax.random.key(0), {"q": Target(48, 4, 1)}, {"q": 400})["q"].a
    quantiles = np.linspace(0, 1, 21)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=0.01)


def test_delta_and_product_are_the_dense_update():
    rng = np.random.default_rng(0)
    pair, x, scale = random_pair(rng, 3), rng.normal(size=(7, 5)), rng.random(3)
    dense = np.asarray(pair.b).T @ np.diag(scale) @ np.asarray(pair.a)
    found = lora.delta(pair, jnp.float32(scale), jnp.float32(x))
    np.testing.assert_allclose(found, x @ dense.T, rtol=1e-5, atol=1e-5)

    layers = random_pair(rng, 2, 3)
    for n in range(2):
        expected = 0.7 * np.asarray(layers.b[n]).T @ np.asarray(layers.a[n])
        np.testing.assert_allclose(lora.product(layers, 0.7)[n], expected, rtol=1e-5, atol=1e-6)


def test_clients_of_several_ranks_each_meet_their_own_part():
    rng = np.random.default_rng(0)
    tiers = [(random_pair(rng, c, k), jnp.float32(rng.random((c, k)))) for c, k in ((2, 4), (1, 3), (3, 1))]
    x = jnp.float32(rng.normal(size=(6, 2, 5)))
    found = lora.per_client(lambda own, x: lora.delta(*own, x), tiers, x)
    clients = [jax.tree.map(lambda leaf, c=c: leaf[c], tier) for tier in tiers for c in range(len(tier[1]))]
    assert found.shape == (6, 2, 4)
    for c, (pair, scale) in enumerate(clients):
        np.testing.assert_allclose(found[c], lora.delta(pair, scale, x[c]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 0.25), (True, 2.0)])
def test_scale_takes_the_global_rank(rslora, expected):
    assert lora.lora_scale(64, 16, use_rslora=rslora) == expected


def test_traffic_of_the_published_setting():
    """RoBERTa-base, query and value, r = 64: the head is more than the adapter up to k = 16."""
    targets = {m: Target(768, 768, 12) for m in ("query", "value")}
    head = 592_130
    spec = Spec(targets, r=64, scale=1.0)
    assert lora.rank_unit(targets) == 36_864
    for k in (8, 16, 32, 64):
        down, up = traffic(spec, k, head)
        assert up == 4 * (k * 36_864 + head)
        assert down - up == (4 * 24 * k if k < 64 else 0)
        assert (4 * head > up - 4 * head) == (k <= 16)
    down, up = traffic(spec._replace(share_sketch=True), 8, head)
    assert down - up == 4 * 8
