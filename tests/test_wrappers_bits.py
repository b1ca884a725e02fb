"""Compression: what is kept, how it is rounded, what waits in memory, how many bits travel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import wrapped

from fslora_jax.methods.wrappers.compress import NAME, coded_bytes, largest, quantised
from fslora_jax.types import Pair, Trainable


def some_values(seed: int = 0) -> tuple[Trainable, Trainable]:
    """Values of two factors, the last row of A not sent, and a head."""
    rng = np.random.default_rng(seed)
    pair = Pair(*(jnp.float32(rng.normal(size=(2, 3, n))) for n in (4, 5)))
    head = {"c": {"kernel": jnp.float32(rng.normal(size=(4, 2))), "bias": jnp.float32(rng.normal(size=2))}}
    rows = Pair(jnp.ones((2, 3, 1)).at[:, 2].set(0), jnp.ones((2, 3, 1)))
    mask = Trainable({"m": rows}, jax.tree.map(lambda _: jnp.float32(1), head))
    return Trainable({"m": pair}, head), mask


def ravel(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_the_largest_values_are_kept_and_exactly_as_many_as_said():
    values, mask = some_values()
    for ratio in (0.01, 0.1, 0.25, 0.9):
        found = ravel(largest(values, mask, ratio))
        flat = ravel(values)
        through = ravel(jax.tree.map(lambda x, m: jnp.broadcast_to(m, x.shape), values, mask)) > 0
        count = int(np.ceil(np.float32(ratio) * np.float32(through.sum())))
        chosen = sorted(np.flatnonzero(through), key=lambda n: -abs(flat[n]))[:count]
        assert (found[chosen] == flat[chosen]).all()
        assert (found != 0).sum() == count


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_has_the_right_mean_on_a_grid_of_so_many_bits(bits):
    values, mask = some_values()
    mask = jax.tree.map(jnp.ones_like, mask)
    code = jax.jit(jax.vmap(lambda key: quantised(key, values, mask, bits, "stochastic")))
    many = code(jax.random.split(jax.random.key(0), 4000))
    heads = np.concatenate([np.ravel(x) for x in jax.tree.leaves(values.head)])
    tops = [np.abs(x).max() for x in values.adapter["m"]] + [np.abs(heads).max()] * 2
    for x, found, top in zip(jax.tree.leaves(values), jax.tree.leaves(many), tops, strict=True):
        unit = top / (2 ** (bits - 1) - 1)
        steps = np.asarray(found) / unit
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
        assert np.abs(steps).max() <= 2 ** (bits - 1) - 1 + 1e-3
        np.testing.assert_allclose(found.mean(0), x, atol=5 * unit / 2 / np.sqrt(4000))
        nearest = quantised(jax.random.key(0), values, mask, bits, "nearest")
    far = np.abs(ravel(nearest) - ravel(values))
    assert (far <= max(tops) / (2 ** (bits - 1) - 1) / 2 + 1e-6).all()


def test_zeros_are_zeros_in_any_bits():
    values, mask = some_values()
    zero = jax.tree.map(jnp.zeros_like, values)
    assert (ravel(quantised(jax.random.key(0), zero, mask, 4, "stochastic")) == 0).all()
    assert (ravel(largest(zero, mask, 0.5)) == 0).all()


def in_place(index: dict, adapter: dict, c: int) -> dict:
    """A client's components, each in its place in the global adapter; 0 elsewhere."""
    found = {}
    for m, pair in adapter.items():
        for name, x in zip("ab", pair, strict=True):
            found[m, name] = np.zeros((toy.LAYERS, wrapped.SPEC.r, x.shape[-1]))
            for n in range(toy.LAYERS):
                found[m, name][n, np.asarray(index[m][c, n])] = x[c, n]
    return found


@pytest.mark.parametrize("bits", [32, 4])
def test_nothing_is_lost_with_error_feedback_under_changing_sketches(bits):
    """What was sent and what waits add up to what changed, component by component, over three rounds."""
    method = wrapped.make("fslora", {"compress": {"ratio": 0.3, "bits": bits}})
    played = wrapped.rounds(method, 3, ks=(2, 2, 2))
    assert not np.array_equal(played[0].payload.index["up"], played[1].payload.index["up"])
    for c in range(3):
        owed = {}
        for one in played:
            change = jax.tree.map(jnp.subtract, one.after.weights, one.before.weights)
            changed, gone = (in_place(one.before.index, x.adapter, c) for x in (change, one.payload.delta))
            owed = {at: owed.get(at, 0) + changed[at] - gone[at] for at in changed}
        waiting = played[-1].memory[NAME].adapter
        for m, name in owed:
            np.testing.assert_allclose(getattr(waiting[m], name)[c], owed[m, name], atol=1e-5)
        assert any(np.abs(x).max() > 0.01 for x in owed.values())


def test_what_a_lost_upload_held_still_waits():
    method = wrapped.make("fedit", {"compress": {}})
    first, second = wrapped.rounds(method, 2, weights=(0.5, 0.5, 0.0))
    for one in (first, second):
        lost = jax.tree.map(lambda x: x[2], one.memory[NAME])
        assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(lost))
        assert np.abs(one.memory[NAME].adapter["up"].a[0]).max() > 0


def test_factors_are_sent_as_what_changed_in_them():
    """FlexLoRA's server gets factors near the right ones, though one value in ten is sent."""
    plain, coded = wrapped.make("flexlora"), wrapped.make("flexlora", {"compress": {"bits": 32}})
    right, found = (wrapped.one_round(method, wrapped.start(plain)) for method in (plain, coded))
    before = found.before.weights.adapter
    for m, pair in found.payload.delta.adapter.items():
        trained = np.asarray(found.payload.trains[m].a)[..., None] > 0
        for x, exact, old in zip(pair, right.payload.delta.adapter[m], before[m], strict=True):
            x, old = np.asarray(x), np.asarray(old)
            assert np.where(trained, (x == old) | np.isclose(x, exact, atol=1e-6), x == 0).all()


def test_bits_are_counted_exactly():
    """By hand: values, their numbers or a bit for each, scales; and what FSLoRA's client of rank k sends."""
    assert coded_bytes(1000, 3, 1.0, 8) == (8 * 1000 + 3 * 32) / 8
    assert coded_bytes(1000, 3, 0.5, 32) == (500 * 32 + 1000) / 8  # one bit for each beats 500 numbers of 10
    assert coded_bytes(1000, 3, 0.003, 5) == np.ceil((3 * 5 + 3 * 10 + 3 * 32) / 8)
    method = wrapped.make("fslora", {"compress": {"ratio": 0.25, "bits": 4}})
    played = wrapped.one_round(method, wrapped.start(method))
    up = method.traffic(0, played.clients, head_values=18).up
    for c, k in enumerate((1, 2, 4)):
        values = 18 + toy.LAYERS * k * sum(t.i + t.o for t in toy.TARGETS.values())
        kept = (ravel(jax.tree.map(lambda x, c=c: x[c], played.payload.delta)) != 0).sum()
        most = int(np.ceil(values / 4))
        assert kept <= most
        which = min(most * int(np.ceil(np.log2(values))), values)
        assert up[c] == np.ceil((most * 4 + which + 5 * 32) / 8)
