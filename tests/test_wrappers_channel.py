"""Over the air: what is received against the algebra of the channel, written out client by client."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
import wrapped

from fslora_jax.lora import Target
from fslora_jax.methods import Client, Method, Spec, fedit
from fslora_jax.methods.wrappers.over_the_air import NAME, PURPOSE, fading, over_the_air
from fslora_jax.types import Local

P = np.array(wrapped.WEIGHTS)
WIDE = Spec({"m": Target(128, 128, layers=16)}, r=64, scale=1.0)
"""131,072 values a factor: the standard deviation of their mean square is 0.4 %."""


def channels(round_key: jax.Array, csi_error: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What is left of each client's channel, and ``|h|`` as it knows it, from the keys of `wrapped.one_round`."""
    keys = jax.random.split(round_key, len(P) + 1)[:-1]
    left, square, _ = jax.vmap(lambda key: fading(jax.random.fold_in(key, PURPOSE), csi_error, 0.0))(keys)
    return np.asarray(left), np.sqrt(square)


FIRST = jax.random.fold_in(jax.random.key(0), 0)
"""The key of the first round."""


def uploads(sent: wrapped.Sent) -> np.ndarray:
    """What clients changed, ``(C, values)``."""
    change = jax.tree.map(jnp.subtract, sent.after.weights, sent.before.weights)
    return np.concatenate([np.reshape(x, (len(P), -1)) for x in jax.tree.leaves(change)], axis=1)


def moved(method: Method, sent: wrapped.Sent) -> np.ndarray:
    """What the server's weights changed, ``(values,)``."""
    change = jax.tree.map(jnp.subtract, sent.server.weights, wrapped.start(method).weights)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(change)])


def over(name: str = "fedit", **options) -> Method:
    return wrapped.make(name, {"over_the_air": options})


@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("csi_error", [0.0, 0.3])
def test_without_noise_the_server_hears_the_mean_of_the_active_clients(threshold, csi_error):
    left, strength = channels(FIRST, csi_error)
    active = strength >= threshold
    assert active.any() and (threshold == 0 or not active.all())
    method = over(noise_std=0, threshold=threshold, csi_error=csi_error)
    sent = wrapped.one_round(method, wrapped.start(method))
    heard = (P * active * left) @ uploads(sent) / P[active].sum()
    np.testing.assert_allclose(moved(method, sent), heard, rtol=1e-4, atol=2e-6)


def test_channels_are_rayleigh_and_differ_by_client_and_round():
    keys = jax.random.split(jax.random.key(3), 20_000)
    _, square, _ = jax.vmap(lambda key: fading(key, 0.0, 0.0))(keys)
    assert np.mean(square) == pytest.approx(1, abs=0.03)
    assert np.mean(np.asarray(square) > 1) == pytest.approx(np.exp(-1), abs=0.015)
    assert len(np.unique(square)) > 19_900


def test_nobody_exceeds_the_power_and_somebody_meets_it():
    """``|b_k|^2 rms(x_k)^2`` with the channel's eta, over what each client really sends (k of r components)."""
    method = over("fslora", power=2.0)
    sent = wrapped.one_round(method, wrapped.start(method))
    values = uploads(sent)
    count = [(row != 0).sum() for row in values]
    square = (values**2).sum(1) / count
    worst = jax.tree.leaves(sent.combined.peak[NAME])
    eta = 2.0 / float(worst[0])
    powers = eta * P**2 / channels(FIRST)[1] ** 2 * square
    assert (powers <= 2.0 * (1 + 1e-5)).all()
    assert np.isclose(powers, 2.0).sum() == 1
    assert all(float(x) == float(worst[0]) for x in worst)


def scaled(size: float, client: Client, before: Local) -> Local:
    after = wrapped.pretend(client, before)
    return before._replace(
        weights=jax.tree.map(lambda a, b: b + size * (a - b), after.weights, before.weights)
    )


@pytest.mark.parametrize("gain", ["all", "leaf"])
def test_the_error_is_as_computed_and_shrinks_with_the_upload(gain):
    errors = {}
    for size in (1.0, 0.01):
        received = {}
        for noise in (0.0, 0.7):
            method = over_the_air(fedit(WIDE, optax.sgd(1.0)), WIDE, noise_std=noise, power=3.0, gain=gain)
            zero = method.init(jax.random.key(0), {})
            server = zero._replace(weights=jax.tree.map(jnp.zeros_like, zero.weights))
            sent = wrapped.one_round(method, server, train=partial(scaled, size), r=WIDE.r)
            received[noise] = sent.server.weights.adapter["m"]
        change = jax.tree.map(jnp.subtract, sent.after.weights, sent.before.weights).adapter["m"]
        squares = [np.mean(np.square(x), axis=(1, 2, 3)) for x in change]
        if gain == "all":
            squares = [np.mean(squares, axis=0)] * 2
        for leaf, square in enumerate(squares):
            eta = np.min(3.0 * channels(FIRST)[1] ** 2 / (P**2 * square))
            mse = float(jnp.mean((received[0.7][leaf] - received[0.0][leaf]) ** 2))
            assert mse == pytest.approx(0.7**2 / (2 * eta), rel=0.02)
            errors[size, leaf] = mse
    for leaf in (0, 1):
        assert errors[0.01, leaf] == pytest.approx(1e-4 * errors[1.0, leaf], rel=1e-3)


def test_an_upload_of_zeros_has_no_noise():
    method = over(noise_std=5.0)
    server = wrapped.start(method)
    sent = wrapped.one_round(method, server, train=lambda client, before: before)
    jax.tree.map(np.testing.assert_array_equal, sent.server.weights, server.weights)


@pytest.mark.parametrize("name", ["fedit", "zero_padding", "rac_lora"])
def test_where_all_are_silent_the_server_keeps_what_it_has(name):
    method = over(name, threshold=1e3)
    server = wrapped.start(method)
    sent = wrapped.one_round(method, server)
    jax.tree.map(np.testing.assert_array_equal, sent.server._replace(round=server.round), server)
    assert int(sent.server.round) == 1


def test_silence_moves_nothing_that_momentum_would_move():
    momentum = optax.sgd(1.0, momentum=0.9)
    loud, silent = (
        over_the_air(fedit(wrapped.SPEC, momentum), wrapped.SPEC, threshold=t) for t in (0.0, 1e3)
    )
    first = wrapped.one_round(loud, wrapped.start(loud)).server
    second = wrapped.one_round(silent, first).server
    jax.tree.map(np.testing.assert_array_equal, second._replace(round=first.round), first)


@pytest.mark.parametrize("name", ["fslora", "ffa_lora", "fedsa_lora"])
def test_without_noise_models_are_heard_as_differences(name):
    options = {"noise_std": 0, "threshold": 0.6}
    one, other = (over(name, upload=upload, **options) for upload in ("difference", "model"))
    server = wrapped.start(one)
    expected, found = (wrapped.end(wrapped.one_round(method, server)) for method in (one, other))
    for leaf, x in expected.items():
        np.testing.assert_allclose(found[leaf], x, rtol=1e-5, atol=2e-6)


def test_noise_reaches_what_somebody_sent_and_nothing_else():
    """FSLoRA with k = 1 leaves components to nobody; FFA-LoRA never moves A; personal parts never travel."""
    method = over("fslora", noise_std=1.0)
    server = wrapped.start(method)
    sent = wrapped.one_round(method, server, ks=(1, 1, 1))
    for m, pair in sent.server.weights.adapter.items():
        for new, old in zip(pair, server.weights.adapter[m], strict=True):
            drawn = np.asarray(sent.combined.mass[m].a) > 0
            assert 0 < drawn.sum() < drawn.size
            np.testing.assert_array_equal((np.asarray(new) != old).any(-1), drawn)
    method = over("ffa_lora", noise_std=1.0)
    after = wrapped.one_round(method, wrapped.start(method)).server.weights.adapter
    for m, pair in wrapped.start(method).weights.adapter.items():
        np.testing.assert_array_equal(after[m].a, pair.a)
        assert (np.asarray(after[m].b) != pair.b).all()
    quiet, loud = (over("fedsa_lora", noise_std=std) for std in (0.0, 1.0))
    one, other = (wrapped.one_round(method, wrapped.start(method)).server.weights for method in (quiet, loud))
    for m, pair in one.adapter.items():
        np.testing.assert_array_equal(other.adapter[m].b, pair.b)
        assert not np.allclose(other.adapter[m].a, pair.a)
    jax.tree.map(np.testing.assert_array_equal, other.head, one.head)


def test_noise_is_a_function_of_the_keys():
    method = over()
    server = wrapped.start(method)
    one, again, other = (wrapped.end(wrapped.one_round(method, server, seed=seed)) for seed in (4, 4, 5))
    assert all((x == again[leaf]).all() for leaf, x in one.items())
    assert not any((x == other[leaf]).all() for leaf, x in one.items())


def test_differences_leave_a_lower_floor_than_models():
    """A quadratic that each client halves the way to its own optimum of: differences shrink, models do not."""

    def halfway(client: Client, before: Local) -> Local:
        goal = 3.0 + 0.1 * client.id
        return before._replace(weights=jax.tree.map(lambda x: x + 0.5 * (goal - x), before.weights))

    floors = {}
    for upload in ("difference", "model"):
        method = over(noise_std=0.3, upload=upload)
        play = jax.jit(lambda server, method=method: wrapped.one_round(method, server, train=halfway).server)
        server, errors = wrapped.start(method), []
        for _ in range(24):
            server = play(server)
            wrong = [x - (3.0 + 0.1 * P @ np.arange(3)) for x in jax.tree.leaves(server.weights)]
            errors.append(np.sqrt(np.mean(np.concatenate([np.ravel(x) for x in wrong]) ** 2)))
        floors[upload] = np.median(errors[12:])
    assert floors["difference"] < floors["model"] / 5


def test_a_whole_round_hears_the_same_in_any_layout():
    """Two chunks in tiers against one masked: the worst client may sit in either."""
    method = over_the_air(toy.METHOD, toy.SPEC, threshold=0.2)
    optimizer = toy.OPTIMIZERS["sgd"][0]
    one, other = (
        toy.play(method, optimizer, cohorts=toy.COHORTS[:2], **layout)
        for layout in ({"tiered": False}, {"chunks": 2})
    )
    for a, b in zip(
        jax.tree.leaves(one.servers[-1].weights), jax.tree.leaves(other.servers[-1].weights), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
