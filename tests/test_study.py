"""Studies: the points of grids, runs that are not done twice, tables over repetitions, mistakes in one line."""

import json
import threading

import numpy as np
import pandas as pd
import pytest
import runs
import yaml
from runs import mistake, write_study
from scipy import stats

from fslora_jax.federation.running import Running
from fslora_jax.provenance import code_fingerprint
from fslora_jax.rundir import open_run
from fslora_jax.study.command import part_of
from fslora_jax.study.points import load_study
from fslora_jax.study.table import interval, over_repetitions
from fslora_jax.study.tuning import settled

pytestmark = pytest.mark.usefixtures("no_figures", "programs_kept")
GRIDS = {
    "ratios": {
        "set": {"federation.num_rounds": 1},
        "over": {"federation.sketching_ratios": [[0.25], [1.0]], "seed": [0, 1]},
    },
    "longer": {"over": {"length": {"two": {"federation.num_rounds": 2, "evaluate_every": 1}}}},
}


@pytest.fixture(scope="module")
def study(world, tmp_path_factory):
    """A study's file, beside its base config."""
    folder = tmp_path_factory.mktemp("study")
    runs.write_config(folder / "base.yaml", world)
    return write_study(folder / "study.yaml", grids=GRIDS)


def test_points_are_all_combinations_in_order(study):
    _, points = load_study(study, {})
    assert [p.name for p in points] == [
        "ratios/0.25_0",
        "ratios/0.25_1",
        "ratios/1.0_0",
        "ratios/1.0_1",
        "longer/two",
    ]
    assert points[1].labels == {"federation.sketching_ratios": "0.25", "seed": "1"}
    assert [(p.config.federation.num_rounds, p.config.seed) for p in points] == [
        (1, 0),
        (1, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    ]
    assert points[0].config.lora == points[4].config.lora


def test_changes_go_over_everything_and_may_name_axes(study):
    path = write_study(study.parent / "one.yaml", grids={"longer": GRIDS["longer"]})
    _, points = load_study(path, {"seed": 7, "data.label_column": "label-{length}"})
    assert (points[0].config.seed, points[0].config.data.label_column) == (7, "label-two")


def test_a_study_runs_once_and_goes_on_where_it_was(world, study, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:  # a kill in the middle of the last point
        write_records = Running.write

        def dies(self, speed=None):
            if self.done == 2:
                raise KeyboardInterrupt
            write_records(self, speed)

        patch.setattr(Running, "write", dies)
        with pytest.raises(SystemExit):
            runs.call(world, "study", study, "--out", out)
    assert not (out / "results.csv").exists()
    finished = {path.parent: path.stat().st_mtime_ns for path in out.glob("*/*/summary.json")}
    assert len(finished) == 4
    runs.call(world, "study", study, "--out", out)
    assert {folder: (folder / "summary.json").stat().st_mtime_ns for folder in finished} == finished
    table = pd.read_csv(out / "results.csv")
    measured = ["accuracy", "loss", "up_MB", "seconds"]
    pd.testing.assert_frame_equal(table[measured], pd.read_parquet(out / "results.parquet")[measured])
    assert table["grid"].tolist() == ["ratios"] * 4 + ["longer"]
    for row, folder in zip(table.to_dict("records"), ["ratios/0.25_0", "ratios/0.25_1"], strict=False):
        record = runs.records(out / folder)[-1]
        assert (row["accuracy"], row["loss"]) == (record["eval/accuracy"], record["eval/loss"])
        assert row["up_MB"] == pytest.approx(record["traffic/up_bytes"] / 1e6)
    means = pd.read_csv(out / "means.csv")
    of_first = table["loss"][:2]
    assert means["n"].tolist() == [2, 2, 1]
    assert means["loss"][0] == pytest.approx(of_first.mean())
    assert means["loss.sd"][0] == pytest.approx(of_first.std())
    assert len(pd.read_csv(out / "curves.csv")) == 4 * 2 + 3
    plan = json.loads((out / "study.json").read_text())
    assert plan["study"]["repeat"] == "seed"
    assert plan["commands"] == [f"fslora study {study} --out {out}"]  # the same twice


def test_parts_and_grids_divide_the_points(world, study, tmp_path, capsys):
    runs.call(world, "study", study, "--out", tmp_path, "--grids", "ratios", "--part", 1, 4)
    assert [path.parent.name for path in tmp_path.glob("*/*/summary.json")] == ["0.25_1"]
    runs.call(world, "study", study, "--out", tmp_path, "--grids", "longer")
    assert pd.read_csv(tmp_path / "results.csv")["grid"].tolist() == [
        "ratios",
        "longer",
    ]  # what was begun stays
    commands = json.loads((tmp_path / "study.json").read_text())["commands"]
    assert [command.partition("--grids ")[2] for command in commands] == ["ratios --part 1 4", "longer"]
    assert "found 4 4" in mistake(world, capsys, "study", study, "--out", tmp_path, "--part", 4, 4)
    assert "unknown ['rates']" in mistake(
        world, capsys, "study", study, "--out", tmp_path, "--grids", "rates"
    )


def test_a_grid_of_which_there_are_only_trials_stays_in_the_plan(world, study, tmp_path):
    path = write_study(study.parent / "only.yaml", grids={**TUNED, "longer": GRIDS["longer"]})
    (tmp_path / "methods.tuning").mkdir()
    runs.call(world, "study", path, "--out", tmp_path, "--grids", "longer")
    plan = json.loads((tmp_path / "study.json").read_text())
    assert {point["grid"] for point in plan["points"]} == {"methods.tuning", "methods", "longer"}


def test_a_folder_of_another_study_is_refused_and_kept(world, study, tmp_path, capsys):
    path = write_study(study.parent / "before.yaml", grids={"other": {"set": {"federation.num_rounds": 1}}})
    runs.call(world, "study", path, "--out", tmp_path)
    plan = (tmp_path / "study.json").read_bytes()
    said = mistake(world, capsys, "study", study, "--out", tmp_path)
    assert "holds another study, with a run other/run; choose another --out" in said
    assert (tmp_path / "study.json").read_bytes() == plan


def test_a_point_that_another_process_works_on_is_passed_over(world, study, tmp_path, capsys):
    """Held by another thread here, whose lock is as foreign as another process's."""
    _, points = load_study(study, {})
    held, over = threading.Event(), threading.Event()

    def hold():
        with open_run(tmp_path / points[-1].name, points[-1].config):
            held.set()
            over.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    try:
        runs.call(world, "study", study, "--out", tmp_path, "--grids", "longer")
    finally:
        over.set()
        other.join()
    assert "another process is at it" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*/summary.json"))


def test_a_point_that_fails_stops_no_other_and_is_named(world, study, tmp_path, capsys):
    broken = {"lora.target_modules": {"broken": {"lora.target_modules": ["nothing"]}, "whole": {}}}
    path = write_study(
        study.parent / "fails.yaml", grids={"g": {"set": {"federation.num_rounds": 1}, "over": broken}}
    )
    assert "1 of 2 points failed; g/broken: lora.target_modules" in mistake(
        world, capsys, "study", path, "--out", tmp_path
    )
    assert (tmp_path / "g/whole/summary.json").exists()


TUNED = {
    "methods": {
        "set": {"federation.num_rounds": 2, "evaluate_every": 1},
        "over": {"rank": {"full": {"federation.sketching_ratios": [1.0]}, "half": {}}, "seed": [0, 1]},
        "tune": {
            "over": {"client_optimizer.learning_rate": [1e-6, 0.05, 1e30]},
            "set": {"data.validation": 0.25, "seed": 9},
            "by": "loss",
        },
    }
}


@pytest.fixture(scope="module")
def tuned(world, study, tmp_path_factory):
    """A tuned study that was run, its file and its folder; trials at 1e30 diverge."""
    path, out = (
        write_study(study.parent / "tuned.yaml", grids=TUNED, compare="rank"),
        tmp_path_factory.mktemp("out"),
    )
    runs.call(world, "study", path, "--out", out)
    return path, out


def test_every_place_gets_the_rate_that_its_trials_found_best_and_none_sees_the_test_examples(tuned):
    path, out = tuned
    _, points = load_study(path, {})
    assert len(points) == 4
    assert [len(p.choices) for p in points] == [3] * 4
    for point in points:
        losses = {}
        for choice in point.choices:
            trial, rate = choice.trial, choice.labels["client_optimizer.learning_rate"]
            assert (trial.config.data.validation, trial.config.seed) == (0.25, 9)
            summary = out / trial.name / "summary.json"
            if rate == "1e+30":
                assert "round 1" in (out / trial.name / "diverged.txt").read_text()
                assert not summary.exists()
            else:
                losses[rate] = json.loads(summary.read_text())["after"]["eval/loss"]
        best = min(losses, key=losses.__getitem__)
        used = yaml.safe_load((out / point.name / "config.yaml").read_text())
        assert used["client_optimizer"]["learning_rate"] == float(best)
        assert used["data"]["validation"] == 0
    results = pd.read_csv(out / "results.csv")
    assert results["grid"].value_counts().to_dict() == {"methods.tuning": 4, "methods": 4}
    assert results["client_optimizer.learning_rate"].notna().all()


def test_a_tuned_study_is_finished_when_it_is(world, tuned):
    path, out = tuned
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/*/*.json*")}
    runs.call(world, "study", path, "--out", out)
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*/*.json*")} == times


def test_methods_are_compared_where_they_have_sent_the_same(tuned):
    """The half-rank runs have sent all that they send; the others are between two evaluations there."""
    _, out = tuned
    equal = pd.read_csv(out / "equal_bytes.csv").set_index("rank")
    results = pd.read_csv(out / "results.csv").query("grid == 'methods'")
    cheapest = results[results["rank"] == "half"]
    assert equal["up_MB"].tolist() == pytest.approx([cheapest["up_MB"].min()] * 2)
    assert equal.loc["half", "loss"] == pytest.approx(cheapest["loss"].mean())
    assert 0 < equal.loc["full", "rounds"] < 2
    by_hand = []
    for seed in (0, 1):
        records = runs.records(out / f"methods/full_{seed}")
        at = equal.loc["full", "rounds"]  # every round sends the same
        low, high = records[int(at)]["eval/loss"], records[int(at) + 1]["eval/loss"]
        by_hand.append(low + (at - int(at)) * (high - low))
    assert equal.loc["full", "loss"] == pytest.approx(np.mean(by_hand))


def test_a_point_waits_for_trials_that_another_process_runs(world, tuned, tmp_path, capsys):
    """Parts keep what belongs together; a trial held elsewhere leaves its points for whoever holds it."""
    path, _ = tuned
    _, points = load_study(path, {})
    assert {p.labels["rank"] for p in part_of(points, (0, 2))} == {"full"}
    assert {p.labels["rank"] for p in part_of(points, (1, 2))} == {"half"}
    trial = points[0].choices[0].trial
    with open_run(tmp_path / trial.name, trial.config):
        assert settled(tmp_path, points[0]) is None


def test_a_place_whose_trials_all_diverge_says_so(world, study, tmp_path, capsys):
    tune = {"over": {"client_optimizer.learning_rate": [1e30]}}
    grids = {"g": {"set": {"federation.num_rounds": 1}, "tune": tune}}
    path = write_study(study.parent / "diverges.yaml", grids=grids)
    assert "all 1 trials diverged" in mistake(world, capsys, "study", path, "--out", tmp_path)


def test_results_of_other_code_are_not_mixed_unless_asked(world, study, tmp_path, capsys):
    path = write_study(
        study.parent / "code.yaml", grids={"g": {"over": {"seed": [0, 1]}}}, set={"federation.num_rounds": 1}
    )
    runs.call(world, "study", path, "--out", tmp_path, "--part", 0, 2)
    made_by = tmp_path / "g/0/made_by.json"
    made_by.write_text(made_by.read_text().replace(code_fingerprint(), "0" * 12))
    said = mistake(world, capsys, "study", path, "--out", tmp_path)
    assert f"g/0 was begun by code {'0' * 12}, but this is {code_fingerprint()}" in said
    assert not (tmp_path / "g/1").exists()
    runs.call(world, "study", path, "--out", tmp_path, "--mixed")
    assert pd.read_csv(tmp_path / "results.csv", dtype=str)["code"].tolist() == ["0" * 12, code_fingerprint()]


def test_intervals_cover_the_mean_at_their_rate():
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(3.0, 2.0, 4)) for _ in range(2000)]
    covered = np.mean([abs(mean - 3.0) <= half for mean, _, half in found])
    assert abs(covered - 0.95) < 0.015
    mean, deviation, half = interval([0.1, 0.4, 0.3])
    assert (mean, deviation) == pytest.approx((0.8 / 3, np.std([0.1, 0.4, 0.3], ddof=1)))
    low, high = stats.t.interval(0.95, 2, mean, deviation / np.sqrt(3))
    assert half == pytest.approx((high - low) / 2)


def test_means_leave_out_what_was_not_measured():
    table = pd.DataFrame(
        {"grid": "g", "task": ["a", "a", "b"], "seed": ["0", "1", "0"], "f1": [1.0, 3.0, None]}
    )
    means = over_repetitions(table, ["task", "seed"], "seed")
    assert means["f1"].tolist()[:1] == [2.0]
    assert np.isnan(means["f1"][1])
    assert means["n"].tolist() == [2, 1]
