"""A client's local steps: the loss, its gradients against the oracle (identity 3), and what may move (identity 5)."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import toy
from compare import client_batches, close, drawn, flat, give, oracle_base, oracle_minibatches

from fslora_jax.federation import local
from fslora_jax.federation.local import ClientOptimizer, masked, train
from fslora_jax.types import Local, Pair, Rows, Trainable

CLIENT, K = 3, 3
SCALES = dict.fromkeys(toy.TARGETS, toy.SPEC.scale)
UNIT = ClientOptimizer(optax.identity(), lambda step: jnp.float32(1.0))


def one_client(
    optimizer: ClientOptimizer, cap: int, steps: int, first_step: int = 0
) -> tuple[Local, Local, np.ndarray]:
    """What the client holds before and after, in a slot of rank ``cap``, and its losses."""
    before = give(toy.start(toy.METHOD), CLIENT, K, cap)
    batches = jax.tree.map(lambda x: x[None, :steps], client_batches(toy.POPULATION, CLIENT, 0))
    tier = jax.tree.map(lambda x: x[None], before)
    (after,), losses = jax.jit(train, static_argnums=(0, 1))(
        toy.make_score(), optimizer, toy.BASE, [tier], batches, first_step, None
    )
    return before, jax.tree.map(lambda x: x[0], after), np.asarray(losses[0])


trained = cache(one_client)


def scattered(before: Local, after: Local) -> dict:
    """The change, in the places of the global adapter, as the oracle has its parameters."""
    adapter = {}
    for m, pair in after.weights.adapter.items():
        rows = jnp.arange(toy.LAYERS)[:, None]
        adapter[m] = Pair(
            *(
                jnp.zeros((toy.LAYERS, toy.R, new.shape[-1])).at[rows, before.index[m]].set(new - old)
                for new, old in zip(pair, before.weights.adapter[m], strict=True)
            )
        )
    head = jax.tree.map(jnp.subtract, after.weights.head, before.weights.head)
    return flat(Trainable(adapter, head))


@pytest.mark.parametrize("cap", [K, toy.R], ids=["extracted", "masked"])
def test_identity_3_loss_and_gradients_are_the_equations(cap):
    """One step of SGD at rate 1 moves by minus the gradient; nothing but the drawn components has one."""
    before, after, losses = trained(UNIT, cap, 1)
    server = toy.start(toy.METHOD)
    sketches = {at: oracle.sketch(index, toy.R) for at, index in drawn(server, CLIENT, K).items()}
    batch = oracle_minibatches(client_batches(toy.POPULATION, CLIENT, 0))[0]
    loss, gradients = oracle.loss_and_gradients(oracle_base(), flat(server.weights), SCALES, sketches, batch)
    close(scattered(before, after), {p: -g for p, g in gradients.items()}, 2e-6)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-5)
    assert all(abs(g).max() > 0.01 for g in gradients.values())


def test_identity_3_the_oracles_gradients_are_those_of_its_loss():
    """By central differences, so that the hand-made backward pass is no matter of belief."""
    server = toy.start(toy.METHOD)
    sketches = {at: oracle.sketch(index, toy.R) for at, index in drawn(server, CLIENT, K).items()}
    batch = oracle_minibatches(client_batches(toy.POPULATION, CLIENT, 0))[0]
    x = flat(server.weights)

    def loss(x: oracle.Parameters) -> float:
        return oracle.loss_and_gradients(oracle_base(), x, SCALES, sketches, batch)[0]

    gradients = oracle.loss_and_gradients(oracle_base(), x, SCALES, sketches, batch)[1]
    rng = np.random.default_rng(0)
    for p, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        up, down = (loss(x | {p: x[p] + step * direction}) for step in (1e-5, -1e-5))
        np.testing.assert_allclose((up - down) / 2e-5, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", toy.OPTIMIZERS)
def test_identity_5_spare_components_stay_bit_identical(name):
    before, after, _ = trained(toy.OPTIMIZERS[name][0], toy.R, 3)
    for m in toy.TARGETS:
        for old, new in zip(before.weights.adapter[m], after.weights.adapter[m], strict=True):
            assert (old[:, K:] == new[:, K:]).all()
            assert (old[:, :K] != new[:, :K]).any(-1).all()


def test_identity_5_sees_decay_of_what_was_not_drawn(monkeypatch):
    monkeypatch.setattr(local, "masked", lambda updates, trains: updates)
    before, after, _ = one_client(ClientOptimizer(toy.ADAM, lambda step: 0.01 + 0 * step), toy.R, 3)
    assert (before.weights.adapter["up"].a[:, K:] != after.weights.adapter["up"].a[:, K:]).all()


def test_masked_updates_are_exact_zeros():
    updates = Trainable({"q": Pair(jnp.full((1, 3, 2), jnp.nan), jnp.ones((1, 3, 4)))}, {"head": jnp.ones(2)})
    found = masked(updates, {"q": Rows(*[jnp.array([[1.0, 0.0, 0.0]])] * 2)})
    assert jnp.isnan(found.adapter["q"].a[0, 0]).all()
    assert (found.adapter["q"].a[0, 1:] == 0).all()
    assert found.adapter["q"].b[0, :, 0].tolist() == [1, 0, 0]
    assert (found.head["head"] == 1).all()


def test_the_learning_rate_goes_on_over_rounds():
    optimizer = ClientOptimizer(optax.identity(), lambda step: 0.1 * (step == 7))
    for first_step, moves in ((5, True), (7, True), (8, False), (4, False)):
        before, after, _ = trained(optimizer, K, 3, first_step)
        changed = any(
            bool((a != b).any())
            for a, b in zip(*map(jax.tree.leaves, (before.weights, after.weights)), strict=True)
        )
        assert changed == moves


def test_losses_are_those_before_each_step():
    still = ClientOptimizer(optax.identity(), lambda step: jnp.float32(0.0))
    _, _, untrained = trained(still, K, 3)
    _, _, moving = trained(toy.OPTIMIZERS["sgd"][0], K, 3)
    assert moving[0] == untrained[0]
    assert (moving[1:] != untrained[1:]).all()


def test_dropout_differs_from_step_to_step_and_client_to_client():
    """The same batch in every step, nothing learnt: only the masks can change the loss."""
    still = ClientOptimizer(optax.identity(), lambda step: jnp.float32(0.0))
    before = give(toy.start(toy.METHOD), CLIENT, K, K)
    tier = jax.tree.map(lambda x: jnp.stack([x, x]), before)
    batch = jax.tree.map(
        lambda x: np.broadcast_to(x[0], (2, 3, *x.shape[1:])), client_batches(toy.POPULATION, CLIENT, 0)
    )
    run = jax.jit(train, static_argnums=(0, 1))
    keys = jax.random.split(jax.random.key(0), 2)
    dropped = np.asarray(run(toy.make_score(0.5), still, toy.BASE, [tier], batch, 0, keys)[1])
    plain = np.asarray(run(toy.make_score(0.5), still, toy.BASE, [tier], batch, 0, None)[1])
    assert len(np.unique(dropped)) == dropped.size
    np.testing.assert_allclose(plain, plain[0, 0], rtol=1e-6)
