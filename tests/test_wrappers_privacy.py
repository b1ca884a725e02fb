"""Differential privacy of clients: clipping and noise by the round, epsilon against the exact Gaussian curve."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import wrapped
from scipy.optimize import brentq
from scipy.stats import norm

from fslora_jax.config import Config, make_config
from fslora_jax.errors import UserError
from fslora_jax.federation.method import check_method
from fslora_jax.federation.privacy import epsilon_of
from fslora_jax.methods.wrappers.clip_and_noise import clip_and_noise

EQUAL = (0.25,) * 4


def private(name: str = "fslora", **options):
    return wrapped.make(name, {"clip_and_noise": options})


def test_uploads_are_clipped_over_everything_and_short_ones_left():
    method = private(clip=1.5, noise_multiplier=0)
    sent = wrapped.one_round(method, wrapped.start(method))
    change = jax.tree.map(jnp.subtract, sent.after.weights, sent.before.weights)
    norms = np.sqrt(sum((np.asarray(x).reshape(3, -1) ** 2).sum(1) for x in jax.tree.leaves(change)))
    assert norms.min() < 1.5 < norms.max()
    for found, whole in zip(jax.tree.leaves(sent.payload.delta), jax.tree.leaves(change), strict=True):
        factor = np.minimum(1, 1.5 / norms).reshape(3, *[1] * (whole.ndim - 1))
        np.testing.assert_allclose(found, whole * factor, rtol=1e-5, atol=1e-7)


def test_one_client_moves_the_sum_by_no_more_than_the_accountant_counts():
    """Replaced by any other client, with changes a thousand times as large."""
    method = private("fedit", clip=0.5, noise_multiplier=0)
    server = wrapped.start(method)

    def other(client, before):
        sign = jnp.where(client.id == 2, -1000.0, 1.0)
        after = wrapped.pretend(client, before).weights
        moved = jax.tree.map(lambda a, b: b + sign * (a - b), after, before.weights)
        return before._replace(weights=moved)

    one, two = (wrapped.one_round(method, server, weights=EQUAL, train=t) for t in (wrapped.pretend, other))
    far = jax.tree.map(lambda x, y: ((x - y) ** 2).sum(), one.server.weights, two.server.weights)
    assert np.sqrt(sum(map(float, jax.tree.leaves(far)))) == pytest.approx(2 * 0.5 * 0.25, rel=1e-4)


def test_noise_has_the_size_that_the_accountant_counts_and_goes_to_what_was_drawn():
    loud, quiet = (private(clip=0.5, noise_multiplier=m) for m in (3.0, 0.0))
    server, drawn_noise = wrapped.start(loud), []
    arrived = []  # what the method inside gets, which itself leaves alone what nobody drew
    inside = wrapped.make("fslora")
    listening = inside._replace(update=lambda key, server, got: arrived.append(got) or server)
    wrapped.one_round(clip_and_noise(listening, wrapped.SPEC), server, ks=(1, 1, 1))
    for m, pair in arrived[0].delta.adapter.items():
        for x, rows in zip(pair, arrived[0].mass[m], strict=True):
            assert ((np.asarray(x) != 0).any(-1) == (np.asarray(rows) > 0)).all()
    for seed in range(20):
        options = {"weights": EQUAL, "ks": (1, 1, 1, 1), "seed": seed}
        one, two = (wrapped.one_round(method, server, **options) for method in (loud, quiet))
        noise = jax.tree.map(lambda x, y: np.asarray(x - y), one.server.weights, two.server.weights)
        for m, pair in noise.adapter.items():
            drawn = np.asarray(one.combined.mass[m].a) > 0
            for x in pair:
                assert (x[~drawn] == 0).all()
                drawn_noise.append(x[drawn].ravel())
        drawn_noise += [x.ravel() for x in jax.tree.leaves(noise.head)]
    values = np.concatenate(drawn_noise)
    assert values.std() == pytest.approx(3.0 * 0.5 * 0.25, rel=5 / np.sqrt(2 * values.size))
    assert abs(values.mean()) < 5 * values.std() / np.sqrt(values.size)


def config(*, rounds: int = 100, clients: int = 100, cohort: int | None = None, **changes) -> Config:
    wrapper = {"noise_multiplier": 20.0, **changes.pop("wrapper", {})}
    federation = {
        "num_rounds": rounds,
        "num_clients": clients,
        "clients_per_round": cohort,
        "wrappers": {"clip_and_noise": wrapper},
    }
    values = {"model": {"name": "m"}, "data": {"name": "d"}, "federation": federation | changes}
    return make_config(values, "test")


@pytest.mark.parametrize(("multiplier", "rounds"), [(20.0, 100), (8.0, 10)])
def test_epsilon_is_a_close_upper_bound_of_the_exact_one(multiplier, rounds):
    """Without sampling, rounds are one Gaussian mechanism, whose curve is known (Balle and Wang 2018)."""
    mu = 2 * np.sqrt(rounds) / multiplier

    def delta(epsilon: float) -> float:
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    exact = brentq(lambda epsilon: delta(epsilon) - 1e-5, 1e-3, 100)
    found = epsilon_of(config(wrapper={"noise_multiplier": multiplier}), rounds)
    assert exact < found < 1.15 * exact


def test_a_smaller_part_of_the_clients_spends_less_and_more_rounds_spend_more():
    some, everybody = config(cohort=5), config()
    assert epsilon_of(some, 100) < 0.5 * epsilon_of(everybody, 100)
    assert epsilon_of(everybody, 50) < epsilon_of(everybody, 100)
    assert epsilon_of(some, 100, sampled=False) == epsilon_of(everybody, 100)


def test_a_budget_that_the_rounds_exceed_is_refused_with_the_numbers():
    spent = epsilon_of(config(), 100)
    check_method(config(wrapper={"epsilon": spent + 0.01}))
    with pytest.raises(
        UserError, match=rf"found {spent - 0.01:g}, but 100 rounds of 100 .* spend {spent:.4g}"
    ):
        check_method(config(wrapper={"epsilon": spent - 0.01}))
    with pytest.raises(UserError, match="noise_multiplier 0, which is not private"):
        check_method(config(wrapper={"epsilon": 1.0, "noise_multiplier": 0}))


def test_weights_by_examples_are_refused():
    with pytest.raises(UserError, match="client_weights: found examples, but clip_and_noise counts on equal"):
        check_method(config(client_weights="examples"))


def test_without_the_accountant_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'fslora_jax\[privacy\]'"):
        check_method(config())


def test_a_run_says_what_it_spent(world, tmp_path):
    """Through the command line, compressed as well: fewer bytes than the summary's full rank, epsilon by the rounds."""
    wrappers = {"compress": {"ratio": 0.2, "bits": 4}, "clip_and_noise": {"noise_multiplier": 4.0}}
    run = runs.train(world, tmp_path / "run", federation__wrappers=wrappers)
    found = runs.records(run)
    spent = {record["round"]: record.get("privacy/epsilon") for record in found}
    settings = make_config(runs.settings(world, federation__wrappers=wrappers), "test")
    after = partial(epsilon_of, settings, sampled=False)  # clients remember what they did not send
    assert spent == {0: None, 1: None, 2: after(2), 3: None, 4: after(4)}
    assert found[-1]["traffic/up_bytes"] < 0.15 * found[-1]["traffic/down_bytes"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["privacy/epsilon"] == after(4)
