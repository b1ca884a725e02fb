"""The pieces that models are made of, each against its own oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from examples import CONFIG
from flax import nnx
from jax.sharding import PartitionSpec as P
from transformers.models.mpnet import modeling_mpnet

from fslora_jax.models import attention, encoder, family, layers, stack
from fslora_jax.models.activations import ACTIVATIONS, gelu
from fslora_jax.types import Local, Pair, Trainable

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
        project = layers.Project(layer, own, keys, {}, length=3)
        assert jnp.array_equal(project(query, x), project(key, x)) == same


class Recorder(layers.Layer):
    """Appends the mask of its module's dropout, as binary digits, to what it is given."""

    def __init__(self, rngs: nnx.Rngs):
        zero = nnx.initializers.zeros_init()
        super().__init__({"module": nnx.Linear(4, 4, kernel_init=zero, rngs=rngs)}, {}, lora_dropout=0.5)

    def __call__(self, x, project, shared):
        return 2 * x + project("module", jnp.ones_like(x)) / 2


def test_each_layer_and_client_draws_its_own_mask():
    parts = {"layers": Recorder}
    weights = stack.init_base(parts, 3, jax.random.key(0))["layers"]
    unit = jnp.broadcast_to(jnp.eye(4), (2, 3, 4, 4))
    scale = {"module": jnp.ones((2, 3, 4))}
    tier = Local(Trainable({"module": Pair(unit, unit)}, {}), scale, {}, {})

    def masks(keys):
        found = stack.run_layers(
            stack.graphs(parts)["layers"], weights, [tier], jnp.zeros((2, 5, 6, 4)), None, dropout=keys
        )
        return (found.astype(int) >> jnp.arange(3)[:, None, None, None, None]) & 1

    keys = jax.random.split(jax.random.key(1), 2)
    drawn = masks(keys).reshape(6, -1)  # of three layers, for two clients
    for n in range(6):
        assert 0.3 < drawn[n].mean() < 0.7
        assert all((drawn[n] != drawn[m]).mean() > 0.3 for m in range(n))
    assert jnp.array_equal(masks(keys).reshape(6, -1), drawn)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_keeps_the_mean(rate):
    kept = jax.random.bernoulli(jax.random.key(0), 1 - rate, (100, 1000))
    dropped = layers.drop(kept, rate, jnp.ones((100, 1000)))
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


@pytest.mark.parametrize("peaked", [1, 3])
def test_gradients_of_attention_under_bfloat16(peaked):
    """Each result and factor is rounded once: some 2.5e-3. What a softmax weighs by, in halves, would be 5e-3."""
    sizes = (peaked, peaked, 1, 1)
    q, k, v, gradient = (
        (size * jax.random.normal(jax.random.key(n), (2, 30, 20, 64))).astype(jnp.bfloat16)
        for n, size in enumerate(sizes)
    )

    def gradients(*factors):
        attend = partial(attention.attention, bias=jnp.zeros((2, 30, 1, 20, 20)), head_dim=16)
        mixed, back = jax.vjp(attend, *factors[:3])
        return mixed, *back(factors[3])

    exact = gradients(*(m.astype(jnp.float32) for m in (q, k, v, gradient)))
    for got, expected in zip(gradients(q, k, v, gradient), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        miss = jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert 0 < miss < 3e-3


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_equal_transformers(act):
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    expected = transformers.activations.ACT2FN[act](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[act](x), expected, atol=1e-6)


def test_gelu_and_its_slope_are_exact_to_rounding():
    x = np.linspace(-12, 12, 100_001).astype(np.float32)
    exact = x.astype(np.float64)
    below, density = scipy.stats.norm.cdf(exact), scipy.stats.norm.pdf(exact)
    value, slope = jax.vmap(jax.value_and_grad(gelu))(x)
    # Beyond 5.6 the exponent's own rounding is more than a millionth of what is left.
    near = np.abs(x) < 5.6
    np.testing.assert_allclose(value[near], (exact * below)[near], rtol=1.5e-6)
    np.testing.assert_allclose(value, exact * below, rtol=2e-7, atol=1e-7)
    np.testing.assert_allclose(slope, below + exact * density, atol=2.4e-7)


def test_gelu_of_halves_is_rounded_once():
    x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    value, slope = jax.vmap(jax.value_and_grad(gelu))(x)
    wide = jax.vmap(jax.value_and_grad(gelu))(x.astype(jnp.float32))
    assert value.dtype == slope.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, wide[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(slope, wide[1].astype(jnp.bfloat16))


def test_gelu_at_the_ends():
    value, slope = jax.vmap(jax.value_and_grad(gelu))(jnp.array([-1e30, 1e30, jnp.nan]))
    np.testing.assert_array_equal(value, jnp.array([0, 1e30, jnp.nan]))
    np.testing.assert_array_equal(slope, [0, 1, np.nan])


def test_relative_buckets_equal_transformers():
    positions = torch.arange(300)
    expected = modeling_mpnet.MPNetEncoder.relative_position_bucket(positions - positions[:, None])
    np.testing.assert_array_equal(encoder.relative_buckets(jnp.arange(300)), expected)


def test_relative_buckets_on_a_mesh():
    """As in a round: along ``clients`` each group has its own program, the other axes are the compiler's."""
    mesh = jax.make_mesh((1, 1), ("clients", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    each = jax.shard_map(
        encoder.relative_buckets,
        mesh=mesh,
        axis_names={"clients"},
        in_specs=P("clients"),
        out_specs=P("clients"),
    )
    positions = jnp.array([[0, 1, 500]])
    np.testing.assert_array_equal(jax.jit(each)(positions), encoder.relative_buckets(positions))
