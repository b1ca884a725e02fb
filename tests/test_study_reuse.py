"""Points whose settings a finished run has are copied: within a study, between studies, and never from other code."""

import json

import pandas as pd
import pytest
import runs
from runs import mistake, write_study

from fslora_jax.provenance import code_fingerprint
from fslora_jax.rundir import open_run
from fslora_jax.study import reuse, run
from fslora_jax.study.points import load_study

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")
RATE = "client_optimizer.learning_rate"
SHORT = {"federation.num_rounds": 1, RATE: 0.03}
GRIDS = {"first": {"set": SHORT, "over": {"seed": [0, 1]}}}


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """A study that was run, its file and its folder."""
    folder = tmp_path_factory.mktemp("reuse")
    runs.write_config(folder / "base.yaml", world)
    path, out = write_study(folder / "study.yaml", grids=GRIDS), folder / "out"
    runs.call(world, "study", path, "--out", out)
    return path, out


@pytest.fixture
def trained(monkeypatch):
    """The folders of all runs that are trained from here on."""
    train, seen = run.run_together, []

    def watched(wanted, display):
        seen.extend(str(folder) for _, folder in wanted)
        return train(wanted, display)

    monkeypatch.setattr(run, "run_together", watched)
    return seen


def test_another_study_takes_what_is_finished_and_trains_the_rest(world, first, tmp_path, trained, capsys):
    path, done = first
    more = {"second": {"set": SHORT, "over": {"seed": [0, 1, 2], "mesh.fsdp": [1]}}}
    path = write_study(path.parent / "more.yaml", grids=more)
    runs.call(world, "study", path, "--out", tmp_path / "out", "--reuse", done)
    assert trained == [str(tmp_path / "out/second/2_1")]
    assert "second/0_1: copied from" in " ".join(capsys.readouterr().err.split())
    old, new = (pd.read_csv(out / "results.csv").iloc[:2] for out in (done, tmp_path / "out"))
    same = ["accuracy", "loss", "up_MB", "seconds", "code"]
    pd.testing.assert_frame_equal(old[same], new[same])
    copy, source = tmp_path / "out/second/0_1", done / "first/0"
    assert json.loads((copy / "made_by.json").read_text())["copied_from"] == str(source)
    model = "adapter/adapter_model.safetensors"
    assert (copy / model).read_bytes() == (source / model).read_bytes()
    assert (copy / "metrics.jsonl").read_bytes() == (source / "metrics.jsonl").read_bytes()
    runs.call(world, "eval", copy)  # a whole run folder


@pytest.mark.parametrize("untuned", [True, False])
def test_in_one_study_equal_points_are_trained_once(world, first, tmp_path, trained, untuned):
    """What a tuning chooses may be what another grid has untuned, whichever comes first."""

    tune = {"over": {RATE: [0.03]}, "set": {"seed": 9}}
    tuned = {"set": SHORT, "over": {"seed": [0, 1]}, "tune": tune}
    path = write_study(
        first[0].parent / "tuned.yaml",
        grids={"one": tuned, "other": tuned, **(GRIDS if untuned else {})},
        set={"lora.lora_dropout": 0.0},
    )
    runs.call(world, "study", path, "--out", tmp_path, "--together", 8)
    names = sorted(name.removeprefix(f"{tmp_path}/").replace("first/", "one/") for name in trained)
    assert names == ["one.tuning/0.03", "one/0", "one/1"]
    table = pd.read_csv(tmp_path / "results.csv")
    losses = {grid: of_grid["loss"].tolist() for grid, of_grid in table.groupby("grid")}
    assert losses["one"] == losses["other"] == losses.get("first", losses["one"])
    assert len(set(losses["one"])) == 2


def test_a_grid_that_is_run_later_takes_what_an_earlier_one_finished(world, tmp_path, trained):
    runs.write_config(tmp_path / "base.yaml", world)
    same = {name: {"set": SHORT, "over": {"seed": [0]}} for name in ("first", "second")}
    path = write_study(tmp_path / "study.yaml", grids=same)
    for grid in same:
        runs.call(world, "study", path, "--out", tmp_path / "out", "--grids", grid)
    assert trained == [str(tmp_path / "out/first/0")]


@pytest.mark.parametrize("change", ["code", "settings", "unfinished"])
def test_what_differs_or_is_not_finished_is_trained(world, first, tmp_path, trained, change):
    path, done = first
    folder = tmp_path / "runs" / "0"
    with open_run(folder, load_study(path, {})[1][0].config):
        pass
    for name in ("metrics.jsonl", "summary.json"):
        (folder / name).write_bytes((done / "first/0" / name).read_bytes())
    made_by = folder / "made_by.json"
    if change == "code":
        made_by.write_text(made_by.read_text().replace(code_fingerprint(), "0" * 12))
    if change == "unfinished":
        (folder / "summary.json").unlink()
    changes = {"settings": ["--set", "evaluate_every=1"]}.get(change, [])
    runs.call(world, "study", path, "--out", tmp_path / "out", "--reuse", tmp_path / "runs", *changes)
    assert len(trained) == 2


def test_what_another_process_finished_meanwhile_is_left_alone(world, first):
    """A process knows the points that are left from before; one of them may be finished by now, in its own folder."""
    path, done = first
    points = load_study(path, {})[1]
    before = {file: file.stat().st_mtime_ns for file in done.rglob("*") if file.is_file()}
    assert not list(reuse.copied(done, points, reuse.finished_points(done, points)))
    for point in points:
        reuse.copy_run(done / "first/0", done / point.name, point.config)
    after = {file: file.stat().st_mtime_ns for file in done.rglob("*") if file.is_file()}
    assert {file: t for file, t in after.items() if file.name != ".lock"} == {
        file: t for file, t in before.items() if file.name != ".lock"
    }


def test_a_copy_that_is_killed_is_made_again(world, first, tmp_path, trained, monkeypatch):
    path, done = first
    write = reuse.write_atomically

    def dies(file, content):
        if file.name == "summary.json":
            raise KeyboardInterrupt
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(reuse, "write_atomically", dies)
        with pytest.raises(SystemExit):
            runs.call(world, "study", path, "--out", tmp_path, "--reuse", done)
    assert not list(tmp_path.glob("*/*/summary.json"))
    runs.call(world, "study", path, "--out", tmp_path, "--reuse", done)
    assert not trained
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv"), pd.read_csv(done / "results.csv"))


def test_a_folder_that_is_not_there_is_named(world, first, tmp_path, capsys):
    said = mistake(
        world, capsys, "study", first[0], "--out", tmp_path / "out", "--reuse", tmp_path / "nothing"
    )
    assert "nothing is no folder" in said
    assert not (tmp_path / "out").exists()
