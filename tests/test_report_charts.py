"""Charts: which there are, what their captions say, and what lies on paper."""

import json

import numpy as np
import pytest
from made_runs import make_study, two_ratios

from fslora_jax.report.charts import all_charts
from fslora_jax.report.collect import read_subject
from fslora_jax.report.paper import draw
from fslora_jax.report.styles import style
from fslora_jax.report.tables import tabulate
from fslora_jax.report.words import answer


@pytest.fixture
def study(tmp_path):
    return two_ratios(tmp_path / "study")


def test_charts_are_there_for_what_there_is(study):
    subject = read_subject([study])
    names = [chart.name for chart in all_charts(subject, tabulate(subject))]
    assert names == ["learning", "final", "differences", "by_ratio", "resources", "shares"]
    run = study / "main/0.5_0"
    (run / "clients.jsonl").write_text('{"client": 0, "examples": 3, "accuracy": 0.5, "loss": 0.7, "k": 2}\n')
    estimate = {"name": "grad_f_S^2", "round": 0, "value": 2.0, "low": 1.0, "high": 3.0}
    growth = {
        "name": "update_variance fixed",
        "local_steps": 1,
        "value": 1.0,
        "low": None,
        "high": None,
        "theory": 1.0,
    }
    bound = {"rounds": 2, "measured_mean": 0.5, "theorem": {"total": 7.0}}
    (run / "theory.json").write_text(
        json.dumps({"estimates": [estimate], "growth": [growth], "bound": bound})
    )
    record = {"round": 3, "aggregation/error": 0.1, "clock/simulated_seconds": 9.0, "eval/accuracy": 0.6}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    subject = read_subject([study])
    t = tabulate(subject)
    charts = {chart.name: chart for chart in all_charts(subject, t)}
    assert {"aggregation", "theory", "growth", "clients"} <= charts.keys()
    assert list(charts["learning"].xs) == ["round", "MB", "clock"]
    assert any("the theorem bounds it by 7" in sentence for sentence in answer(subject, t))


@pytest.mark.parametrize(
    ("choices", "seeds", "words"),
    [
        (8, 2, "with 95 % intervals (Student's t)."),
        (9, 2, "; of more than 8 curves no intervals are drawn."),
        (9, 1, "Without repetitions there are no intervals."),
    ],
)
def test_a_caption_speaks_of_intervals_where_they_are_drawn(tmp_path, choices, seeds, words):
    finals = {("g", str(c / 10 + 0.1), str(s)): 0.6 + s / 50 for c in range(choices) for s in range(seeds)}
    subject = read_subject([make_study(tmp_path / "s", finals)])
    t = tabulate(subject)
    charts = {chart.name: chart for chart in all_charts(subject, t)}
    assert charts["learning"].note.endswith(words)
    drawn = draw(charts["learning"], t, "round").axes[0].collections
    assert bool(drawn) == words.startswith("with")
    assert ("with 95 %" in charts["differences"].note) == (seeds > 1)


def test_on_paper_nothing_lies_outside(study):
    subject = read_subject([study])
    t = tabulate(subject)
    for chart in all_charts(subject, t):
        for x in [x for x in chart.xs if chart.kind == "lines"]:
            (axes,) = draw(chart, t, x).axes
            rows = [row for row in chart.rows if row["measure"] == chart.measures[0]]
            for at, *ends in [
                (row[x], row["mean"], row["low"], row["high"]) for row in rows if row[x] == row[x]
            ]:
                assert axes.get_xlim()[0] < at < axes.get_xlim()[1]
                for end in [end for end in ends if end is not None and np.isfinite(end)]:
                    assert axes.get_ylim()[0] < end < axes.get_ylim()[1], (chart.name, x)


def test_no_two_series_look_the_same():
    assert len({style(i) for i in range(28)}) == 28
