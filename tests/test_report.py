"""Reports: statistics against scipy, what is told and drawn of runs in any state, and texts that stay texts."""

import base64
import hashlib
import io
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import runs
from made_runs import FIRST, SECOND, make_plan, make_run, two_ratios
from matplotlib import pyplot
from scipy import stats

from fslora_jax.errors import UserError
from fslora_jax.report import command
from fslora_jax.report.collect import read_subject
from fslora_jax.report.command import make_page, report_command
from fslora_jax.report.tables import tabulate
from fslora_jax.report.words import answer, standing


@pytest.fixture
def study(tmp_path):
    return two_ratios(tmp_path / "study")


def tables(*folders):
    return tabulate(read_subject(folders))


def test_means_and_paired_differences_are_those_of_scipy(study):
    t = tables(study)
    row = next(row for row in t.means if row["series"] == "main, ratio 0.5")
    low, high = stats.t.interval(0.95, 2, FIRST.mean(), stats.sem(FIRST))
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((FIRST.mean(), low, high))
    (paired,) = [row for row in t.differences if row["axis"] == "federation.ratio"]
    assert (paired["choice"], paired["against"], paired["where"], paired["n"]) == ("1.0", "0.5", "main", 3)
    expected = stats.ttest_rel(SECOND, FIRST).confidence_interval(0.95)
    assert (paired["low"], paired["high"]) == pytest.approx((expected.low, expected.high))
    (grids,) = [row for row in t.differences if row["axis"] == "grid"]
    assert (grids["mean"], grids["n"]) == (pytest.approx(0.55 - SECOND[0]), 1)  # the only seed that both have
    assert np.isnan(grids["low"])
    (told,) = [line for line in answer(read_subject([study]), t) if line.startswith("Accuracy")]
    assert f"the highest of each grid: main, ratio 1.0: {SECOND.mean():.3f} ± " in told
    assert "; alone, ratio 1.0: 0.550; lowest of all with alone, ratio 1.0" in told


def test_at_equal_bytes_the_dearer_choice_is_read_where_the_cheaper_ends(study):
    plan = json.loads((study / "study.json").read_text())
    plan["study"]["compare"] = "federation.ratio"
    (study / "study.json").write_text(json.dumps(plan))
    t = tables(study)
    by_series = {row["series"]: row for row in t.equal}
    assert by_series["main, ratio 0.5"]["mean"] == pytest.approx(FIRST.mean())
    # It has uploaded 1 of its 2 MB after the first of two rounds.
    assert by_series["main, ratio 1.0"]["mean"] == pytest.approx((0.5 + SECOND.mean()) / 2)
    assert {row["up_MB"] for row in t.equal if row["series"].startswith("main")} == {1.0}
    assert len(t.equal_differences) == 1
    told = answer(read_subject([study]), t)
    assert any(f"the best is main, ratio 0.5 at 1.000 MB: {FIRST.mean():.3f}" in line for line in told)


def test_curves_are_means_over_the_seeds_that_have_come_so_far(tmp_path):
    points = [{"name": f"g/{s}", "grid": "g", "seed": str(s)} for s in range(3)]
    out = make_plan(tmp_path / "study", points)
    make_run(out / "g/0", (0.5, 0.6, 0.8), settings={"seed": 0})
    make_run(out / "g/1", (0.4, 0.8), rounds=2, settings={"seed": 1})
    t = tables(out)
    drawn = {row["round"]: row for row in t.curves if row["measure"] == "eval/accuracy"}
    assert [(drawn[i]["n"], drawn[i]["mean"]) for i in range(3)] == [
        (2, 0.45),
        (2, pytest.approx(0.7)),
        (1, 0.8),
    ]
    assert drawn[1]["MB"] == 1.0
    assert standing(read_subject([out]).runs) == "1 of 3 runs have finished; 1 has begun, 1 has not begun."
    assert t.means[0]["n"] == 1


def test_different_data_are_not_compared(tmp_path):
    """Two tasks of a study are two panels, each with its own best."""
    points = []
    for task, accuracy in (("easy", 0.9), ("hard", 0.6)):
        for rate in ("0.1", "1"):
            points.append(
                {
                    "name": f"g/{task}_{rate}",
                    "grid": "g",
                    "task": task,
                    "client_optimizer.learning_rate": rate,
                }
            )
            own = {"data.name": task, "client_optimizer.learning_rate": float(rate)}
            make_run(tmp_path / "s/g" / f"{task}_{rate}", (0.5, accuracy - float(rate) / 10), settings=own)
    t = tables(make_plan(tmp_path / "s", points))
    assert (list(t.metrics), t.axes) == (["easy", "hard"], ["client_optimizer.learning_rate"])
    told = answer(read_subject([tmp_path / "s"]), t)
    assert told[0].startswith("easy: accuracy is highest with client_optimizer.learning_rate 0.1: 0.890")
    assert {row["panel"] for row in t.differences} == {"easy", "hard"}


def test_trials_are_listed_but_not_compared(tmp_path):
    points = [
        {"name": name, "grid": grid, "seed": "0"} for name, grid in (("g/0", "g"), ("g.tuning/0", "g.tuning"))
    ]
    out = make_plan(tmp_path / "s", points)
    make_run(out / "g/0")
    make_run(out / "g.tuning/0", (0.5, 0.99), settings={"data.validation": 0.2})
    subject = read_subject([out])
    assert [row["run"] for row in tabulate(subject).finals] == ["g/0"]
    assert "g.tuning" in make_page([out], None)[0]


def test_the_commands_of_a_study_are_told(study):
    plan = json.loads((study / "study.json").read_text())
    told = ["fslora study a.yaml --out 'my runs'", f"fslora study {HOSTILE}"]
    (study / "study.json").write_text(json.dumps(plan | {"commands": told}))
    page, _, _ = make_page([study], None)
    assert "The study was run with:" in page
    assert all(command in unescape(page) for command in told)
    assert "<script>alert" not in page


HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


def test_texts_of_configs_stay_texts(tmp_path):
    points = [{"name": f"g/{i}", "grid": HOSTILE, HOSTILE: f"{HOSTILE}{i}", "seed": "0"} for i in range(2)]
    out = make_plan(tmp_path / "s", points, question=f"Is {HOSTILE} safe?")
    for i in range(2):
        run = make_run(
            out / f"g/{i}", settings={"data.name": f"{HOSTILE}{i}"}, **{f"eval/{HOSTILE}": {0: 1.0, 2: 2.0}}
        )
        (run / "partition.json").write_text(json.dumps({"clients": [{HOSTILE: 3}]}))
    make_run(out / "g/torn", settings={})
    page, _, _ = make_page([out], None)
    assert f"Is {HOSTILE} safe?" in unescape(page)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == 2  # the data, and the page's own
    assert not re.findall(r"https?://(?!www\.w3\.org/(?:1999|2000|XML))", page)


def test_only_the_pages_own_scripts_may_run(study):
    page, _, _ = make_page([study], None)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert unescape(policy[1]).startswith("default-src 'none'; script-src 'sha256-")
    for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in unescape(policy[1])


def test_downloads_hold_every_digit(study):
    page, _, _ = make_page([study], None)
    link = re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]*)" download="means.csv"', page)
    assert link is not None
    table = pd.read_csv(io.BytesIO(base64.b64decode(link[1])))
    assert table["mean"][0] == FIRST.mean()


@pytest.mark.parametrize("accuracies", [(), (0.5,), (0.5, 0.6)], ids=["begun", "start", "first"])
def test_a_run_that_is_not_finished(tmp_path, accuracies):
    run = make_run(tmp_path / "run", accuracies or (0.5,), rounds=9)
    if not accuracies:
        for name in ("metrics.jsonl", "timings.jsonl", "partition.json"):
            (run / name).unlink()
    page, finished, _ = make_page([run], 5)
    assert not finished
    assert f"it is at round {max(0, len(accuracies) - 1)} of 9" in page
    assert '<meta http-equiv="refresh" content="5">' in page
    assert ("Nothing has been measured yet" in page) == (not accuracies)


def test_a_study_of_which_nothing_has_begun(tmp_path):
    page, finished, _ = make_page(
        [make_plan(tmp_path / "s", [{"name": "g/0", "grid": "g", "seed": "0"}])], None
    )
    assert "0 of 1 runs" in page or "not begun" in page
    assert not finished


def test_mistakes_are_one_line(tmp_path, study):
    (tmp_path / "empty").mkdir()
    old = make_run(tmp_path / "old")
    (old / "summary.json").write_text('{"accuracy": 0.7}')
    torn = make_run(tmp_path / "torn")
    (torn / "summary.json").write_text("{")
    drawn = make_run(tmp_path / "drawn")
    (drawn / "theory.json").write_text('{"estimates": [{"name": "f", "value": 1.0}]}')
    for folder, words in (
        (tmp_path / "empty", "no run folder"),
        (old, "has no 'before'"),
        (torn, "cannot be read"),
    ):
        with pytest.raises(UserError) as caught:
            make_page([folder], None)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    (study / "main/0.5_1/summary.json").write_text(
        '{"accuracy": 0.7}'
    )  # in a study the others are still told
    page, finished, _ = make_page([study], None)
    assert "1 cannot be read" in page
    assert "another version of fslora_jax wrote it" in page
    assert finished
    (study / "study.json").write_text('{"points": []}')
    with pytest.raises(UserError, match="has no 'study'"):
        make_page([study], None)
    (study / "study.json").write_text('{"study": {}, "points": [{"name": 3, "grid": "g"}]}')
    with pytest.raises(UserError, match="was it changed by hand"):
        make_page([study], None)


def test_runs_beside_each_other_are_placed_by_what_differs(tmp_path):
    folders = [
        make_run(tmp_path / f"{m}{s}", settings={"federation.method": m, "seed": s})
        for m in ("a", "b")
        for s in (0, 1)
    ]
    t = tables(*folders)
    assert [(row["series"], row["n"]) for row in t.means] == [("a", 2), ("b", 2)]
    same = [make_run(tmp_path / place / "run") for place in ("one", "two")]
    assert len({row["series"] for row in tables(*same).means}) == 2


def test_a_real_run_gives_page_and_figures_the_same_each_time(world, finished, tmp_path, capsys):
    runs.call(world, "report", finished, "--out", tmp_path / "a.html")
    before = pyplot.rcParams["font.size"]
    report_command([str(finished), "--out", str(tmp_path / "b.html"), "--figures", str(tmp_path / "b")])
    assert pyplot.rcParams["font.size"] == before
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    figures = sorted(path.name for path in (tmp_path / "a_figures").iterdir())
    assert figures == sorted(
        f"{name}.{kind}"
        for name in ("learning_round", "learning_MB", "resources", "shares")
        for kind in ("pdf", "png")
    )
    for name in figures:
        assert (tmp_path / "a_figures" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (
        b"/FontFile2" in (tmp_path / "b/learning_round.pdf").read_bytes()
    )  # the font is inside, as TrueType
    page = (tmp_path / "a.html").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    assert f"{summary['after']['eval/accuracy']:.3f}" in page
    assert f"jax {json.loads((finished / 'made_by.json').read_text())['versions']['jax']}" in page
    assert capsys.readouterr().out.count("report: ") == 2


def test_watching_ends_when_all_runs_have(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    points = [{"name": f"g/{s}", "grid": "g", "seed": str(s)} for s in range(2)]
    study = make_plan(tmp_path / "s", points)
    make_run(study / "g/0")
    waits, pages = [], []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        pages.append(out.read_text())
        if len(waits) == 2:
            make_run(study / "g/1")

    monkeypatch.setattr(command.time, "sleep", wait)
    monkeypatch.setattr(command, "draw_charts", lambda *_: None)
    report_command([str(study), "--out", str(out), "--watch", "3"])
    assert waits == [3, 3]
    assert all('http-equiv="refresh" content="3"' in page for page in pages)
    assert 'http-equiv="refresh"' not in out.read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no folder"),
        (["x", "--watch", "0"], "expected at least 1 second"),
        (["x", "--outs", "y"], "unknown argument"),
    ],
)
def test_mistakes_in_the_command_are_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        report_command(argv)


def test_the_page_is_a_file(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="is a folder"):
        report_command([str(run), "--out", str(tmp_path)])
    for place in (tmp_path / "run/config.yaml", Path("/proc")):  # a file, and where not even root may write
        with pytest.raises(UserError, match=r"cannot be written: .*; make room or choose another --out"):
            report_command([str(run), "--out", str(place / "below/report.html")])
    assert not list(Path(tmp_path).glob("*_figures"))
