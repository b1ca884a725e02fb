"""Identities of the federated methods, one server step at a time: clients hold random factors, nothing trains."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fslora_jax.lora import Target
from fslora_jax.methods import METHODS, Client, Combined, Method, Server, Spec
from fslora_jax.methods.hetlora import NAME as HETLORA
from fslora_jax.methods.hetlora import product_norm, tail_norm, tail_rows
from fslora_jax.methods.lora_fair import descend, ridge
from fslora_jax.methods.parts import factorised, kernel_of
from fslora_jax.types import Local, Pair, Rows, Trainable

LAYERS, R = 2, 3
SPEC = Spec({"q": Target(9, 8, LAYERS), "v": Target(7, 10, LAYERS)}, R, scale=0.5, scale_pattern={"v": 0.8})
EXACT = ["ffa_lora", "rolora", "flora", "fedex_lora", "fed_sb", "rac_lora", "xgblora"]
SHARES = (0.2, 0.5, 0.3)
FULL, MIXED = (R, R, R), (1, 3, 2)


def make(name: str, spec: Spec = SPEC, **options) -> Method:
    return METHODS[name].make(spec, optax.sgd(1.0), **options)


def begin(method: Method, spec: Spec = SPEC) -> Server:
    """A server whose factors are all random, unless the method fixes them."""
    server = method.init(jax.random.key(0), {})
    rng = np.random.default_rng(0)
    if method.forward is not None or method.traits.moves_base:
        return server
    adapter = {
        m: Pair(*(jnp.float32(rng.normal(size=x.shape)) for x in pair))
        for m, pair in server.weights.adapter.items()
    }
    return server._replace(weights=Trainable(adapter, {}))


class Met(NamedTuple):
    """A server step: what the clients held at last, the ideal average of their products, the server afterwards."""

    held: list[Local]
    ideal: dict[str, np.ndarray]
    combined: Combined
    after: Server


def meet(
    method: Method,
    server: Server,
    ks: Sequence[int] = FULL,
    *,
    shares: Sequence[float] = SHARES,
    noise=1.0,
    seed=1,
) -> Met:
    """One server step after clients that moved what they may by random amounts."""
    rng, held, payloads = np.random.default_rng(seed), [], []
    clients = [Client(*map(jnp.asarray, (i, k, w))) for i, (k, w) in enumerate(zip(ks, shares, strict=True))]
    if method.announce is not None:
        said = [jax.tree.map(lambda x, w=c.weight: w * x, method.announce(c)) for c in clients]
        server = server._replace(announced=jax.tree.map(lambda *xs: sum(xs), *said))
    for client, k in zip(clients, ks, strict=True):
        if method.first_memory is not None:
            client = client._replace(memory=method.first_memory(server))
        before = method.download(
            jax.random.key(int(client.id)), server, client, R if method.traits.holds_all else k
        )
        after = moved(before, rng, noise)
        payload, _ = method.upload(jax.random.key(0), server, before, after, client)
        payloads.append(jax.tree.map(lambda x: x[None], payload))
        held.append(after if method.forward is None else method.forward(server, after))
    combined = method.combine(payloads, [jnp.array([w]) for w in shares])
    ideal = {
        m: sum(
            w * np.asarray(kernel_of(h.weights.adapter[m], h.scale[m]), np.float64)
            for w, h in zip(shares, held, strict=True)
        )
        for m in SPEC.targets
    }
    after = method.update(jax.random.key(7), server._replace(announced=()), combined)
    return Met(held, ideal, combined, after)


def moved(before: Local, rng: np.random.Generator, noise: float) -> Local:
    adapter = {
        m: Pair(
            *(
                x + noise * jnp.float32(rng.normal(size=x.shape)) * rows[..., None]
                for x, rows in zip(pair, before.trains[m], strict=True)
            )
        )
        for m, pair in before.weights.adapter.items()
    }
    return before._replace(weights=Trainable(adapter, {}))


def total(method: Method, server: Server) -> dict[str, np.ndarray]:
    """What the method has put on the frozen kernels."""
    adapter, scales = method.adapter(server).adapter, SPEC.scales()
    return {
        m: np.asarray(kernel_of(pair, scales[m]), np.float64) + np.asarray(server.base_delta.get(m, 0.0))
        for m, pair in adapter.items()
    }


def error(method: Method, met: Met) -> dict[str, np.ndarray]:
    """By how much the server's step misses the ideal average."""
    done = total(method, met.after)
    return {m: met.ideal[m] - done[m] for m in done}


def means(met: Met, m: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        sum(
            w * np.asarray(h.weights.adapter[m][f], np.float64) for w, h in zip(SHARES, met.held, strict=True)
        )
        for f in (0, 1)
    )


# --- Products --------------------------------------------------------------------------------------------------------


def test_fedit_misses_the_ideal_average_by_the_cross_covariance():
    method = make("fedit")
    met = meet(method, begin(method))
    for m, missed in error(method, met).items():
        a, b = means(met, m)
        cross = sum(
            w * np.einsum("nki,nko->nio", h.weights.adapter[m].a - a, h.weights.adapter[m].b - b)
            for w, h in zip(SHARES, met.held, strict=True)
        )
        np.testing.assert_allclose(missed, SPEC.scales()[m] * cross, atol=1e-5)
        assert np.abs(missed).max() > 0.1


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_have_no_error(name):
    """Over two rounds, so that RoLoRA trains both factors, and what was merged is there in the second."""
    method = make(name)
    server = begin(method)
    for seed in (1, 2):
        before = {m: np.asarray(x) for m, x in server.base_delta.items()}
        met = meet(method, server, seed=seed)
        for m, missed in error(method, met).items():
            np.testing.assert_allclose(missed + before.get(m, 0.0), 0, atol=1e-5)
            assert np.abs(met.ideal[m]).max() > 0.1
        server = met.after


def test_ffa_lora_never_moves_a_and_rolora_moves_one_factor_at_a_time():
    ffa, rolora = make("ffa_lora"), make("rolora")
    server = begin(ffa)
    kept = meet(ffa, server).after.weights.adapter
    first = meet(rolora, server).after
    second = meet(rolora, first).after.weights.adapter
    for m, pair in server.weights.adapter.items():
        np.testing.assert_array_equal(kept[m].a, pair.a)
        np.testing.assert_array_equal(first.weights.adapter[m].a, pair.a)
        np.testing.assert_array_equal(second[m].b, first.weights.adapter[m].b)
        assert (np.asarray(second[m].a != pair.a)).all() and (np.asarray(kept[m].b != pair.b)).all()


def test_fedex_lora_has_a_residual_of_low_rank():
    """``(C - 1) r`` at most: two clients of rank 3 leave 3 of 8."""
    method = make("fedex_lora")
    met = meet(method, begin(method), (R, R), shares=(0.4, 0.6))
    sizes = np.linalg.svd(met.after.base_delta["q"], compute_uv=False)
    assert ((sizes > 1e-5).sum(-1) == R).all()


def test_flexlora_misses_the_singular_values_beyond_r():
    method = make("flexlora")
    met = meet(method, begin(method), MIXED)
    for m, missed in error(method, met).items():
        sizes = np.linalg.svd(met.ideal[m], compute_uv=False)
        beyond = np.sqrt((sizes[:, R:] ** 2).sum(-1))
        np.testing.assert_allclose(np.linalg.norm(missed, axis=(1, 2)), beyond, rtol=1e-4)
        assert (beyond > 0.1).all()


def test_fed_sb_starts_with_the_best_low_rank_part_of_a_sign_step():
    method = make("fed_sb", first_step=0.1)
    rng = np.random.default_rng(0)
    gradient = {m: jnp.float32(rng.normal(size=(t.layers, t.i, t.o))) for m, t in SPEC.targets.items()}
    server = method.from_gradient(begin(method), gradient)
    for m, found in total(method, server).items():
        u, sizes, vt = np.linalg.svd(-0.1 * np.sign(np.asarray(gradient[m])))
        np.testing.assert_allclose(found, (u[..., :R] * sizes[:, None, :R]) @ vt[:, :R], atol=1e-6)
    met = meet(method, server)
    for m, pair in server.memory["fed_sb"].items():
        for fixed, later in zip(pair, met.after.memory["fed_sb"][m], strict=True):
            np.testing.assert_array_equal(fixed, later)
        r_mean = sum(
            w * kernel_of(h.weights.adapter[m], SPEC.scales()[m])
            for w, h in zip(SHARES, met.held, strict=True)
        )
        np.testing.assert_allclose(total(method, met.after)[m], r_mean, atol=1e-5)


# --- Ranks -----------------------------------------------------------------------------------------------------------


def test_the_norm_of_a_product_by_grams_and_padding_keeps_it():
    adapter = begin(make("fedit")).weights.adapter
    products = [np.einsum("nki,nko->nio", *pair) for pair in adapter.values()]
    found = product_norm(adapter)
    np.testing.assert_allclose(found, np.sqrt(sum((x**2).sum() for x in products)), rtol=1e-5)
    padded = {m: Pair(*(jnp.pad(x, ((0, 0), (0, 2), (0, 0))) for x in pair)) for m, pair in adapter.items()}
    np.testing.assert_allclose(product_norm(padded), found, rtol=1e-6)


def test_padding_and_truncating_gives_back_what_was_sent():
    method = make("zero_padding")
    met = meet(method, begin(method), (2,), shares=(1.0,))
    again = method.download(jax.random.key(0), met.after, Client(*map(jnp.asarray, (0, 2, 1.0))), 2)
    for m, pair in met.held[0].weights.adapter.items():
        for sent, back in zip(pair, again.weights.adapter[m], strict=True):
            np.testing.assert_allclose(back, sent, atol=1e-6)


def test_a_padded_mean_is_the_mean_over_trainers_times_their_share():
    padded, contributors = make("zero_padding"), make("raflora", factors=True)
    server = begin(padded)
    one, other = (meet(method, server, MIXED).after.weights.adapter for method in (padded, contributors))
    q = np.array([sum(w for k, w in zip(MIXED, SHARES, strict=True) if k > i) for i in range(R)])
    for m in one:
        for low, mean in zip(one[m], other[m], strict=True):
            np.testing.assert_allclose(low, q[:, None] * mean, atol=1e-5)


def test_without_training_raflora_stands_still_flexlora_damps_once_and_padding_twice():
    """By the share q of those that hold a component, which is 1 for the first only."""
    ks = (1, 3, 2)
    q = np.array([1.0, 0.8, 0.5])
    rng = np.random.default_rng(3)
    kernels = {m: jnp.float32(rng.normal(size=(t.layers, t.i, t.o))) for m, t in SPEC.targets.items()}
    cut = {m: factorised(x, R, SPEC.scales()[m]) for m, x in kernels.items()}
    for name, power in (("raflora", 0), ("flexlora", 1), ("zero_padding", 2)):
        method = make(name)
        server = begin(method)._replace(weights=Trainable(cut, {}))
        after = total(method, meet(method, server, ks, noise=0.0).after)
        for m in cut:
            before = np.linalg.svd(np.asarray(kernel_of(cut[m], SPEC.scales()[m])), compute_uv=False)[:, :R]
            found = np.linalg.svd(after[m], compute_uv=False)[:, :R]
            np.testing.assert_allclose(found, np.sort(before * q**power)[:, ::-1], rtol=1e-4)


def test_raflora_keeps_the_product_that_nobody_trained():
    method = make("raflora")
    server = begin(method)
    met = meet(method, server, (1, 2, 2))
    old = server.weights.adapter
    for m, done in total(method, met.after).items():
        last = np.einsum("nki,nko->nio", old[m].a[:, 2:], old[m].b[:, 2:]) * SPEC.scales()[m]
        parts = [h.weights.adapter[m] for h in met.held]
        first = sum(w * kernel_of(Pair(p.a[:, :1], p.b[:, :1])) for w, p in zip(SHARES, parts, strict=True))
        second = sum(
            w / 0.8 * kernel_of(Pair(p.a[:, 1:2], p.b[:, 1:2]))
            for w, p in zip(SHARES[1:], parts[1:], strict=True)
        )
        wanted = SPEC.scales()[m] * (first + second) + last
        sizes = np.linalg.svd(wanted - done, compute_uv=False)
        np.testing.assert_allclose(
            sizes[:, 0], np.linalg.svd(wanted, compute_uv=False)[:, R], rtol=1e-3
        )  # what the SVD cuts off


# --- LoRA-FAIR -------------------------------------------------------------------------------------------------------


def corrected(**options) -> tuple[Met, Method]:
    method = make("lora_fair", **options)
    return meet(method, begin(method)), method


def test_lora_fair_without_penalty_leaves_what_a_cannot_reach():
    """``dW (I - P_A)``."""
    met, method = corrected(penalty=0.0)
    for m, missed in error(method, met).items():
        a = means(met, m)[0]
        off = np.eye(a.shape[-1]) - np.swapaxes(a, 1, 2) @ np.linalg.inv(a @ np.swapaxes(a, 1, 2)) @ a
        np.testing.assert_allclose(missed, off @ met.ideal[m], atol=1e-4)


def test_lora_fair_with_an_endless_penalty_is_fedit():
    met, _ = corrected(penalty=1e9)
    fedit = make("fedit")
    expected = meet(fedit, begin(fedit)).after.weights.adapter
    for m, pair in met.after.weights.adapter.items():
        for found, wanted in zip(pair, expected[m], strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_lora_fair_is_never_worse_than_fedit_and_never_larger_than_both(penalty):
    met, method = corrected(penalty=penalty)
    fedit = make("fedit")
    plain = error(fedit, meet(fedit, begin(fedit)))
    for m, missed in error(method, met).items():
        assert (np.linalg.norm(missed, axis=(1, 2)) <= np.linalg.norm(plain[m], axis=(1, 2)) + 1e-5).all()
        size = np.linalg.norm(total(method, met.after)[m], axis=(1, 2))
        bound = np.linalg.norm(met.ideal[m], axis=(1, 2)) + np.linalg.norm(plain[m], axis=(1, 2))
        assert (size <= bound).all()


def test_lora_fair_corrects_nothing_where_clients_agree_and_bears_a_rank_above_the_width():
    method = make("lora_fair")
    server = begin(method)
    met = meet(method, server, noise=0.0)
    for m, pair in server.weights.adapter.items():
        np.testing.assert_allclose(met.after.weights.adapter[m].b, pair.b, atol=1e-5)
    rng = np.random.default_rng(0)
    a, residual = jnp.float32(rng.normal(size=(1, 6, 4))), jnp.float32(rng.normal(size=(1, 4, 5)))
    d = ridge(residual, a, 0.0)
    np.testing.assert_allclose(jnp.einsum("nki,nko->nio", a, d), residual, atol=1e-3)
    assert np.isfinite(ridge(residual, 0 * a, 0.0)).all()


def test_lora_fairs_cosine_comes_near_the_best_that_any_b_can_have():
    """``|dW P_A| / |dW|``, at factors of order 1; zero factors give no NaN."""
    met, _ = corrected()
    a, b = (jnp.float32(x) for x in means(met, "q"))
    wanted = jnp.float32(met.ideal["q"] / SPEC.scales()["q"])

    def cosine(d):
        product = np.einsum("nki,nko->nio", a, b + d)
        sizes = np.linalg.norm(product, axis=(1, 2)) * np.linalg.norm(wanted, axis=(1, 2))
        return (product * wanted).sum((1, 2)) / sizes

    on = np.swapaxes(a, 1, 2) @ np.linalg.inv(a @ np.swapaxes(a, 1, 2)) @ a
    best = np.linalg.norm(on @ wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    found = cosine(descend(wanted, Pair(a, b), 0.0, 1000, 0.3))
    assert (found > cosine(0 * b)).all() and (found <= best + 1e-5).all()
    np.testing.assert_allclose(found, best, atol=0.02)
    assert np.isfinite(descend(0 * wanted, Pair(a, 0 * b), 0.01, 3, 0.01)).all()


# --- Merges into the base --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora", "xgblora", "rac_lora"])
def test_after_a_merge_the_fresh_adapter_adds_nothing_and_the_rank_is_bounded(name):
    """Rank 1 over two rounds of two clients: at most 4 of 7, or 2 where the drawn factor is the same for all."""
    spec = SPEC._replace(r=1)
    method = make(name, spec)
    server = begin(method, spec)
    for seed in (1, 2):
        server = meet(method, server, (1, 1), shares=(0.4, 0.6), seed=seed).after
        for pair in server.weights.adapter.values():
            assert not np.asarray(kernel_of(pair)).any()
            assert np.asarray(pair.a if name != "rac_lora" else pair.b).any()
    bound = 2 if name == "rac_lora" else 4
    for delta in server.base_delta.values():
        sizes = np.linalg.svd(delta, compute_uv=False)
        assert ((sizes > 1e-5 * sizes.max()).sum(-1) <= bound).all() and sizes.max() > 0.1


def test_xgblora_boosts_exactly_the_layers_it_picked_and_each_as_often():
    spec = Spec({"q": Target(4, 4, 6)}, 1, 1.0)
    method = make("xgblora", spec, layers=0.5)
    picked = jax.vmap(lambda key: method.init(key, {}).memory["xgblora"])(
        jax.random.split(jax.random.key(0), 4000)
    )
    assert (picked.sum(1) == 3).all()
    np.testing.assert_allclose(picked.mean(0), 0.5, atol=0.03)
    wide = Spec(SPEC.targets, R, SPEC.scale, scale_pattern=SPEC.scale_pattern)
    boost = make("xgblora", wide, layers=0.5)
    server = begin(boost, wide)
    after = meet(boost, server).after
    for m in wide.targets:
        moved_layers = np.asarray(after.base_delta[m]).any((1, 2))
        np.testing.assert_array_equal(moved_layers, np.asarray(server.memory["xgblora"]) > 0)
        assert moved_layers.sum() == 1


def sketch_of(key: jax.Array, spec: Spec) -> jax.Array:
    """``Q (N, o, r)`` that RAC-LoRA draws for module ``q``."""
    return jnp.swapaxes(make("rac_lora", spec).init(key, {}).weights.adapter["q"].b, 1, 2)


def test_rac_lora_draws_projectors_whose_mean_is_isotropic():
    spec = Spec({"q": Target(4, 6, 1)}, 2, 1.0)
    q = jax.vmap(lambda key: sketch_of(key, spec)[0])(jax.random.split(jax.random.key(0), 4000))
    h = q @ jnp.swapaxes(q, 1, 2)
    np.testing.assert_allclose(h @ h, h, atol=1e-5)
    np.testing.assert_allclose(jnp.trace(h, axis1=1, axis2=2), 2, atol=1e-5)
    np.testing.assert_allclose(h.mean(0), np.eye(6) * 2 / 6, atol=0.03)


@pytest.mark.parametrize("sketch", ["a", "b"])
def test_a_step_of_rac_lora_is_the_gradients_step_projected(sketch):
    spec = Spec({"q": Target(4, 6, 1)}, 2, 1.0)
    method = make("rac_lora", spec, sketch=sketch)
    server = method.init(jax.random.key(1), {})
    client = Client(*map(jnp.asarray, (0, 2, 1.0)))
    before = method.download(jax.random.key(0), server, client, 2)
    gradient = jax.random.normal(jax.random.key(2), (1, 4, 6))  # of a loss at the kernel, linear here

    def loss(pair: Pair) -> jax.Array:
        return (gradient * kernel_of(pair, before.scale["q"])).sum()

    pair, grads = before.weights.adapter["q"], jax.grad(loss)(before.weights.adapter["q"])
    stepped = Pair(
        *(x - 0.1 * g * rows[..., None] for x, g, rows in zip(pair, grads, before.trains["q"], strict=True))
    )
    after = before._replace(weights=Trainable({"q": stepped}, {}))
    payload, _ = method.upload(jax.random.key(0), server, before, after, client)
    combined = method.combine([jax.tree.map(lambda x: x[None], payload)], [jnp.ones(1)])
    moved_by = method.update(jax.random.key(3), server, combined).base_delta["q"][0]
    q = np.asarray(getattr(server.weights.adapter["q"], sketch))[0]
    projected = q.T @ q @ gradient[0] if sketch == "a" else gradient[0] @ q.T @ q
    np.testing.assert_allclose(moved_by, -0.1 * projected, atol=1e-6)


def test_a_chain_of_sketches_reaches_what_one_sketch_cannot():
    """On ``<W - W*, M (W - W*)> / 2`` with M = diag(10, 1, .., 1)."""
    spec, rng = Spec({"q": Target(4, 6, 1)}, 2, 1.0), np.random.default_rng(0)
    start, m = rng.normal(size=(6, 4)), np.diag([10.0, 1, 1, 1, 1, 1])
    keys = jax.random.split(jax.random.key(0), 400)
    sketches = np.asarray(jax.vmap(lambda key: sketch_of(key, spec)[0])(keys), np.float64)

    def loss_after(chain: bool) -> float:
        w = start
        for q in sketches if chain else sketches[:1].repeat(400, 0):
            w = w - 0.1 * q @ q.T @ m @ w
        return float((w * (m @ w)).sum() / 2)

    assert loss_after(True) < 1e-3 < 0.1 < loss_after(False)


# --- HetLoRA ---------------------------------------------------------------------------------------------------------


def hetlora_upload(method: Method, server: Server, factor: float, rank: int, k: int = R) -> tuple[int, Local]:
    """The rank that a client has after its factors shrank or grew by ``factor``."""
    client = Client(*map(jnp.asarray, (0, k, 1.0)), memory={HETLORA: {"rank": jnp.int32(rank)}})
    before = method.download(jax.random.key(0), server, client, R)
    after = before._replace(weights=jax.tree.map(lambda x: factor * x, before.weights))
    payload, memory = method.upload(jax.random.key(0), server, before, after, client)
    held = int(payload.trains["q"].a.sum(-1)[0])
    assert held == memory[HETLORA]["rank"]
    return held, before


def test_hetloras_ranks_never_rise_nor_fall_below_the_least():
    method = make("hetlora", decay=0.7, least_rank=2)
    server = begin(method)
    assert hetlora_upload(method, server, 2.0, -1)[0] == R
    assert hetlora_upload(method, server, 1.0, -1)[0] == R
    assert hetlora_upload(method, server, 0.5, -1)[0] == 2
    assert hetlora_upload(method, server, 0.5, 2)[0] == 2
    assert hetlora_upload(method, server, 2.0, 2)[0] == 2
    assert hetlora_upload(method, server, 0.5, -1, k=1)[0] == 1
    _, before = hetlora_upload(method, server, 1.0, 2)
    assert before.trains["q"].a.sum(-1).tolist() == [2.0, 2.0]


def test_hetlora_never_prunes_at_b_zero():
    """Also where the tail of A has shrunk, by decay say."""
    method = make("hetlora", decay=0.7, least_rank=1)
    server = begin(method)
    adapter = {m: pair._replace(b=0 * pair.b) for m, pair in server.weights.adapter.items()}
    blank = server._replace(weights=Trainable(adapter, {}))
    assert hetlora_upload(method, blank, 0.5, -1)[0] == R


def test_hetloras_weights_are_shares_of_norms_whatever_their_scale():
    method = make("hetlora")
    server = begin(method)
    met = meet(method, server, MIXED, shares=(0.2, 0.5, 0.3))
    other = meet(method, server, MIXED, shares=(0.4, 0.1, 0.5))
    norms = [float(product_norm(h.weights.adapter)) for h in met.held]
    for m, pair in met.after.weights.adapter.items():
        wanted = sum(
            n / sum(norms) * np.pad(h.weights.adapter[m].a, ((0, 0), (0, R - k), (0, 0)))
            for n, h, k in zip(norms, met.held, MIXED, strict=True)
        )
        np.testing.assert_allclose(pair.a, wanted, atol=1e-5)
        np.testing.assert_allclose(pair.a, other.after.weights.adapter[m].a, atol=1e-6)


def test_hetlora_with_equal_norms_is_fedit_and_zero_norms_do_not_wipe_a():
    het, fedit = make("hetlora", decay=1.0, tail_penalty=0.0), make("fedit")
    server = begin(fedit)
    equal = (0.5, 0.5)
    for noise in (0.0, None):
        start = (
            server
            if noise == 0.0
            else server._replace(
                weights=Trainable({m: p._replace(b=0 * p.b) for m, p in server.weights.adapter.items()}, {})
            )
        )
        one, other = (
            meet(method, start, (R, R), shares=equal, noise=0.0).after.weights.adapter
            for method in (het, fedit)
        )
        for m in one:
            np.testing.assert_allclose(one[m].a, other[m].a, atol=1e-6)
            assert np.abs(one[m].a).max() > 0.1


def test_hetloras_tail_penalty_bounds_the_product_of_the_tail_and_has_a_gradient():
    method = make("hetlora", decay=0.4, tail_penalty=1.0)
    held = method.download(
        jax.random.key(0),
        begin(method),
        Client(*map(jnp.asarray, (0, R, 1.0)), memory={HETLORA: {"rank": jnp.int32(-1)}}),
        R,
    )
    tail = tail_rows(held, 0.4)
    assert [rows.sum() for rows in tail.values()] == [2 * LAYERS] * 2
    cut = {m: Pair(*(x * tail[m][..., None] for x in pair)) for m, pair in held.weights.adapter.items()}
    assert tail_norm(held.weights.adapter, tail) >= product_norm(cut)
    blank = {m: pair._replace(b=0 * pair.b) for m, pair in held.weights.adapter.items()}
    gradient = jax.grad(lambda x: method.penalty(held._replace(weights=Trainable(x, {}))))(blank)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    grown = jax.grad(lambda x: method.penalty(held._replace(weights=Trainable(x, {}))))(held.weights.adapter)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(grown))


# --- What a client holds ---------------------------------------------------------------------------------------------


def test_fedsa_loras_clients_have_their_own_b_and_one_a():
    method = make("fedsa_lora")
    server = begin(method)
    client = Client(*map(jnp.asarray, (0, R, 1.0)), memory=method.first_memory(server))
    before = method.download(jax.random.key(0), server, client, R)
    after = moved(before, np.random.default_rng(5), 1.0)
    payload, memory = method.upload(jax.random.key(0), server, before, after, client)
    combined = method.combine([jax.tree.map(lambda x: x[None], payload)], [jnp.array([0.3])])
    later = method.update(jax.random.key(0), server, combined)
    own = method.download(jax.random.key(1), later, client._replace(memory=memory), R)
    another = method.download(jax.random.key(1), later, client, R)
    for m, pair in after.weights.adapter.items():
        np.testing.assert_array_equal(own.weights.adapter[m].b, pair.b)
        np.testing.assert_array_equal(another.weights.adapter[m].b, before.weights.adapter[m].b)
        for held in (own, another):
            np.testing.assert_array_equal(held.weights.adapter[m].a, later.weights.adapter[m].a)


@pytest.mark.parametrize("k", [1, 2, R])
@pytest.mark.parametrize("name", ["fed_plora", "hafl"])
def test_holding_still_leaves_the_global_model_and_trains_exactly_k(name, k):
    method = make(name)
    server = begin(method)
    server = meet(method, server, FULL).after  # with a ranking
    held = method.download(jax.random.key(3), server, Client(*map(jnp.asarray, (0, k, 1.0))), R)
    for m, found in total(method, server).items():
        np.testing.assert_array_equal(kernel_of(held.weights.adapter[m], held.scale[m]), np.float32(found))
        np.testing.assert_array_equal(held.trains[m].a.sum(-1), [k] * LAYERS)
        np.testing.assert_array_equal(held.trains[m].a, held.trains[m].b)


def test_hafl_trains_the_components_that_mattered():
    """One component moved far in every round; truncation hands out that one."""
    for freeze in (True, False):
        method = make("hafl", freeze=freeze)
        server = begin(method)
        change = {
            m: Pair(*(jnp.full_like(x, 0.01).at[:, 2].set(1.0) for x in p))
            for m, p in server.weights.adapter.items()
        }
        ones = {m: Rows(*[jnp.ones((LAYERS, R))] * 2) for m in SPEC.targets}
        server = method.update(jax.random.key(0), server, Combined(Trainable(change, {}), ones))
        held = method.download(
            jax.random.key(3), server, Client(*map(jnp.asarray, (0, 1, 1.0))), R if freeze else 1
        )
        for m in SPEC.targets:
            at = jnp.argmax(held.trains[m].a, -1) if freeze else held.index[m][:, 0]
            assert at.tolist() == [2, 2]


def test_importance_sampling_draws_k_with_the_probabilities_that_its_gains_say():
    method = make("fslora", importance=True, uniform_part=0.2)
    server, k, draws = begin(method), 2, 20_000

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        held = method.download(key, server, Client(*map(jnp.asarray, (0, k, 1.0))), k)
        rows = jnp.arange(LAYERS)[:, None]
        gain = jnp.zeros((LAYERS, R)).at[rows, held.index["q"]].set(held.scale["q"] / SPEC.scale)
        return gain, held.trains["q"].a.sum(-1)

    gains, counts = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws))
    assert (counts == k).all()
    drawn = np.asarray(gains) > 0
    said = 1 / np.asarray(gains).max(0)
    assert np.ptp(said) > 0.2  # not uniform
    np.testing.assert_allclose(said.sum(-1), k, rtol=1e-5)
    np.testing.assert_allclose(drawn.mean(0), said, atol=0.015)
    np.testing.assert_allclose(gains.mean(0), 1, atol=0.04)  # E[S] = I


def test_a_redrawn_sketch_has_its_gain_in_every_step():
    method = make("fslora", redraw=True)
    client = Client(*map(jnp.asarray, (0, 2, 1.0)))
    held = method.download(jax.random.key(0), begin(method), client, R)
    np.testing.assert_array_equal(held.trains["q"].a, 1)
    seen = set()
    for h in range(8):
        now = method.at_step(jax.random.fold_in(jax.random.key(1), h), client, held)
        gain = np.asarray(now.scale["q"]) / SPEC.scale
        np.testing.assert_allclose(np.sort(gain, -1), [[0, 1.5, 1.5]] * LAYERS, rtol=1e-6)
        np.testing.assert_array_equal(now.trains["q"].a, gain > 0)
        seen.add(gain.tobytes())
    assert len(seen) > 3
