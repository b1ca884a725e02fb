"""Every method in every wrapper: legal pairs are the method at no strength and finite at work, others are refused."""

import re

import jax
import numpy as np
import pytest
import toy
import wrapped
from compare import client_batches

from fslora_jax import cli
from fslora_jax.errors import UserError
from fslora_jax.list_methods import combinations
from fslora_jax.methods import METHODS, WRAPPERS, whole
from fslora_jax.methods.wrappers.uploads import bytes_beside, count_of, sent

NOTHING = {
    "personalise": {"parts": []},
    "prune": {"deadline": 1e9},
    "compress": {"ratio": 1.0, "bits": 32},
    "clip_and_noise": {"clip": 1e9, "noise_multiplier": 0.0},
    "over_the_air": {"noise_std": 0.0},
    "observe": {},
}
SILENT = {"observe"}
"""They change nothing, ever."""
AT_WORK = {
    "personalise": {"parts": ["head"]},
    "prune": {"deadline": 4.0, "bandwidth": 500.0, "efficiency": [1.0, 2.0, 4.0]},
    "compress": {"ratio": 0.3, "bits": 4},
    "clip_and_noise": {"clip": 0.5},
    "over_the_air": {"threshold": 0.1, "csi_error": 0.05},
}
TABLE = combinations()


@jax.jit
def loss_of(base, weights):
    tier = jax.tree.map(lambda x: x[None], whole(wrapped.SPEC, weights))
    batch = jax.tree.map(lambda x: x[:1], client_batches(toy.POPULATION, 0, 0))
    return toy.make_score()(base, [tier], batch, None).loss.sum()


def loss(method, server) -> float:
    base = toy.shifted(toy.BASE, server.base_delta) if method.traits.moves_base else toy.BASE
    return float(loss_of(base, method.adapter(server)))


@pytest.mark.parametrize("name", METHODS)
def test_every_legal_pair_is_the_method_at_no_strength_and_another_at_work(name):
    plain = wrapped.rounds(wrapped.make(name), 2)
    for wrapper, reason in TABLE[name].items():
        if reason is not None:
            continue
        count = (
            2 if wrapper == "personalise" else 1
        )  # whose parts come back to the client in the second round
        expected = wrapped.end(plain[count - 1])
        nothing = wrapped.rounds(wrapped.make(name, {wrapper: NOTHING[wrapper]}), count)
        for leaf, value in wrapped.end(nothing[-1]).items():
            np.testing.assert_allclose(value, expected[leaf], rtol=2e-5, atol=2e-5, err_msg=wrapper + leaf)
        if wrapper in SILENT:
            continue
        method = wrapped.make(name, {wrapper: AT_WORK[wrapper]})
        working = wrapped.rounds(method, count)[-1]
        differs = [not np.allclose(x, expected[leaf], atol=1e-4) for leaf, x in wrapped.end(working).items()]
        assert any(differs), wrapper
        assert np.isfinite(loss(method, working.server)), wrapper


@pytest.mark.parametrize("name", METHODS)
def test_every_illegal_pair_is_refused_with_its_reason(name):
    for wrapper, reason in TABLE[name].items():
        if reason is not None:
            with pytest.raises(UserError, match=re.escape(f"{wrapper} cannot go around {name}: {reason}")):
                wrapped.make(name, {wrapper: {}})


def test_the_table_says_what_the_mathematics_does():
    """Written by hand from each method's server, against what traits make of it."""
    sums = {"fslora", "fedit", "ffa_lora", "rolora", "fedsa_lora", "zero_padding", "hafl", "fed_plora"}
    sums |= {"fed_sb", "rac_lora"}
    legal = {w: {name for name, row in TABLE.items() if row[w] is None} for w in WRAPPERS}
    assert legal["over_the_air"] == sums
    assert legal["clip_and_noise"] == sums - {"zero_padding", "fed_sb"}
    assert legal["prune"] == {"fedit", "ffa_lora", "rolora", "fedsa_lora"}
    assert legal["compress"] == set(METHODS)
    assert legal["personalise"] == legal["observe"] == set(METHODS) - {"fedsa_lora"}
    assert "products" in TABLE["flexlora"]["over_the_air"]


def test_the_table_and_its_reasons_are_printed(capsys):
    cli.main(["methods", "--combinations"])
    printed = " ".join(capsys.readouterr().out.split())
    reasons = {reason for row in TABLE.values() for reason in row.values() if reason}
    assert all(reason in printed for reason in reasons)
    assert all(name in printed for name in METHODS)


@pytest.mark.parametrize(
    ("wrappers", "reason"),
    [
        ({"compress": {}, "over_the_air": {}}, "need bits"),
        ({"prune": {}, "over_the_air": {}}, "need bits"),
        ({"clip_and_noise": {}, "over_the_air": {}}, "sensitivity"),
        ({"over_the_air": {}, "compress": {}}, "over_the_air cannot go around fedit"),
    ],
)
def test_wrappers_that_do_not_go_together_are_refused(wrappers, reason):
    with pytest.raises(UserError, match=reason):
        wrapped.make("fedit", wrappers)


def test_wrappers_go_the_way_of_an_upload_whatever_their_order_in_the_config():
    method = wrapped.make("fedit", {"clip_and_noise": {}, "compress": {}, "personalise": {}})
    assert method.traits.wrapped == ("personalise", "compress", "clip_and_noise")


@pytest.mark.parametrize(
    ("wrapper", "options"),
    [
        ("over_the_air", {"noise_std": -0.1}),
        ("over_the_air", {"threshold": -1}),
        ("over_the_air", {"power": 0}),
        ("over_the_air", {"csi_error": -1}),
        ("compress", {"ratio": 0}),
        ("compress", {"ratio": -0.5}),
        ("compress", {"bits": 1}),
        ("clip_and_noise", {"clip": -1}),
        ("clip_and_noise", {"noise_multiplier": -1}),
        ("prune", {"deadline": -1}),
        ("prune", {"efficiency": []}),
        ("personalise", {"top_layers": -1}),
    ],
)
def test_negative_strengths_are_refused(wrapper, options):
    with pytest.raises(UserError, match=rf"federation.wrappers.{wrapper}: {next(iter(options))}"):
        wrapped.make("fedit", {wrapper: options})


@pytest.mark.parametrize(
    ("name", "wrapper", "options", "reason"),
    [
        ("flexlora", "personalise", {"parts": ["b"]}, "only the head can be personal"),
        ("flora", "compress", {"error_feedback": True}, "error_feedback: found true"),
        ("zero_padding", "over_the_air", {"upload": "model"}, "sends its factors anyway"),
        (
            "fedit",
            "prune",
            {"deadline": 1e-3, "bandwidth": 1.0},
            "no client can compute and send even one of 4",
        ),
    ],
)
def test_options_that_a_method_rules_out_are_refused(name, wrapper, options, reason):
    with pytest.raises(UserError, match=reason):
        wrapped.make(name, {wrapper: options})


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_is_what_traffic_counts(name):
    """The mask by which wrappers know what is sent, against the bytes that every method tells."""
    method = wrapped.make(name)
    first, second = wrapped.rounds(method, 2)
    for t, done in enumerate([first, second]):
        masks = jax.vmap(lambda p: count_of(p.delta, sent(wrapped.SPEC, method.traits, p)))(done.payload)
        head = sum(x.size for x in jax.tree.leaves(done.server.weights.head))
        up = np.asarray(method.traffic(t, done.clients, head).up)
        beside = bytes_beside(wrapped.SPEC, method.traits, done.clients.k)
        np.testing.assert_array_equal(np.asarray(masks) * 4, up - beside)
