"""The aggregation error that a round tells, against sums over clients by hand, and what the papers say of it."""

import jax
import numpy as np
import pytest
import runs
import wrapped

from fslora_jax.log import read_records
from fslora_jax.methods import METHODS, TOLD, WRAPPERS
from fslora_jax.methods.wrappers.rules import refusal
from fslora_jax.rundir import METRICS

OBSERVED = [name for name in METHODS if refusal("observe", wrapped.make(name)) is None]
EXACT = {"ffa_lora", "rolora", "flora", "fedex_lora", "fed_sb", "rac_lora", "xgblora"}
"""Whose papers promise the average of products, at any ranks that they allow."""


def kernels(method, weights, server) -> dict[str, np.ndarray]:
    """``s B A`` and what was merged, in float64."""
    return {
        m: wrapped.SPEC.scales()[m]
        * np.einsum("nri,nro->nio", np.asarray(pair.a, float), np.asarray(pair.b, float))
        + np.asarray(server.base_delta.get(m, 0.0), float)
        for m, pair in weights.adapter.items()
    }


def by_hand(method, one: wrapped.Sent, old) -> tuple[float, float]:
    """Both numbers, client after client."""
    before, after = (
        kernels(method, method.adapter(old), old),
        kernels(method, method.adapter(one.server), one.server),
    )
    trained, mean = ({m: np.zeros_like(x) for m, x in before.items()} for _ in range(2))
    for c, weight in enumerate(wrapped.WEIGHTS):
        for sign, held in ((-1, one.before), (1, one.after)):
            held = jax.tree.map(lambda x, c=c: x[c], held)
            held = method.forward(old, held) if method.forward else held
            for m, pair in held.weights.adapter.items():
                a, b, s = (np.asarray(x, float) for x in (pair.a, pair.b, held.scale[m]))
                put_on = weight * sum(
                    np.stack([s[n, j] * np.outer(a[n, j], b[n, j]) for n in range(len(a))])
                    for j in range(a.shape[1])
                )
                trained[m] += sign * put_on
                mean[m] += put_on if sign > 0 else weight * np.asarray(old.base_delta.get(m, 0.0), float)
    size = norm(trained)
    error = norm({m: after[m] - before[m] - trained[m] for m in before})
    return error / size, norm({m: after[m] - mean[m] for m in before}) / size


def norm(found: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((x**2).sum() for x in found.values())))


@pytest.mark.parametrize("name", OBSERVED)
def test_it_is_the_distance_to_the_average_of_whole_weights(name):
    method = wrapped.make(name, {"observe": {}})
    first, second = wrapped.rounds(method, 2)
    told = second.server.memory[TOLD]
    expected = by_hand(method, second, first.server)
    assert float(told["aggregation/error"]) == pytest.approx(expected[0], rel=1e-3, abs=2e-5)
    assert float(told["aggregation/from_mean"]) == pytest.approx(expected[1], rel=1e-3, abs=2e-5)
    assert (expected[1] < 2e-5) == (name in EXACT)


def test_fedits_error_is_the_cross_covariance_of_the_factors():
    method = wrapped.make("fedit", {"observe": {}})
    one = wrapped.one_round(method, wrapped.start(method))
    error, size = {}, {}
    for m, pair in one.after.weights.adapter.items():
        a, b = (np.asarray(x, float) for x in pair)
        a0, b0 = (np.asarray(x[0], float) for x in one.before.weights.adapter[m])
        w = np.array(wrapped.WEIGHTS)
        apart = (x - np.einsum("c,cnkz->nkz", w, x) for x in (a, b))
        error[m] = np.einsum("c,cnki,cnko->nio", w, *apart)
        size[m] = np.einsum("c,cnki,cnko->nio", w, a, b) - np.einsum("nki,nko->nio", a0, b0)
    told = one.server.memory[TOLD]["aggregation/error"]
    assert float(told) == pytest.approx(norm(error) / norm(size), rel=1e-4)
    assert float(told) > 0.01


def test_observing_goes_outermost_and_travels_free():
    wrappers = {"observe": {}, "compress": {"ratio": 0.3, "bits": 4}}
    method, plain = wrapped.make("fedit", wrappers), wrapped.make("fedit", {"compress": wrappers["compress"]})
    assert list(WRAPPERS)[-1] == "observe" and method.traits.wrapped[-1] == "observe"
    one = wrapped.one_round(method, wrapped.start(method))
    assert float(one.server.memory[TOLD]["aggregation/error"]) > 0.1  # what compression drops counts
    for x, y in zip(method.traffic(0, one.clients, 18), plain.traffic(0, one.clients, 18), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_writes_it_every_round_and_is_the_same_run(world, tmp_path):
    """Also where several rounds are one call."""
    observed = {"federation__wrappers": {"observe": {}}}
    found = {
        name: read_records(runs.train(world, tmp_path / name, **changes) / METRICS)
        for name, changes in {
            "alone": observed,
            "called": observed | {"federation__rounds_per_call": 2},
            "plain": {},
        }.items()
    }
    errors = [[r["aggregation/error"] for r in found[name][1:]] for name in ("alone", "called")]
    assert len(errors[0]) == 4
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-4)
    assert min(errors[0]) > 0
    for with_it, without in zip(found["alone"], found["plain"], strict=True):
        kept = {n: x for n, x in with_it.items() if not n.startswith("aggregation/")}
        assert kept == pytest.approx(without, rel=1e-5)  # another program, other roundings
