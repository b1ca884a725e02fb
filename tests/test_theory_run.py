"""``fslora theory`` on the tiny run: its objective against what clients compute, its files, mistakes in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from fslora_jax.federation.setup import initial_server
from fslora_jax.sketch import scatter_sum
from fslora_jax.theory.measure import Sizes, draw_sample, objective, open_run, scale_head
from fslora_jax.theory.report import show

NAMES = {"f", "f_S", "f_S - f", "grad_f_S^2", "sigma_s^2", "sigma_g^2", "sigma_h^2"}
CURVED = {f"{kind} {name}" for kind in ("eigenvalue", "curvature") for name in ("f", "f_S")}


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    return shutil.copytree(finished, tmp_path_factory.mktemp("theory") / "run")


@pytest.fixture(scope="module")
def measured(world, folder):
    argv = ("--draws", 5, "--clients", 3, "--lanczos", 3, "--steps", 2, "--rounds", 4)
    runs.call(world, "theory", folder, *argv)
    return json.loads((folder / "theory.json").read_text(encoding="utf-8"))


def test_gradients_are_those_of_a_client_that_holds_its_sketch_alone(world, folder, monkeypatch):
    """The masked form in the places of the global adapter, against the extracted form that a client trains."""
    monkeypatch.setenv("FSLORA_CACHE", str(world.cache))
    run = open_run(folder, [4])
    federation = run.federation
    server = initial_server(run.config, federation)._replace(weights=run.points[4])
    base, sample = federation.task.base, draw_sample(run, Sizes(5, 2, 2, 1, 1))
    masked = jax.jit(jax.value_and_grad(run.loss, argnums=1))
    for c in range(2):
        client, key = jax.tree.map(lambda x, c=c: x[c], sample.clients), sample.keys[c, 0]
        batch = jax.tree.map(lambda x, c=c: x[c, 0, :1], sample.batches)
        held = federation.method.download(key, server, client, int(client.k))

        def loss(weights, held=held, batch=batch):
            one = jax.tree.map(lambda x: x[None], held._replace(weights=weights))
            found = federation.task.model.score(base, [one], batch, None)
            return found.loss.sum() / found.count.sum()

        value, slope = jax.jit(jax.value_and_grad(loss))(held.weights)
        one = jax.tree.map(lambda x: x[0], batch)
        found, whole = masked(base, run.points[4], key, client, one)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        for m, pair in slope.adapter.items():
            for mine, parts in zip(whole.adapter[m], pair, strict=True):
                placed = scatter_sum(parts[None], held.index[m][None], jnp.ones(1), run.config.lora.r)
                np.testing.assert_allclose(mine, placed, atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole.head, slope.head)
    # A head whose learning rate is four times as large, in units in which it is not.
    units = jax.jit(jax.value_and_grad(objective(run.config, federation, 2.0), argnums=1))
    value, slope = units(base, scale_head(run.points[4], 0.5), key, client, one)
    np.testing.assert_allclose(value, found, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y, atol=1e-5), slope.head, whole.head)


def test_every_quantity_is_there_at_every_round(measured):
    found = {(x["name"], x["round"]): x for x in measured["estimates"]}
    assert set(found) == {(name, t) for name in NAMES | CURVED for t in (0, 4)}
    for (name, _), x in found.items():
        if name.startswith("eigenvalue"):
            assert x["low"] is x["high"] is None
        else:
            assert x["low"] <= x["value"] <= x["high"]
    # B is 0 at the start, and there sketches do not change the loss.
    assert found["f_S - f", 0]["value"] == pytest.approx(0, abs=1e-6)
    assert found["f", 4]["value"] < found["f", 0]["value"]


def test_that_clients_are_a_sample_is_said(measured, capsys):
    show(measured)
    assert "from 3 of 5 clients; intervals are for all, of curvatures and below" in capsys.readouterr().out
    show(measured | {"clients": [0, 1, 2, 3, 4]})
    assert "intervals are for" not in capsys.readouterr().out


def test_the_bound_is_made_of_what_was_measured(measured):
    b, found = measured["bound"], measured["estimates"]
    largest = {n: max(abs(x["value"]) for x in found if x["name"] == n) for n in NAMES | CURVED}
    c = b["constants"]
    assert (c["smoothness"], c["sketch"]) == (largest["eigenvalue f"], largest["sigma_s^2"])
    assert (c["rate"], c["local_steps"], c["clients"], b["rounds"]) == (0.02, 2, 3, 4)
    assert b["theorem"]["start"] == pytest.approx(4 * c["gap"] / (0.02 * 4 * 2))
    assert b["fixed_sketch"]["total"] > b["theorem"]["total"]
    squares = [x["value"] for x in found if x["name"] == "grad_f_S^2"]
    assert b["measured_mean"] == pytest.approx(np.mean(squares))
    assert any("adamw" in line for line in b["departures"])


def test_growth_starts_from_one_step_and_figures_are_drawn(measured, folder):
    growth = {(x["name"].split()[1], x["local_steps"]): x for x in measured["growth"]}
    assert set(growth) == {(mode, h) for mode in ("fixed", "redrawn") for h in (1, 2)}
    one = growth["fixed", 1]["theory"]
    assert growth["fixed", 1]["value"] == growth["redrawn", 1]["value"] == one
    assert (growth["fixed", 2]["theory"], growth["redrawn", 2]["theory"]) == pytest.approx((4 * one, 2 * one))
    for name in ("theory_gradient.png", "theory_growth.png"):
        assert (folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--draws", 4), "draws: found 4, expected at least 5"),
        (("--batches", 1), "batches: found 1, expected at least 2"),
        (("--clients", 2), "clients: found 2 of 5, expected at least 3"),
        (("--rounds", 3), "no checkpoint of round 3; there are [0, 2, 4]"),
    ],
)
def test_mistakes_are_one_line(world, folder, capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        runs.call(world, "theory", folder, *argv)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_other_methods_are_refused(world, folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    config = (other / "config.yaml").read_text(encoding="utf-8")
    (other / "config.yaml").write_text(config.replace("method: fslora", "method: zero_padding"))
    with pytest.raises(SystemExit):
        runs.call(world, "theory", other)
    assert "federation.method is zero_padding; expected a run of fslora" in capsys.readouterr().err
